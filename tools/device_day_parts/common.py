"""Shared by the parts: options, records, the device, and runs prepared as in `sslvit pretrain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Day:
    """One part of one day.

    Attributes:
        part: Name of the part.
        out: Folder of results.jsonl.
        work: Scratch folder that all parts of the day share.
        data: Folder with photographs and CIFAR-10, or None.
        is_cpu: Whether everything runs at tiny sizes on the CPU.
        deadline: Unix time at which the part is stopped.
        item: The item that this process works on, if the part starts a process for each.
    """

    part: str
    out: Path
    work: Path
    data: Path | None
    is_cpu: bool
    deadline: float
    item: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.is_cpu else "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def pick(self, on_gpu: Any, on_cpu: Any) -> Any:
        """Choose the value for this device."""
        return on_cpu if self.is_cpu else on_gpu

    def record(self, **values: Any) -> None:
        """Append one line to results.jsonl; it persists even if the process is killed right afterwards."""
        append_record(self.out / "results.jsonl", {"part": self.part, **values})

    def start(self, item: str) -> subprocess.Popen:
        """Start a process for one item of this part."""
        options = {"out": self.out, "work": self.work, "part": self.part, "item": item, "deadline": self.deadline}
        words = [f"--{key}={value}" for key, value in options.items()]
        words += ["--cpu"] * self.is_cpu + [f"--data={self.data}"] * bool(self.data)
        return subprocess.Popen([sys.executable, str(ROOT / "tools" / "device_day.py"), *words])

    def wait_for(self, *paths: Path, until: float | None = None) -> bool:
        """Wait until all files exist; False if they do not by `until`, or else by the deadline."""
        while time.time() < (until or self.deadline):
            if all(path.exists() for path in paths):
                return True
            time.sleep(0.1)
        return False

    def read(self, part: str) -> list[dict[str, Any]]:
        """The records of a part so far."""
        return [record for record in read_records(self.out / "results.jsonl") if record["part"] == part]


def append_record(path: Path, record: dict[str, Any]) -> None:
    line = (json.dumps(record, default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, line)  # one write, so that lines of several processes do not mix
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_line(error: BaseException) -> str:
    """Format an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def synchronize(day: Day) -> None:
    import torch

    if not day.is_cpu:
        torch.cuda.synchronize()


def median_seconds(day: Day, work: Callable[[], Any], seconds: float = 1.0, warmup: int = 3) -> float:
    """Median duration of a call; on a GPU measured by CUDA events, so that the host can run ahead of the device."""
    import statistics

    import torch

    for _ in range(warmup):
        work()
    synchronize(day)
    start = time.perf_counter()
    work()
    synchronize(day)
    count = max(3, min(200, round(seconds / max(time.perf_counter() - start, 1e-6))))
    if day.is_cpu:
        times = []
        for _ in range(min(count, 5)):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1000


def recipe(day: Day, name: str, shards: Path, out: str, **changes: Any) -> Any:
    """A recipe's settings for this device; on a CPU with the tiny networks of the tests."""
    from run_fixtures import RECIPES

    from sslvit.settings.load import load_recipe

    left = ("train.accelerator", "train.steps", "train.checkpoint_every")
    tiny = {key: value for key, value in RECIPES[f"{name.split('/')[0]}/digits"].items() if key not in left}
    given = {
        "data.shards": str(shards), "out": str(day.work / "runs" / out), "train.accelerator": day.pick("gpu", "cpu"),
        "train.checkpoint_every": 10**6, "train.devices": 1, "train.nodes": 1,
    }  # fmt: skip
    return load_recipe(name, (tiny if day.is_cpu else {}) | given | changes)


class _Done(Exception):
    """Raised to leave a run when its action has ended."""


def in_a_run(settings: Any, action: Callable[..., Any]) -> Any:
    """Call action(fit, trainer, task, data) instead of a run's training loop, and return its result.

    sslvit itself prepares everything before that: the task (compiled or not), Trainer, callbacks and data. `fit` is
    Trainer.fit. The encoder and the figures of a finished run are not written.
    """
    from unittest.mock import patch

    import pytorch_lightning as pl

    from sslvit.train.run import pretrain

    fit, results = pl.Trainer.fit, []

    def stand_in(trainer: pl.Trainer, task: Any, *_: Any, datamodule: Any = None, **__: Any) -> None:
        results.append(action(fit, trainer, task, datamodule))
        raise _Done

    with patch.object(pl.Trainer, "fit", stand_in):
        try:
            pretrain(settings, overwrite=True)
        except _Done:
            return results[0]
    raise RuntimeError("sslvit.train.run.pretrain no longer trains by Trainer.fit.")


def pack_noise(folder: Path, count: int, side: int, classes: int = 10) -> Path:
    """Pack small shards of random images, each class with its own mean color."""
    import numpy as np

    from sslvit.data.array_images import array_samples
    from sslvit.data.pack import pack

    if not folder.exists():
        source = np.random.default_rng(0)
        labels = np.arange(count) % classes
        tints = source.integers(0, 128, (classes, 1, 1, 3))
        images = (source.integers(0, 128, (count, side, side, 3)) + tints[labels]).astype(np.uint8)
        pack(array_samples(images, labels), folder, [str(name) for name in range(classes)], workers=1)
    return folder
