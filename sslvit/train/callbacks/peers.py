"""After each step, checks that all ranks are still there and whether any was told to stop.

The ranks exchange a flag over gloo, from CPU to CPU, once a step's kernels are queued and before anything waits for the
device. A kernel that exchanges gradients never ends when its peer is gone, and a process that waits for it can only
be aborted; the exchange fails at once instead, with an error that ends the run in one line (train/run.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection
from datetime import timedelta
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed

from sslvit.progress import leave_bars
from sslvit.ranks import is_distributed
from sslvit.stopping import (
    CTRL_C,
    SIGNALS,
    end_at_next_ctrl_c,
    hears_ctrl_c,
    is_first_process,
    note_signal,
    received_signal,
)
from sslvit.tasks.base import Task
from sslvit.train.callbacks.base import StepCallback
from sslvit.train.folder import RunFolder

PAUSE_SECONDS = 0.0005  # between two checks of a device that lags behind
ENDING = b"interrupted: this step is finished and a checkpoint written; another Ctrl-C ends at once, without one\n"


class Peers(StepCallback):
    """Exchanges signals and signs of life with the other ranks, and does the waiting for the device.

    A rank may also be lost while the others' devices still work on its last step. So while a device lags behind, the
    ranks repeat the exchange until the step before is done, or this step if callbacks are going to wait for it.

    Args:
        folder: The run's folder.
        waits_every: Callbacks wait for the device at every multiple of these numbers of steps.
        total_steps: Number of optimizer steps in the run; after the last one callbacks wait, too.
        timeout_seconds: How long to wait for the other ranks.
        data: Fingerprint of the data on this rank, in hexadecimal digits.
    """

    def __init__(
        self, folder: RunFolder, waits_every: Collection[int], total_steps: int, timeout_seconds: float,
        data: str = "0",
    ) -> None:  # fmt: skip
        self.folder, self.waits_every, self.total_steps = folder, waits_every, total_steps
        self.timeout_seconds, self.data = timeout_seconds, data
        self.received: str | None = None  # the signal that this rank received
        self.is_stopping = False  # whether any rank received one
        self.is_interrupted = False  # whether it was a Ctrl-C
        self.group: Any = None
        self.queued: torch.cuda.Event | None = None  # event in the device's stream after the last step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen for signals from here on."""
        super().on_train_start(trainer, module)
        if is_distributed():
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_seconds))
            assert isinstance(module, Task)
            self.check_alike(module.run.images_per_pass)
        self.received = received_signal()  # sent during preparation, where a library may have swallowed it
        if threading.current_thread() is threading.main_thread():
            # replaces Lightning's handlers, which would stop without a checkpoint
            for number in (*SIGNALS, CTRL_C) if hears_ctrl_c() else SIGNALS:
                signal.signal(number, self.on_signal)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End the group's threads: one that still runs when the interpreter exits may abort the process."""
        if self.group is not None:
            distributed.destroy_process_group(self.group)
            self.group = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """End the group's threads, as after the last step."""
        self.on_train_end(trainer, module)

    def check_alike(self, micro_batch_size: int) -> None:
        """Refuse ranks whose steps would differ.

        They resume from different checkpoints if one of them reads a damaged file, take different micro-batches if
        `auto` finds different GPUs on their machines, and have different data if a script makes another data set on
        each.

        Args:
            micro_batch_size: Images per forward pass on this rank.

        Raises:
            RuntimeError: the ranks differ.
        """
        data = int(self.data[:15], 16)  # 60 bits, which fit into int64
        numbers = torch.tensor([self.step, -self.step, micro_batch_size, -micro_batch_size, data, -data])
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self.group)
        last, first, largest, smallest, *data_of_ranks = (abs(number) for number in numbers.tolist())
        if first != last:
            raise RuntimeError(
                f"{self.folder.checkpoint}: ranks would go on from steps {first} to {last}, so not all of them can "
                "read the same checkpoint. See what each says, and check the disk that they share."
            )
        if len(set(data_of_ranks)) > 1:
            raise RuntimeError(
                "the ranks have other data: each must be given the same images in the same order. See that the script "
                "that makes the data set, or the folder on each machine, gives every process the same."
            )
        if smallest != largest:
            raise RuntimeError(
                f"train.micro_batch_size: auto chose {largest} images on one rank and {smallest} on another, whose GPU "
                f"has less memory. Set it to {smallest}."
            )

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; nothing else happens before the step's end."""
        self.received = note_signal(number)
        if number == CTRL_C:
            end_at_next_ctrl_c()
            if is_first_process():
                leave_bars()
                os.write(2, ENDING)  # the signal may have interrupted a print

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Learn whether to stop, and wait for the devices of all ranks if callbacks are going to.

        Raises:
            RuntimeError: a rank is gone, or its device has not finished in time.
        """
        if self.group is None:
            self.is_stopping, self.is_interrupted = self.received is not None, self.received == CTRL_C.name
            return
        before, self.queued = self.queued, _end_of_queue(trainer.strategy.root_device)
        urgency = self.highest((self.received is not None) + (self.received == CTRL_C.name))
        self.is_stopping, self.is_interrupted = urgency > 0, urgency > 1
        callbacks_wait = any(self.step % every == 0 for every in self.waits_every) or self.step == self.total_steps
        self.wait_for(self.queued if callbacks_wait or self.is_stopping else before)

    def highest(self, number: int) -> int:
        """The maximum of a small number over all ranks."""
        numbers = torch.tensor([number], dtype=torch.uint8)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self.group)
        return int(numbers)

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Repeat the exchange until the devices of all ranks have passed the event."""
        deadline = time.monotonic() + self.timeout_seconds
        while event is not None and self.highest(not event.query()):
            if time.monotonic() > deadline:  # all ranks answer, but their devices do not finish
                raise distributed.DistBackendError(f"timed out: the devices have not done step {self.step}")
            time.sleep(PAUSE_SECONDS)


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """An event after all work queued on a GPU; None for a CPU, which has no queue."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
