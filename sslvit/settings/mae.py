"""Masked autoencoder (He et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sslvit.settings.choices import check_bounds, checked
from sslvit.settings.task import TaskSettings, Usual


@dataclass
@checked("task.")
class MAESettings(TaskSettings):
    """Reconstruct hidden patches from a few visible ones."""

    # the paper's 800 epochs of ImageNet; its peak of 2.4e-3 at a batch of 4096, by the square root
    usual: ClassVar[Usual] = Usual(batch=1024, epochs=800, images=1.03e9, base_lr=3e-4)
    name: Literal["mae"] = "mae"
    """Name of the task."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder."""
    target: Literal["normalized", "raw"] = "normalized"
    """Reconstruction target: normalized (each patch by its own mean and variance) or raw pixels."""
    decoder_width: int = 512
    """Embedding dimension of the decoder."""
    decoder_depth: int = 8
    """Number of blocks in the decoder."""
    decoder_heads: int = 16
    """Number of attention heads in the decoder."""
    decoder_mlp_ratio: float | None = None
    """Hidden width of the decoder's MLPs over its width; null for encoder.mlp_ratio, as in the paper's code."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task.mask_ratio: {self.mask_ratio} must be in (0, 1) (the paper's is 0.75).")
        check_bounds(self, "task.", "positive", "decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp_ratio")
        if self.decoder_width % 4:
            raise ValueError(f"task.decoder_width: positions need a multiple of 4, not {self.decoder_width}.")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"task.decoder_heads: {self.decoder_heads} heads do not divide decoder width {self.decoder_width}."
            )
