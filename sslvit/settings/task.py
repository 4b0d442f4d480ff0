"""What the settings of every pretext task share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self


@dataclass(frozen=True)
class Usual:
    """What nulls of batch, length and learning rate stand for, before they are fitted to data set and machine.

    Args:
        batch: Most images per optimizer step.
        epochs: Passes over a data set of ImageNet's size or less.
        images: Most images that a run sees in all its passes.
        base_lr: Learning rate at a batch size of 256 where the batch is the largest.
    """

    batch: int
    epochs: float
    images: float
    base_lr: float

    def base_lr_at(self, global_batch_size: int) -> float:
        """The base learning rate with which the peak grows like the square root of the batch size.

        That is the rule for adaptive optimizers (Malladi et al. 2022): a linear one leaves a small batch, as a small
        data set has, with steps too short to learn from.
        """
        return float(f"{self.base_lr * math.sqrt(self.batch / global_batch_size):.3g}")


class TaskSettings:
    """Base of a task's settings."""

    name: str
    usual: ClassVar[Usual] = Usual(batch=256, epochs=100, images=1.28e8, base_lr=5e-4)

    def fitted(self, images: int, global_batch_size: int, total_steps: int, classes: int | None = None) -> Self:
        """The same with every null replaced by what suits the job; here there are none."""
        return self

    def check_micro_batch(self, micro: int) -> None:
        """Raise ValueError where a task needs more images side by side."""

    def remedy(self, sign: str, rate: str) -> str:
        """Which setting to change when training has failed.

        Args:
            sign: Name of the symptom: even (all prototypes alike) or one prototype (tasks/dino.py).
            rate: Key and value of the learning rate, in words.
        """
        return f"Lower {rate}, or raise data.global_batch_size."
