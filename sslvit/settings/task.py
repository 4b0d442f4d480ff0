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
        """Which knob to turn when training has failed; a task with knobs of its own names them.

        The sign is even (all prototypes alike) or one prototype (train/health.py); the rate is its key and value, in
        words.
        """
        return f"Lower {rate}, or raise data.global_batch_size."
