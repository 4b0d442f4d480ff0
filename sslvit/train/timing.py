"""Where the time of a step goes: data, forward, backward, communication, optimizer.

On a GPU the timestamps are events in its stream, read when a line of metrics.jsonl is due, so no step waits for them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

MAX_TIMESTAMPS = 4096  # kept until a line is due
PHASES = ("data", "forward", "backward", "communication", "optimizer")


class Clock(pl.Callback):
    """Timestamps of a run, each named after the phase that has just ended.

    It is the first callback, so that the time of the others is not counted as the optimizer's; `WaitForData` is the
    last.
    """

    def __init__(self) -> None:
        self.is_gpu = False
        self.timestamps: list[tuple[str, Any]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.is_exchanging = False  # gradients are complete here, and the ranks exchange the last of them

    def mark(self, ended: str) -> None:
        """Note that a phase of the step has just ended."""
        now: Any = time.perf_counter()
        if self.is_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.timestamps.append((ended, now))
        if len(self.timestamps) > MAX_TIMESTAMPS:
            self._add_up(MAX_TIMESTAMPS // 2)  # long past, so this does not wait

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self.is_gpu = trainer.strategy.root_device.type == "cuda"
        self.mark("start")

    def on_train_batch_start(self, *_: Any) -> None:
        """The batch has arrived."""
        self.mark("data")

    def on_before_backward(self, *_: Any) -> None:
        """The forward pass is done."""
        self.mark("forward")

    def on_after_backward(self, *_: Any) -> None:
        """The backward pass, and with several ranks the exchange, is done."""
        self.mark("communication" if self.is_exchanging else "backward")
        self.is_exchanging = False

    def on_train_batch_end(self, *_: Any) -> None:
        """The optimizer has moved the weights."""
        self.mark("optimizer")

    # no annotations: torch compares them with its types, and here they would be strings
    def mark_gradients(self, state, bucket):  # type: ignore[no-untyped-def]
        """Averages gradients over ranks as DDP does, and notes when the last of them are ready to be sent.

        What comes after that in the backward pass is communication that no computation hides.
        """
        if bucket.is_last():
            self.mark("backward")
            self.is_exchanging = True
        return allreduce_hook(distributed.group.WORLD, bucket)  # type: ignore[arg-type]  # there is a group by now

    def pop(self) -> dict[str, float]:
        """Seconds since the last call by phase; time in callbacks is left out."""
        self._add_up(len(self.timestamps))
        taken = {phase: self.seconds[phase] for phase in PHASES}
        self.seconds.clear()
        return taken

    def _add_up(self, count: int) -> None:
        """Add up the oldest timestamps; the last of them begins the next interval."""
        old = self.timestamps[:count]
        if self.is_gpu and old:
            old[-1][1].synchronize()
        for (_, start), (ended, stop) in pairwise(old):
            self.seconds[ended] += start.elapsed_time(stop) / 1000 if self.is_gpu else stop - start
        del self.timestamps[: count - 1]


class WaitForData(pl.Callback):
    """The last callback: the wait for the next batch begins here.

    Args:
        clock: Receives the timestamp.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        """All other callbacks are done."""
        self.clock.mark("callbacks")
