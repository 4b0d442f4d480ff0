"""What is there to run on: libraries that fit together (``python -m sslvit.environment``, run by `make`), a GPU."""

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

MAX_STEPS = "SSLVIT_MAX_STEPS"  # of runs and of heads, to try commands out
GIT_SECONDS = 5  # that git may take to name a commit
MAX_WORKERS = 16  # loader processes that nobody asked for
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)

# what is in the text of an error -> what to do about it
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


def explain(error: BaseException) -> str | None:
    """The remedy for an error that stems from the machine or from libraries that do not fit together, or None."""
    text = str(error)
    return next((remedy for signs, remedy in REMEDIES.items() if any(sign in text for sign in signs)), None)


def check() -> str | None:
    """What does not fit, or None."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, AttributeError, ImportError) as error:
        return explain(error) or f"torchvision cannot be imported: {error}"
    return None


def limited_steps(steps: int, what: str) -> int:
    """The steps that a run or a head takes: at most $SSLVIT_MAX_STEPS, where that is set; says so where it is fewer.

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
    """What made a file, beside its settings: command, date, host, versions, and commits of the code."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "pytorch-lightning", "numpy")}
    return {
        "command": shlex.join(sys.argv), "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "versions": {"sslvit": sslvit.__version__, "python": platform.python_version(), **versions},
        "commits": {
            "sslvit": git_commit(Path(sslvit.__file__).parent), "working_directory": git_commit(Path.cwd()),
        },
    }  # fmt: skip


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out around a folder, with -dirty behind it where files have changed; None for none."""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step, instead of giving it back to the system.

    On a CPU glibc returns every large tensor, and the system fills new pages with zeros a moment later, which takes 5
    to 14 percent of a training step. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def require_packages(asked: str, install: str, *packages: str) -> None:
    """Refuse what needs packages that are not installed, or in a version that is too old, before any work.

    Args:
        asked: What needs them, in the user's words, such as "--format onnx".
        install: What pip is given, such as "sslvit[onnx]".
        packages: Names by which they are imported.

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
    """The requirement of sslvit's metadata that an installed package does not meet, such as timm>=1.0.26, or None."""
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
    """The device behind a name: auto is a GPU where there is one. Of several processes each gets its own.

    Raises:
        ValueError: cuda is asked for and not there.
    """
    import torch  # seconds; a command that needs no device need not wait for it

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here. Use auto or cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def cpu_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_workers(workers: int | None, device: str, ranks: int | None = None) -> int:
    """The number of loader processes of one rank behind a setting, in training and evaluation.

    Args:
        workers: The number that is asked for. None is one per CPU core but one, up to MAX_WORKERS, for a GPU, which
            would wait for a single process; and none for a CPU, whose cores the encoder needs.
        device: Type of the encoder's device.
        ranks: Number of processes on this machine; None for what torchrun says.
    """
    if workers is not None:
        return workers
    cores = cpu_cores() // (ranks or int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of several each gets its own
    return 0 if device == "cpu" else min(MAX_WORKERS, max(1, cores - 1))


if __name__ == "__main__":
    problem = check()
    if problem:
        print(f"sslvit: error: {problem}", file=sys.stderr)
    sys.exit(1 if problem else 0)
