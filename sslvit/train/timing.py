"""Where the time of a step goes: data, forward, backward, communication, optimizer.

On a GPU the moments are events in its stream, read when a line of metrics.jsonl is due, so no step waits for them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

MAX_TIMESTAMPS = 4096  # kept until a line is due
PARTS = ("data", "forward", "backward", "communication", "optimizer")


class Clock:
    """Moments of a run, each named by what has just ended."""

    def __init__(self) -> None:
        self.is_gpu = False
        self.moments: list[tuple[str, Any]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.is_exchanging = False  # gradients are complete here, and the ranks exchange the last of them

    def mark(self, ended: str) -> None:
        """Note that a part of the step has just ended."""
        now: Any = time.perf_counter()
        if self.is_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.moments.append((ended, now))
        if len(self.moments) > MAX_TIMESTAMPS:
            self._add_up(MAX_TIMESTAMPS // 2)  # long past, so nothing is waited for

    # torch compares annotations with its types, and here they would be strings
    def mark_gradients(self, state, bucket):  # type: ignore[no-untyped-def]
        """Averages gradients over ranks as DDP does, and notes when the last of them are ready to be sent.

        What comes after that in the backward pass is communication that no computation hides.
        """
        if bucket.is_last():
            self.mark("backward")
            self.is_exchanging = True
        return allreduce_hook(distributed.group.WORLD, bucket)  # type: ignore[arg-type]  # there is a group by now

    def take(self) -> dict[str, float]:
        """Seconds since the last call by what they went into; there may be others."""
        self._add_up(len(self.moments))
        taken = {part: self.seconds[part] for part in PARTS}
        self.seconds.clear()
        return taken

    def _add_up(self, count: int) -> None:
        """The oldest moments; the last of them is where the next time begins."""
        old = self.moments[:count]
        if self.is_gpu and old:
            old[-1][1].synchronize()
        for (_, start), (ended, stop) in pairwise(old):
            self.seconds[ended] += start.elapsed_time(stop) / 1000 if self.is_gpu else stop - start
        del self.moments[: count - 1]
