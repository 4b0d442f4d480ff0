"""Masked autoencoder (He et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslvit.settings.choices import checked
from sslvit.settings.task import TaskSettings


@dataclass
@checked("task.")
class MAESettings(TaskSettings):
    """Reconstruct hidden patches from a few visible ones.

    Args:
        name: which task these settings are for.
        mask_ratio: share of patches hidden from the encoder.
        target: normalized (each patch by its own mean and variance) or raw pixels.
        decoder_width: channels of a decoder token.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        decoder_mlp_ratio: hidden width of the decoder's MLPs over its width; null for encoder.mlp_ratio, as in the
            paper's code.
    """

    name: Literal["mae"] = "mae"
    mask_ratio: float = 0.75
    target: Literal["normalized", "raw"] = "normalized"
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_ratio: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task.mask_ratio: {self.mask_ratio} is not between 0 and 1 (a usual one is 0.75).")
        for key in ("decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp_ratio"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"task.{key}: {getattr(self, key)} is not above zero.")
        if self.decoder_width % 4:
            raise ValueError(f"task.decoder_width: positions need a multiple of 4, not {self.decoder_width}.")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"task.decoder_heads: {self.decoder_heads} heads do not divide decoder width {self.decoder_width}."
            )
