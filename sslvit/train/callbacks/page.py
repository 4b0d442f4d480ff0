"""The report page of a run during training."""

from __future__ import annotations

import time

import pytorch_lightning as pl

from sslvit.stopping import Interrupted, Preempted
from sslvit.tasks.base import Task
from sslvit.train.callbacks.base import StepCallback
from sslvit.train.folder import RunFolder
from sslvit.train.report import write_own_report

SECONDS = 180.0  # between two pages, at least
MAX_FRACTION = 0.02  # of the time may be spent on writing pages


class Page(StepCallback):
    """Rewrites report.html every few minutes, after a line of metrics.jsonl has been written, and when the run fails.

    Args:
        folder: The run's folder.
        every: Steps between two lines.
    """

    def __init__(self, folder: RunFolder, every: int) -> None:
        self.folder, self.every = folder, every
        self.due = time.monotonic() + SECONDS

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        """Write the page when it is due."""
        start = time.monotonic()
        if self.step % self.every or not trainer.is_global_zero or start < self.due:
            return
        write_own_report(self.folder)
        now = time.monotonic()
        self.due = now + max(SECONDS, (now - start) / MAX_FRACTION)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Write the page of a run that fails or is interrupted; a preempted one has no time for it."""
        is_preempted = isinstance(exception, Preempted) and not isinstance(exception, Interrupted)
        if trainer.is_global_zero and not is_preempted:
            write_own_report(self.folder, state="stopped")
