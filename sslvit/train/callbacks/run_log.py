"""Writes records as lines of metrics.jsonl and of the terminal."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from itertools import pairwise

import pytorch_lightning as pl
import torch

from sslvit.data.loader import Resolutions
from sslvit.progress import Bar, shows_bars, time_left
from sslvit.results import decimals
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.tasks.base import Task
from sslvit.train.callbacks.base import StepCallback, mean_over_ranks
from sslvit.train.folder import RunFolder, append_lines
from sslvit.train.timing import Clock

logger = logging.getLogger(__name__)

MUCH_WAITING = 0.1  # fraction of a step, from which on waiting for data is shown


class RunLog(StepCallback):
    """Appends a line to metrics.jsonl when one is due, and shows the run's progress.

    Args:
        folder: The run's folder.
        run: Turns steps into epochs and images.
        every: Steps between two lines.
        clock: Measures where the time goes.
        mfu_per_throughput: Fraction of the devices' peak that one image per second uses (MFU); None if it is unknown.
        work: How much work a number of steps is, of which the remaining time is told.
    """

    def __init__(
        self, folder: RunFolder, run: RunPlan, every: int, clock: Clock,
        mfu_per_throughput: float | None = None, work: Callable[[int], float] = float,
    ) -> None:  # fmt: skip
        self.folder, self.run, self.total_steps, self.every = folder, run, run.total_steps, every
        self.clock, self.mfu_per_throughput, self.work = clock, mfu_per_throughput, work
        self.bar: Bar | None = None
        self.note = ""  # shown after the bar
        self.earlier_seconds = 0.0  # of training before the checkpoint that this process resumed from

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Cut metrics.jsonl back to the checkpoint's step, and start the clock."""
        super().on_train_start(trainer, module)
        self.start = self.last = time.monotonic()
        self.first_step = self.last_step = self.step
        if trainer.is_global_zero:
            self.folder.cut_metrics(self.step)
            if shows_bars():
                self.bar = Bar("training", self.total_steps, "steps", self.step, self.start, self.work)
                self.bar.draw(self.step)

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        """Write a line when one is due."""
        if self.bar is not None:
            self.bar.draw(self.step, self.note)
        if self.step % self.every and self.step != self.total_steps:
            return
        line = {name: float(mean_over_ranks(trainer, values)) for name, values in module.records.items()}
        done, self.last_step = self.step - self.last_step, self.step  # updated on every rank
        seconds = self.clock.pop()
        times = torch.tensor([value / done for value in seconds.values()], dtype=torch.float64)
        means = mean_over_ranks(trainer, [times]).tolist()
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        line = {"step": self.step, "epoch": self.step / self.run.steps_per_epoch, **line}
        line["time/images_per_second"] = done * self.run.global_batch_size / (now - self.last)
        if self.mfu_per_throughput is not None:
            line["time/mfu"] = line["time/images_per_second"] * self.mfu_per_throughput
        line |= {f"time/{phase}": value for phase, value in zip(seconds, means, strict=True)}
        line["time/elapsed"] = self.elapsed(now)
        append_lines(self.folder.metrics, [line])
        numbers = {name: value for name, value in line.items() if name not in (*module.records, "step")}
        if self.step % self.every:  # after the last step Lightning sends the task's records only if they are due
            numbers |= {name: line[name] for name in module.records}
        for tracker in trainer.loggers:
            tracker.log_metrics(numbers, step=self.step)
        self.last = now
        self._show(line)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the progress bar."""
        self.on_train_end(trainer, module)

    def elapsed(self, now: float) -> float:
        """Seconds of training up to a moment, over all processes that have continued the run."""
        return self.earlier_seconds + now - self.start

    def state_dict(self) -> dict[str, float]:
        """Seconds of training so far."""
        return {"elapsed_seconds": self.elapsed(time.monotonic())}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the seconds of the checkpoint."""
        self.earlier_seconds = state["elapsed_seconds"]

    def _show(self, line: dict[str, float]) -> None:
        loss, speed = line.get("train/loss", float("nan")), line["time/images_per_second"]
        bits = f" ({decimals(line['train/bits'])} bits)" if "train/bits" in line else ""
        waiting = line["time/data"] * speed / self.run.global_batch_size
        mfu = f", MFU {line['time/mfu']:.0%}" if "time/mfu" in line else ""
        pace = f"{speed:,.0f} images/s{mfu}" + (f", {waiting:.0%} waiting for data" if waiting > MUCH_WAITING else "")
        if self.bar is not None:
            self.note = f"loss {decimals(loss)}{bits}, {pace}"
            return
        left = time_left(self.start, self.last, self.first_step, self.step, self.total_steps, self.work)
        logger.info("  ".join([f"step {self.step}/{self.total_steps}", f"epoch {line['epoch']:.1f}",
                               f"loss {decimals(loss)}{bits}", pace, *left]))  # fmt: skip


def work_of(settings: RunSettings, run: RunPlan) -> Callable[[int], float]:
    """How much work a run's first steps are: their number, or about their FLOPs if the images grow.

    They do with `data.resolution_fractions`. A block takes 24 t d^2 + 4 t^2 d FLOPs for t tokens of width d.
    """
    resolutions, encoder = Resolutions.of(settings.data, run), settings.encoder
    if resolutions is None or resolutions.ends is None:
        return float
    tokens = [math.prod(encoder.grid_of(side, side)) for side in resolutions.sides]
    parts = list(
        zip([count * (6 * encoder.width + count) for count in tokens], pairwise([0, *resolutions.ends]), strict=True)
    )
    return lambda steps: float(sum(flops * (min(max(steps, start), end) - start) for flops, (start, end) in parts))
