"""Where the time of a step goes: data, forward, backward, communication, optimiser.

On a GPU the moments are events in its stream, read when a line of metrics.jsonl is due, so no step waits for them.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

PARTS = ("data", "forward", "backward", "communication", "optimiser")


class Clock:
    """Moments of a run, each named by what has just ended."""

    def __init__(self) -> None:
        self.is_gpu = False
        self.moments: list[tuple[str, Any]] = []
        self.is_exchanging = False  # gradients are complete here, and the ranks exchange the last of them

    def mark(self, ended: str) -> None:
        now: Any = time.perf_counter()
        if self.is_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.moments.append((ended, now))

    def mark_gradients(self, state, bucket):  # torch compares annotations with its types, and here they are strings
        """Averages gradients over ranks as DDP does, and notes when the last of them are ready to be sent.

        What comes after that in the backward pass is communication that no computation hides.
        """
        if bucket.is_last():
            self.mark("backward")
            self.is_exchanging = True
        return allreduce_hook(distributed.group.WORLD, bucket)

    def take(self) -> dict[str, float]:
        """Seconds since the last call by what they went into; there may be others."""
        if self.is_gpu and self.moments:
            self.moments[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, start), (ended, stop) in zip(self.moments, self.moments[1:], strict=False):
            passed = start.elapsed_time(stop) / 1000 if self.is_gpu else stop - start
            seconds[ended] = seconds.get(ended, 0.0) + passed
        self.moments = self.moments[-1:]
        return {part: seconds[part] for part in PARTS}


class StepTimes(pl.Callback):
    """Marks the moments of each micro-batch; the first of the callbacks, so that what others do is not the optimiser's.

    Args:
        clock: gets them.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.clock.is_gpu = trainer.strategy.root_device.type == "cuda"
        self.clock.mark("start")

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.mark("data")

    def on_before_backward(self, *_: Any) -> None:
        self.clock.mark("forward")

    def on_after_backward(self, *_: Any) -> None:
        self.clock.mark("communication" if self.clock.is_exchanging else "backward")
        self.clock.is_exchanging = False

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.mark("optimiser")


class WaitForData(pl.Callback):
    """The last of the callbacks: from here on the next batch is waited for.

    Args:
        clock: gets the moment.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.mark("callbacks")
