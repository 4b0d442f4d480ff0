"""What the callbacks share: acting once per optimizer step, means over ranks, and saving a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sslvit.data.batch import Batch
from sslvit.train.checkpoint_io import AtomicCheckpointIO


class StepCallback(pl.Callback):
    """A callback that acts once per optimizer step, not per micro-batch."""

    step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin at the Trainer's step."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Call `on_micro_batch`, and `on_step` after the last micro-batch of a step."""
        self.on_micro_batch(trainer, batch)
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.on_step(trainer, module)

    def on_micro_batch(self, trainer: pl.Trainer, batch: Batch) -> None:
        """Called after every micro-batch."""

    def on_step(self, trainer: pl.Trainer, module: Any) -> None:
        """Called after every optimizer step."""

    def before_checkpoint(self, trainer: pl.Trainer) -> None:
        """Called on all ranks before a checkpoint is written, to exchange what it will hold."""


def save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Write a checkpoint of the run; all ranks call it.

    Args:
        trainer: The run's Trainer.
        path: File of the checkpoint.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's property has no type
        if isinstance(callback, StepCallback):
            callback.before_checkpoint(trainer)
    trainer.save_checkpoint(path, weights_only=False)  # includes the optimizer


def wait_for_checkpoint(trainer: pl.Trainer) -> None:
    """Return when this rank's part of the last checkpoint is on disk."""
    io = trainer.strategy.checkpoint_io
    if isinstance(io, AtomicCheckpointIO):
        io.finish()


def mean_over_ranks(trainer: pl.Trainer, values: list[Tensor]) -> Tensor:
    """The mean over micro-batches and ranks; every rank must call this."""
    mean = torch.stack([value.cpu().double() for value in values]).mean(0)
    if trainer.world_size > 1:
        mean = trainer.strategy.reduce(mean.to(trainer.strategy.root_device), reduce_op="mean").cpu()
    return mean
