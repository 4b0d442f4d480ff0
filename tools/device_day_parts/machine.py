"""Versions, and the peak rates with which other numbers are compared."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from device_day_parts.common import Day, last_line, median_seconds

PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "triton",
    "einops",
    "timm",
    "numpy",
    "webdataset",
    "simplejpeg",
)
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
ASKED = "name,driver_version,memory.total,clocks.max.sm,power.limit"


def run_part(day: Day) -> None:
    import torch

    day.record(what="versions", **versions(day))
    side = day.pick(8192, 256)
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"), ("TF32", torch.float32, "high"), ("float32", torch.float32, "highest"),
    ):  # fmt: skip
        if day.is_cpu and name == "TF32":
            continue
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=day.device, dtype=dtype) for _ in range(2))
        seconds = median_seconds(day, lambda a=a, b=b: a @ b, day.pick(0.4, 0.05))
        day.record(what=f"matrix product {side}^3, {name}", value=2 * side**3 / seconds / 1e12, unit="TFLOP/s")
    size = day.pick(2**32, 2**22)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=day.device)
    target = torch.empty_like(source)
    seconds = median_seconds(day, lambda: target.copy_(source), day.pick(0.2, 0.05))
    day.record(what="copy on the device, read and written", value=2 * size / seconds / 1e9, unit="GB/s")
    if not day.is_cpu:
        pinned = torch.randint(0, 255, (2**29,), dtype=torch.uint8).pin_memory()
        part = target[: len(pinned)]
        seconds = median_seconds(day, lambda: part.copy_(pinned, non_blocking=True), 0.3)
        day.record(what="pinned memory to the device", value=len(pinned) / seconds / 1e9, unit="GB/s")


def versions(day: Day) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), **processor()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["commit"] = commit()
    if not day.is_cpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "card_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}  # fmt: skip
        try:
            words = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
            found["nvidia_smi"] = subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found["nvidia_smi"] = last_line(error)
    return found


def processor() -> dict[str, str]:
    """The CPU's name and its relevant instruction sets, from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"cpu": platform.processor(), "cpu_flags": ""}
    lines = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {"cpu": fields.get("model name", platform.machine()), "cpu_flags": " ".join(f for f in FLAGS if f in flags)}


def commit() -> str | None:
    """The checkout's commit; None for a copy without history."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
