"""512 colours: 3 bits each of red, green and blue, or any list of colours; nearest colour and back.

iGPT (Chen et al. 2020), section 3.2: a 9-bit palette keeps the sequence short. Colours live in [-1, 1].
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def uniform_palette() -> Float[Tensor, "colours 3"]:
    """The centres of 8 x 8 x 8 equal boxes; colour r * 64 + g * 8 + b holds the bytes v with v // 32 = (r, g, b)."""
    levels = (torch.arange(8, dtype=torch.float64) * 32 + 15.5) / 127.5 - 1
    return torch.cartesian_prod(levels, levels, levels).float()


def nearest_colour(images: Float[Tensor, "b c h w"], palette: Float[Tensor, "colours c"]) -> Int[Tensor, "b h w"]:
    """Index of the nearest colour by squared distance; the lowest index on ties.

    Args:
        images: colours in [-1, 1].
        palette: colours in [-1, 1].
    """
    pixels = rearrange(images, "b c h w -> (b h w) c").float()
    # |x - c|^2 without |x|^2, which no choice of colour changes
    distance = (palette * palette).sum(1) - 2 * pixels @ palette.T
    return distance.argmin(1).view(images.shape[0], *images.shape[2:])


def colours_of(indices: Int[Tensor, "b h w"], palette: Float[Tensor, "colours c"]) -> Float[Tensor, "b c h w"]:
    """The palette's colours at the given indices, in [-1, 1]."""
    return rearrange(palette[indices], "b h w c -> b c h w")
