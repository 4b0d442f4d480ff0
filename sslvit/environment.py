"""The environment: compatible libraries (``python -m sslvit.environment``, run by `make`), devices, CPU cores."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sslvit
from sslvit.files import printable

logger = logging.getLogger(__name__)

MAX_STEPS = "SSLVIT_MAX_STEPS"  # environment variable: limits the steps of runs and heads, to try commands out
GIT_SECONDS = 5  # timeout for git
MAX_WORKERS = 16  # most loader processes by default
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)

# substrings of an error's text -> explanation and remedy
REMEDIES = {
    ("shared memory", "Bus error", "unable to mmap", "torch_shm"): (
        "the loader's processes have no shared memory left (/dev/shm). Use --data.workers 0 (or --workers 0), or give "
        "the container more: docker run --shm-size 8g"
    ),
    ("No working C++ compiler", "Cannot find a working triton", "Failed to find C compiler"): (
        "train.compile: torch.compile finds no C++ compiler here, or no Triton. Install gcc (Debian: apt install "
        "build-essential), or use --train.compile none."
    ),
    ("torchvision::nms does not exist", "partially initialized module 'torchvision'"): (
        "torch and torchvision are of different builds (a CPU-only torch beside the default torchvision, say), so "
        "torchvision cannot load. Install both from the same index: pip install --force-reinstall "
        "'torch>=2.11,<2.16' 'torchvision>=0.26,<0.30', with the same --index-url for both if you give one."
    ),
}


def shortened_by() -> dict[str, str]:
    """The limit of MAX_STEPS, for keys of results that are kept: empty where the variable is not set."""
    return {MAX_STEPS: os.environ[MAX_STEPS]} if os.environ.get(MAX_STEPS) else {}


def explain(error: BaseException) -> str | None:
    """The remedy for an error caused by the machine or by incompatible libraries, or None."""
    text = str(error)
    return next((remedy for signs, remedy in REMEDIES.items() if any(sign in text for sign in signs)), None)


def check() -> str | None:
    """Describe the problem with the installed libraries, or return None."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, AttributeError, ImportError) as error:
        return explain(error) or f"torchvision cannot be imported: {error}"
    return None


def limited_steps(steps: int, what: str) -> int:
    """Limit the steps of a run or a head to $SSLVIT_MAX_STEPS if that is set, with a warning if it makes a difference.

    Raises:
        ValueError: The variable is not a positive number.
    """
    text = os.environ.get(MAX_STEPS)
    if not text:
        return steps
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"{MAX_STEPS}={printable(text)}: expected a number of steps. Unset it for whole runs.")
    if steps > int(text):
        logger.warning(f"{MAX_STEPS}={text}: {what} takes {text} steps instead of {steps:,}")
    return min(steps, int(text))


def describe_process() -> dict[str, Any]:
    """Describe the process that writes a file: command, date, host, versions, and commits of the code."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "pytorch-lightning", "numpy")}
    return {
        "command": typed_command(), "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "versions": {"sslvit": sslvit.__version__, "python": platform.python_version(), **versions},
        "commits": {
            "sslvit": git_commit(Path(sslvit.__file__).parent), "working_directory": git_commit(Path.cwd()),
        },
    }  # fmt: skip


def typed_command() -> str:
    """The command line of this process, with sslvit by its name and not by the path of its program."""
    program, *words = sys.argv
    is_module = Path(program).resolve().parent == Path(sslvit.__file__).resolve().parent  # python -m sslvit
    start = ["sslvit"] if is_module or Path(program).name == "sslvit" else [program]
    return shlex.join([*start, *words])


def git_commit(folder: Path) -> str | None:
    """The checked-out commit of a folder's repository, with a -dirty suffix if files have changed; None without one."""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step or forward pass, instead of returning it to the system.

    On a CPU, glibc returns every large tensor to the system, which then has to zero new pages for the next one; that
    takes 5 to 14 percent of a training step, and 10 to 45 percent of the CPU time of a forward pass without gradients.
    Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def require_packages(asked: str, install: str, *packages: str) -> None:
    """Raise before any work if a feature needs packages that are not installed, or newer versions of them.

    Args:
        asked: The feature in the user's words, such as "--format onnx".
        install: Argument for pip install, such as "sslvit[onnx]".
        packages: Import names of the packages.

    Raises:
        ImportError: One of them is not installed, or does not meet the requirement of sslvit's own metadata.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"{asked}: {package} is not installed. Run: pip install '{install}'")
        if requirement := _unmet_requirement(package):
            raise ImportError(
                f"{asked}: needs {requirement}, but {metadata.version(package)} is installed. Run: pip install "
                f"--upgrade '{install}'"
            )


def _unmet_requirement(package: str) -> str | None:
    """The requirement of sslvit's metadata that an installed package does not meet, such as timm>=1.0.30, or None."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        requirements, version = metadata.requires("sslvit") or [], metadata.version(package)
    except metadata.PackageNotFoundError:  # sslvit or the package is not installed, but on PYTHONPATH
        return None
    for one in map(Requirement, requirements):
        is_same = canonicalize_name(one.name) == canonicalize_name(package)
        if is_same and not one.specifier.contains(version, prereleases=True):
            return f"{one.name}{one.specifier}"
    return None


def pick_device(name: str = "auto") -> str:
    """Resolve a device name: auto is a GPU if there is one, and each local rank gets its own GPU.

    Raises:
        ValueError: cuda is requested, but torch sees no GPU.
    """
    import torch  # takes seconds, for which a command without a device should not wait

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here. Use auto or cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def cpu_cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_workers(workers: int | None, device: str, ranks: int | None = None) -> int:
    """Resolve the number of loader processes of one rank, in training and evaluation.

    Args:
        workers: The requested number. None means, for a GPU, one per CPU core except one, up to MAX_WORKERS, and for a
            CPU no extra processes, since the encoder needs its cores.
        device: Type of the encoder's device.
        ranks: Number of ranks on this machine; None for the number that torchrun sets.
    """
    if workers is not None:
        return workers
    cores = cpu_cores() // (ranks or int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # ranks share the cores
    return 0 if device == "cpu" else min(MAX_WORKERS, max(1, cores - 1))


if __name__ == "__main__":
    problem = check()
    if problem:
        print(f"sslvit: error: {problem}", file=sys.stderr)
    sys.exit(1 if problem else 0)
