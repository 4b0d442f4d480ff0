"""Processes and devices of a run, its precision and compilation, the memory available, and the speed of a CPU."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import nn

from sslvit.settings.run import TrainSettings

# memory limit, memory usage and reclaimable caches, in control groups of version 2 and 1
GROUP_FILES = [
    ("memory.max", "memory.current", "inactive_file "),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
]
MEASURED_TOKENS = 2048  # about ten images


def launched() -> tuple[str, int, int] | None:
    """The launcher that started this process, the number of processes per machine, and the number of machines.

    None without a launcher: then the run starts its own processes.

    Raises:
        ValueError: SLURM has reserved several tasks, and nothing has started them.
    """
    if TorchElasticEnvironment.detect():
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", local, world // local
    if not is_slurm_job():
        return None
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
        raise ValueError(
            f"train.devices: SLURM reserved {tasks} tasks (SLURM_NTASKS), and this command alone was started. Put srun "
            "before it, or reserve one task."
        )
    return "srun", tasks // nodes, nodes


def is_slurm_job() -> bool:
    """Whether SLURM defines the ranks; torchrun, which may run in a job of SLURM, takes precedence."""
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def resolve_processes(train: TrainSettings) -> TrainSettings:
    """The settings with the number of processes that were or will be started.

    Raises:
        ValueError: The given numbers differ from those that a launcher has started.
    """
    found = launched()
    if found is None:
        return replace(train, devices=train.devices or 1, nodes=train.nodes or 1)
    launcher, devices, nodes = found
    for key, given, there, where in (
        ("devices", train.devices, devices, "processes on each machine"), ("nodes", train.nodes, nodes, "machines")
    ):  # fmt: skip
        if given not in (None, there):
            raise ValueError(
                f"train.{key}: {given}, but {launcher} started {there} {where}. Give --train.{key} null, which takes "
                f"what was started, or start {given}."
            )
    return replace(train, devices=devices, nodes=nodes)


def trains_on_gpu(train: TrainSettings) -> bool:
    """Whether a run uses a GPU; a run that requires one can be planned on any machine."""
    return train.accelerator == "gpu" or (train.accelerator == "auto" and torch.cuda.is_available())


def precision_of(train: TrainSettings) -> str:
    """float32, bf16 or float64; auto is bf16 if the hardware supports it, and for a GPU that is not here."""
    if train.precision != "auto":
        return train.precision
    if trains_on_gpu(train):
        has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "float32"
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "float32"


def compile_mode(train: TrainSettings) -> str | None:
    """The mode that `train.compile` stands for; None for no compilation.

    torch generates its GPU kernels with Triton, so `auto` requires that as well.
    """
    if train.compile == "auto":
        return "default" if trains_on_gpu(train) and find_spec("triton") else None
    return None if train.compile == "none" else train.compile


@contextmanager
def tf32_beside_bf16(train: TrainSettings) -> Iterator[None]:
    """Within the block, whatever autocast leaves in float32 (DINO's prototypes) uses TF32, still finer than bf16."""
    before = torch.get_float32_matmul_precision()
    if trains_on_gpu(train) and precision_of(train) == "bf16":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gpu_memory(devices: int = 1) -> int:
    """Bytes of the smallest of the first GPUs of this machine; 0 if there is none."""
    here = range(min(devices, torch.cuda.device_count() if torch.cuda.is_available() else 0))
    return min((int(torch.cuda.get_device_properties(number).total_memory) for number in here), default=0)


def cpu_memory(processes: int = 1) -> int:
    """Bytes of main memory that one process may use; 0 if they are unknown.

    For one process, this is the memory that is free now, within the limit of its control group (of a container or a
    batch job). Several processes must each arrive at the same number, so they get equal parts of half of all memory.

    Args:
        processes: Number of processes of the run on this machine.
    """
    known = {}
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    total, free = known.get("MemTotal", 0), known.get("MemAvailable", 0)
    if not total:
        with suppress(OSError, ValueError, AttributeError):  # not Linux
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = free or total // 2
    for limit, used in _group_limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return free if processes == 1 else total // (2 * processes)


def _group_limits() -> list[tuple[int, int]]:
    """Memory limit and usage of this process's control groups that have a limit; file caches are not counted."""
    groups = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    with suppress(OSError, IndexError):
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for _, kinds, path in lines:
            if kinds in ("", "memory"):
                root = groups["memory" in kinds]
                group = root / path.lstrip("/")  # of a job's step; the job's own, which may have the limit, is above it
                groups += [one for one in (group, *group.parents) if one.is_relative_to(root)]
    found = []
    for group in dict.fromkeys(groups):
        for limit, used, cached in GROUP_FILES:
            with suppress(OSError, ValueError):  # ValueError: "max"
                most, now = int((group / limit).read_text()), int((group / used).read_text())
                stat = (group / "memory.stat").read_text().splitlines()
                now -= sum(int(line.removeprefix(cached)) for line in stat if line.startswith(cached))
                found.append((most, now))
    return found


@functools.cache
def cpu_flops(width: int, precision: str, seconds: float = 0.5) -> float:
    """FLOP/s of a transformer's MLP, forward and backward, on this machine's CPU with torch's number of threads.

    Matrix products alone would promise several times as much on a CPU with bf16 units, which only they can use.

    Args:
        width: Width of the tokens.
        precision: float32, bf16 or float64.
        seconds: Duration of the measurement, after a first pass.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        tokens = torch.randn(MEASURED_TOKENS, width, dtype=dtype, requires_grad=True)
    layers.to(dtype)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            result = tokens + layers(tokens)
        result.sum().backward()

    run()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        run()
        count += 1
    return 3 * 16.0 * MEASURED_TOKENS * width**2 * count / elapsed
