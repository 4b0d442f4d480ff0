"""Weights for one image size -> the same weights for another."""

from __future__ import annotations

import torch
from torch import Tensor

from sslvit.models.positions import table_on_grid
from sslvit.settings import EncoderSettings

TABLES = ("learned_1d", "sincos_1d", "sincos_2d")


def resize_weights(weights: dict[str, Tensor], old: EncoderSettings, new: EncoderSettings) -> dict[str, Tensor]:
    """Weights whose position table fits the new image size, interpolated once (MAE and DINO fine-tune so).

    Raises:
        ValueError: positions that cannot be interpolated, or a pixel sequence, which is tied to its size.
    """
    if old.grid == new.grid or old.pos_embed == "none":
        return weights
    check_resizable(old, new)
    rows = table_on_grid(
        weights["pos_embed"], old.position_rows, old.grid, new.grid, new.interpolate_antialias, new.interpolate_offset
    )
    return weights | {"pos_embed": torch.cat(rows)[None]}


def check_resizable(old: EncoderSettings, new: EncoderSettings) -> None:
    """Raise ValueError unless weights for one size can be used at the other."""
    is_same = old.grid == new.grid or (old.pos_embed == "none" and old.tokens != "pixel")
    if not is_same and (old.pos_embed not in TABLES or old.tokens == "pixel"):
        what = "a pixel sequence" if old.tokens == "pixel" else f"{old.pos_embed} positions"
        raise ValueError(
            f"encoder.image_size: {what} cannot be moved from {old.image_size} to {new.image_size} pixels."
        )
