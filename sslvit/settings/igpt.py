"""Generative pretraining from pixels (Chen et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sslvit.settings.choices import checked
from sslvit.settings.task import TaskSettings, Usual


@dataclass
@checked("task.")
class IGPTSettings(TaskSettings):
    """Predict the palette color of pixels."""

    # the paper's million steps of 128 images; the rate of igpt/small_cifar10
    usual: ClassVar[Usual] = Usual(batch=128, epochs=100, images=1.28e8, base_lr=2e-3)
    name: Literal["igpt"] = "igpt"
    """Name of the task."""
    objective: Literal["autoregressive", "bert"] = "autoregressive"
    """Objective: autoregressive (each pixel from those before it, row by row) or bert (masked pixels from the others;
    needs encoder.causal false and encoder.mask_token true).
    """
    mask_ratio: float = 0.15
    """Fraction of pixels that the bert objective masks."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task.mask_ratio: {self.mask_ratio} must be in (0, 1) (the paper's is 0.15).")
