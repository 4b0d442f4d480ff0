"""Checkpoints at step boundaries."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from sslvit.settings import TrainSettings
from sslvit.train.callbacks.base import StepCallback, save_checkpoint
from sslvit.train.folder import RunFolder


class Checkpoints(StepCallback):
    """Writes checkpoints/last.ckpt every so many optimizer steps and after the last one, and keeps some by their step.

    Args:
        folder: The run's folder.
        settings: how often, and which are kept.
        total_steps: Number of optimizer steps in the run.
    """

    def __init__(self, folder: RunFolder, settings: TrainSettings, total_steps: int) -> None:
        self.folder, self.settings, self.total_steps = folder, settings, total_steps

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Copy what the optimizer has taken over as it was in the checkpoint, which is mapped into memory.

        It would hold a file that is long replaced, and the room that it takes on the disk, to the end of the run.
        """
        super().on_train_start(trainer, module)
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                state |= {name: value.clone() for name, value in state.items() if value.device.type == "cpu"}

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a checkpoint when one is due."""
        is_last = self.step == self.total_steps or trainer.should_stop  # as a callback of the user may decide
        if self.step % self.settings.checkpoint_every and not is_last:
            return
        save_checkpoint(trainer, self.folder.checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell Lightning's counters how many micro-batches the steps done are now.

        They are saved as they were, but a run may go on with other micro-batches, or with more steps than it had.
        """
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in ("total", "current"):
            progress[count] |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
        progress["is_last_batch"] = False
