"""Imports everything once, and records missing packages."""

from __future__ import annotations

import time
from importlib import import_module

from device_day_parts.common import Day

NEEDED = ("torch", "torchvision", "pytorch_lightning", "einops", "jaxtyping", "webdataset", "braceexpand",
          "simplejpeg", "filelock", "fsspec", "safetensors", "yaml", "scipy", "sklearn", "matplotlib", "pytest",
          "beartype", "sslvit.cli", "sslvit.train.run", "sslvit.evaluate.probe")  # fmt: skip


def run_part(day: Day) -> None:
    seconds, missing = {}, []
    for name in NEEDED:
        start = time.perf_counter()
        try:
            import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
        seconds[name] = time.perf_counter() - start
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:5]
    day.record(missing=missing, slowest={name: seconds[name] for name in slowest})
    import torch

    if not day.is_cpu and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here. With --cpu the same parts run at tiny sizes.")
