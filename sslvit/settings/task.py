"""What the settings of every pretext task share."""

from __future__ import annotations

from typing import Self


class TaskSettings:
    """Base of a task's settings."""

    name: str

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
