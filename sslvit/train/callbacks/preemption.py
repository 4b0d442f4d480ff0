"""At a signal to stop: a whole checkpoint at the next step boundary, and an exit that no scheduler takes for a failure.

From the first step on, SIGTERM and SIGUSR1 only set a flag, so a second one changes nothing. After each step the ranks
agree (one of them alone may have received it), the first writes the checkpoint, and all leave together.
"""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed

from sslvit.stopping import SIGNALS, Preempted, note_signal, received_signal
from sslvit.train.callbacks.base import StepCallback, save_checkpoint
from sslvit.train.folder import RunFolder


class Preemption(StepCallback):
    """Stops the run at the next step boundary after a signal.

    Args:
        folder: The run's folder.
        total_steps: Number of optimizer steps in the run; after the last one there is nothing to stop.
        timeout_seconds: How long to wait for the other ranks.
    """

    def __init__(self, folder: RunFolder, total_steps: int, timeout_seconds: float) -> None:
        self.folder, self.total_steps = folder, total_steps
        self.timeout = timedelta(seconds=timeout_seconds)
        self.received: str | None = None
        self.group: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen for signals from here on."""
        super().on_train_start(trainer, module)
        if trainer.world_size > 1:
            # flags lie on the CPU: no device is waited for
            self.group = distributed.new_group(backend="gloo", timeout=self.timeout)
            self.check_same_step()
        self.received = received_signal()  # while all was prepared, where a library may have swallowed it
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # after Lightning's own, which would stop without a checkpoint
                signal.signal(number, self.on_signal)

    def check_same_step(self) -> None:
        """Refuse ranks that go on from different checkpoints, as when one of them reads a damaged file.

        Raises:
            RuntimeError: they do.
        """
        ends = torch.tensor([self.step, -self.step])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=self.group)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            raise RuntimeError(
                f"{self.folder.checkpoint}: ranks would go on from steps {first} to {last}, so not all of them can "
                "read the same checkpoint. See what each says, and check the disk that they share."
            )

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; nothing else happens before the step's end."""
        self.received = note_signal(number)

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a checkpoint and leave, once any rank has received a signal."""
        if not self.is_agreed() or self.step == self.total_steps:
            return
        save_checkpoint(trainer, self.folder.checkpoint, waits=True)
        trainer.strategy.barrier()  # no rank leaves before the checkpoint is whole
        why = f"received {self.received}" if self.received else "another rank received a signal"
        raise Preempted(
            f"stopped at step {self.step} of {self.total_steps}: {why}; the checkpoint is whole: go on with --resume"
        )

    def is_agreed(self) -> bool:
        """Whether any rank has received a signal."""
        if self.group is None:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.uint8)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)
