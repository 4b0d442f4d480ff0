"""Weights for one image size, patch size or number of channels -> the same weights for another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
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


def resize_patches(weight: Float[Tensor, "d c p p"], patch: int) -> Float[Tensor, "d c q q"]:
    """The patch embedding for patches of another size (FlexiViT, Beyer et al. 2023, section 3.4).

    Where patches grow, an image that is enlarged with them has the tokens that it had before; where they shrink, the
    tokens are the nearest ones that a linear map can give.
    """
    old = weight.shape[-1]
    basis = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    enlarge = F.interpolate(basis, size=(patch, patch), mode="bilinear", antialias=patch < old).flatten(1)  # p*p q*q
    resized = weight.double().flatten(2) @ torch.linalg.pinv(enlarge).T
    return resized.to(weight.dtype).unflatten(2, (patch, patch))


def convert_channels(weight: Float[Tensor, "d c p p"], channels: int) -> Float[Tensor, "d n p p"]:
    """The patch embedding for images of another number of channels.

    Every new channel gets the mean over the old ones, scaled so that an image whose channels are all alike keeps its
    tokens.
    """
    mean = weight.mean(1, keepdim=True) * (weight.shape[1] / channels)
    return mean.expand(-1, channels, -1, -1).contiguous()
