"""Checkpoints at step boundaries."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from sslvit.settings import TrainSettings
from sslvit.train.callbacks.base import StepCallback, save_checkpoint
from sslvit.train.callbacks.peers import Peers
from sslvit.train.folder import RunFolder


class Checkpoints(StepCallback):
    """Writes checkpoints/last.ckpt every few optimizer steps and after the last one, and keeps some named by step.

    Args:
        folder: The run's folder.
        settings: How often checkpoints are written, and which are kept.
        total_steps: Number of optimizer steps in the run.
        peers: Knows whether the run is about to stop, which makes this step its last one.
    """

    def __init__(self, folder: RunFolder, settings: TrainSettings, total_steps: int, peers: Peers) -> None:
        self.folder, self.settings, self.total_steps, self.peers = folder, settings, total_steps, peers

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Copy the optimizer state that still lies in the memory-mapped checkpoint.

        Otherwise that file, though long replaced, would keep its disk space until the end of the run.
        """
        super().on_train_start(trainer, module)
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                state |= {name: value.clone() for name, value in state.items() if value.device.type == "cpu"}

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a checkpoint when one is due."""
        # a user's callback or a signal may stop the run
        is_last = self.step == self.total_steps or trainer.should_stop or self.peers.is_stopping
        if self.step % self.settings.checkpoint_every and not is_last:
            return
        save_checkpoint(trainer, self.folder.checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's counters to the number of micro-batches in the finished steps.

        The saved counters may not fit, since a run may resume with other micro-batches or more steps than before.
        """
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in ("total", "current"):
            progress[count] |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
        progress["is_last_batch"] = False
