"""Generative pretraining from pixels (Chen et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslvit.settings.choices import checked
from sslvit.settings.task import TaskSettings


@dataclass
@checked("task.")
class IGPTSettings(TaskSettings):
    """Predict the palette color of pixels.

    Args:
        name: which task these settings are for.
        objective: autoregressive (each pixel from those before it, row by row) or bert (hidden pixels from the others;
            needs encoder.causal false and encoder.mask_token true).
        mask_ratio: for bert: share of the pixels that are hidden.
    """

    name: Literal["igpt"] = "igpt"
    objective: Literal["autoregressive", "bert"] = "autoregressive"
    mask_ratio: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task.mask_ratio: {self.mask_ratio} is not between 0 and 1 (the paper's is 0.15).")
