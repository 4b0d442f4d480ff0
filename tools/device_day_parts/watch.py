"""A callback that times the steps of a run, then finds where the host waits for the device, then profiles a step."""

from __future__ import annotations

import re
import statistics
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from device_day_parts.common import Day, last_line, synchronize

WARMUP = 4  # steps, the first of which compiles
TIMED_SECONDS = 2.0
MIN_TIMED, MAX_TIMED = 5, 200  # steps
LOG_EVERY = 10  # steps; waits are counted over this many steps, one of which logs
TOP = 12  # kernels to list


class Finished(Exception):
    """Everything has been measured."""


class Watch(pl.Callback):
    """Measures a run, stores the results in `found`, and raises Finished.

    Args:
        day: The part.
        wait_for_turn: Called before the first step (False) and before the first timed one (True).
    """

    def __init__(self, day: Day, wait_for_turn: Callable[[bool], None]) -> None:
        self.day, self.wait_for_turn = day, wait_for_turn
        self.steps, self.timed = 0, 0
        self.marks: list[tuple[str, Any]] = []
        self.is_timing = self.is_profiling = False
        self.found: dict[str, Any] = {}
        self.waits = Waits(day)
        activity = ProfilerActivity.CPU if day.is_cpu else ProfilerActivity.CUDA
        self.profiler = profile(activities=[activity])

    def on_train_start(self, *_: Any) -> None:
        self.wait_for_turn(False)
        self.started = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.mark("between steps")

    def on_before_backward(self, *_: Any) -> None:
        self.mark("forward")

    def on_after_backward(self, *_: Any) -> None:
        self.mark("backward")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.mark("optimizer")
        self.steps += 1
        timed_until = WARMUP + self.timed
        if self.steps == 1:
            self.found["first_step_seconds"] = self.clock() - self.started
        elif self.steps == WARMUP - 1:
            self.started = self.clock()
        elif self.steps == WARMUP:
            self.begin_timing(self.clock() - self.started)
        elif self.steps == timed_until:
            self.end_timing()
            self.waits.start()
        elif timed_until < self.steps <= timed_until + LOG_EVERY:
            self.waits.end_step(has_logged=trainer.global_step % LOG_EVERY == 0)
            if self.steps == timed_until + LOG_EVERY:
                self.found["waits"] = self.waits.stop()
        elif self.steps > timed_until and not self.is_profiling and (trainer.global_step + 1) % LOG_EVERY:
            self.is_profiling = True  # the next step, which does not log
            self.profile(self.profiler.start)
        elif self.is_profiling:
            self.profile(self.profiler.stop)
            self.profile(self.add_kernels)
            raise Finished

    def clock(self) -> float:
        """Time in seconds, after waiting for the device."""
        synchronize(self.day)
        return time.perf_counter()

    def mark(self, ended: str) -> None:
        if not self.is_timing:
            return
        now: Any = time.perf_counter()
        if not self.day.is_cpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((ended, now))

    def begin_timing(self, step_seconds: float) -> None:
        self.wait_for_turn(True)
        wanted = round(self.day.pick(TIMED_SECONDS, 0) / max(step_seconds, 1e-4))
        self.timed = max(MIN_TIMED, min(MAX_TIMED, wanted))
        if not self.day.is_cpu:
            torch.cuda.reset_peak_memory_stats()
        self.is_timing = True
        self.mark("optimizer")

    def end_timing(self) -> None:
        synchronize(self.day)
        self.is_timing = False
        if not self.day.is_cpu:
            self.found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30

        def seconds(a: Any, b: Any) -> float:
            return b - a if self.day.is_cpu else a.elapsed_time(b) / 1000

        split: dict[str, list[float]] = defaultdict(list)
        for (_, a), (ended, b) in pairwise(self.marks):
            split[ended].append(seconds(a, b))
        steps = [seconds(a, b) for a, b in pairwise(at for ended, at in self.marks if ended == "optimizer")]
        self.found |= {"step_seconds": statistics.median(steps), "slowest_step_seconds": max(steps)}
        self.found |= {"timed": len(steps), "split_seconds": {key: statistics.median(of) for key, of in split.items()}}
        self.marks.clear()

    def profile(self, do: Callable[[], None]) -> None:
        """Start, stop or read the profiler; errors are only recorded, since the times are valid without a profile."""
        synchronize(self.day)
        try:
            do()
        except Exception as error:  # such as a driver without access to its counters
            self.found.setdefault("profile_error", last_line(error))

    def add_kernels(self) -> None:
        """Store the number of kernels in a step, and the slowest ones: name, count, milliseconds, share."""
        kind, key = (DeviceType.CUDA, "self_device_time_total")
        if self.day.is_cpu:
            kind, key = (DeviceType.CPU, "self_cpu_time_total")
        rows = [(getattr(row, key) / 1000, row) for row in self.profiler.key_averages() if row.device_type == kind]
        rows.sort(key=lambda pair: -pair[0])
        total = sum(time for time, _ in rows) or 1
        top = [[row.key[:100], row.count, time, time / total] for time, row in rows[:TOP]]
        self.found |= {"kernels": sum(row.count for _, row in rows), "kernel_seconds": total / 1000, "top": top}


class Waits:
    """Counts host waits for the device: file and line -> count, in steps that log and in other steps.

    Args:
        day: The part.
    """

    def __init__(self, day: Day) -> None:
        self.day = day
        self.here: list[str] = []  # of the current step
        self.found: dict[str, dict[str, int]] = defaultdict(lambda: {"logging": 0, "other": 0})

    def start(self) -> None:
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self.note
        if not self.day.is_cpu:
            torch.cuda.set_sync_debug_mode("warn")

    def note(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        """Attribute a warning to the innermost line of the package, or else to the innermost outside this script."""
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if "device_day" not in frame.filename]
        at = next(iter([f for f in reversed(frames) if "/sslvit/" in f.filename] or frames[::-1]), None)
        place = f"{at.filename}:{at.lineno}" if at else f"{filename}:{lineno}"
        self.here.append(re.sub(r".*/(site-packages/|(?=sslvit/))", "", place))

    def end_step(self, has_logged: bool) -> None:
        for place in self.here:
            self.found[place]["logging" if has_logged else "other"] += 1
        self.here.clear()

    def stop(self) -> dict[str, dict[str, int]] | None:
        """Return the counts; None on a CPU, where the host never waits."""
        if not self.day.is_cpu:
            torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        return None if self.day.is_cpu else dict(self.found)
