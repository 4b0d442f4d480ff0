"""Marks of a run's clock around each micro-batch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from sslvit.train.timing import Clock


class StepTimes(pl.Callback):
    """Marks the moments of each micro-batch; the first of the callbacks, so that what others do is not the optimizer's.

    Args:
        clock: gets them.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self.clock.is_gpu = trainer.strategy.root_device.type == "cuda"
        self.clock.mark("start")

    def on_train_batch_start(self, *_: Any) -> None:
        """The batch is here."""
        self.clock.mark("data")

    def on_before_backward(self, *_: Any) -> None:
        """The forward pass is done."""
        self.clock.mark("forward")

    def on_after_backward(self, *_: Any) -> None:
        """The backward pass, and with several ranks the exchange, is done."""
        self.clock.mark("communication" if self.clock.is_exchanging else "backward")
        self.clock.is_exchanging = False

    def on_train_batch_end(self, *_: Any) -> None:
        """The optimizer has moved the weights."""
        self.clock.mark("optimizer")


class WaitForData(pl.Callback):
    """The last of the callbacks: from here on the next batch is waited for.

    Args:
        clock: gets the moment.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        """All other callbacks are done."""
        self.clock.mark("callbacks")
