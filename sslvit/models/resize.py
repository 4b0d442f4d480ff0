"""Adapt weights to another image size, patch size or number of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslvit.models.positions import interpolate, resample_table, table_on_grid
from sslvit.settings import EncoderSettings

BIAS_TABLE = ".rel_pos.table"  # in each block, with relative_bias
OF_ANY_GRID = ("none", "rotary_2d_normalized")  # positions that do not depend on the grid


def resize_weights(weights: dict[str, Tensor], old: EncoderSettings, new: EncoderSettings) -> dict[str, Tensor]:
    """Interpolate the position tables to the new image size, once, as MAE and DINO do for fine-tuning.

    On the new grid, the result has the same positions as the old weights.

    Raises:
        ValueError: a pixel sequence with positions for one size only.
    """
    if old.grid == new.grid:
        return weights
    check_resizable(old, new)
    how = (new.interpolate_antialias, new.interpolate_offset)
    if old.pos_embed == "learned_2d":  # interpolation is linear and separable
        (rows, columns), (new_rows, new_columns) = old.grid, new.grid
        by_row = resample_table(weights["pos_embed_row"][:, 0], (rows, 1), (new_rows, 1), *how)
        by_column = resample_table(weights["pos_embed_column"][0], (1, columns), (1, new_columns), *how)
        return weights | {"pos_embed_row": by_row[:, None], "pos_embed_column": by_column[None]}
    if old.pos_embed == "relative_bias":
        offsets = (2 * new.grid[0] - 1, 2 * new.grid[1] - 1)
        tables = {key: value for key, value in weights.items() if key.endswith(BIAS_TABLE)}
        return weights | {key: interpolate(table[None], offsets)[0] for key, table in tables.items()}
    if "pos_embed" not in weights:  # none, or rotary, which is scaled to the range of the grid in the settings
        return weights
    table = table_on_grid(weights["pos_embed"], old.position_rows, old.grid, new.grid, *how)
    return weights | {"pos_embed": torch.cat(table)[None]}


def check_resizable(old: EncoderSettings, new: EncoderSettings) -> None:
    """Raise ValueError unless weights for one size can be used at the other."""
    if old.grid != new.grid and old.has_fixed_size:
        raise ValueError(
            f"encoder.image_size: a pixel sequence with encoder.pos_embed {old.pos_embed} cannot be moved from "
            f"{old.image_size} to {new.image_size} pixels."
        )


def resize_patches(weight: Float[Tensor, "d c p p"], patch: int) -> Float[Tensor, "d c q q"]:
    """Resize the patch embedding to another patch size (FlexiViT, Beyer et al. 2023, section 3.4).

    With larger patches, an image that is enlarged with them keeps its tokens; with smaller ones, its tokens are the
    closest that a linear map can give.
    """
    old = weight.shape[-1]
    basis = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    enlarge = F.interpolate(basis, size=(patch, patch), mode="bilinear", antialias=patch < old).flatten(1)  # p*p q*q
    resized = weight.double().flatten(2) @ torch.linalg.pinv(enlarge).T
    return resized.to(weight.dtype).unflatten(2, (patch, patch))


def convert_channels(weight: Float[Tensor, "d c p p"], channels: int) -> Float[Tensor, "d n p p"]:
    """Convert the patch embedding to another number of input channels.

    Every new channel gets the mean over the old ones, scaled so that an image with identical channels keeps its tokens.
    """
    mean = weight.mean(1, keepdim=True) * (weight.shape[1] / channels)
    return mean.expand(-1, channels, -1, -1).contiguous()
