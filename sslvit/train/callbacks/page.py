"""The page of a run while it runs."""

from __future__ import annotations

import logging
import time

import pytorch_lightning as pl

from sslvit.tasks.base import Task
from sslvit.train.callbacks.base import StepCallback
from sslvit.train.folder import RunFolder
from sslvit.train.report import write_report

logger = logging.getLogger(__name__)

SECONDS = 180.0  # between two pages


class Page(StepCallback):
    """Writes report.html anew every few minutes, when a line of metrics.jsonl has been written.

    Args:
        folder: The run's folder.
        every: Steps between two lines.
    """

    def __init__(self, folder: RunFolder, every: int) -> None:
        self.folder, self.every = folder, every
        self.written = time.monotonic()

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        """Write the page when it is due."""
        if self.step % self.every or not trainer.is_global_zero or time.monotonic() - self.written < SECONDS:
            return
        try:
            write_report([self.folder])
        except (OSError, ValueError) as error:  # a run does not end for it
            logger.warning(f"report.html: not written ({error})")
        self.written = time.monotonic()
