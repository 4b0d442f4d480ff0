"""Where a token is.

Kinds (`encoder.pos_embed`):
    none           no positions: the encoder sees a bag of patches
    learned_1d     one learned row per place
    learned_2d     a learned row per grid row plus one per grid column
    sincos_1d/_2d  fixed sines and cosines (Vaswani et al. 2017; MAE's 2-D table, He et al. 2022, appendix A.1)
    rotary_2d      queries and keys turned by angles that grow along rows and columns (Heo et al. 2024)
    relative_bias  a learned bias w[i - j] per head, added before the softmax (CoAtNet, Dai et al. 2021)

The first four are a table that is added to the tokens and resampled for other grids; rotary coordinates and the
bias table are stretched in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass
class Places:
    """Where the tokens of one forward pass lie.

    Args:
        grid: rows and columns of patches.
        prefix: tokens in front of the patches.
        visible: which patches are present ('b k'); None for all, in order.
        rotation: cosines and sines for rotary_2d, '(b) 1 t e', or None.
    """

    grid: tuple[int, int]
    prefix: int
    visible: Int[Tensor, "b k"] | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def sincos_1d(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sines then cosines of 0 .. length - 1 at geometric frequencies from 1 to 1 / 10,000. float64."""
    frequencies = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def sincos_2d(grid: tuple[int, int], width: int) -> Float[Tensor, "n width"]:
    """First half of the channels says the column, second half the row (MAE's table). float64."""
    rows, columns = grid
    of_row = sincos_1d(rows, width // 2)[:, None].expand(rows, columns, -1)
    of_column = sincos_1d(columns, width // 2)[None].expand(rows, columns, -1)
    return torch.cat([of_column, of_row], 2).flatten(0, 1)


def resample_table(
    table: Float[Tensor, "n d"],
    grid: tuple[int, int],
    to: tuple[int, int],
    antialias: bool = True,
    offset: float = 0.0,
) -> Float[Tensor, "m d"]:
    """Stretch a table of positions from one grid to another, bicubically. The same grid returns it untouched.

    Args:
        table: one row per patch, row by row.
        grid: rows and columns that the table was made for.
        to: rows and columns wanted.
        antialias: smooth when shrinking.
        offset: 0 samples for the size itself (MAE, timm, DINOv2 with registers). DINO and DINOv2 passed
            (cells + 0.1) / old cells as a scale factor, which also shifts the sampling points; 0.1 repeats that.
    """
    if is_same(grid, to):
        return table
    image = rearrange(table, "(rows cols) d -> 1 d rows cols", rows=grid[0])
    return rearrange(stretch(image, to, antialias, offset), "1 d rows cols -> (rows cols) d")


def is_same(grid: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two grids are one. While a program for any size is traced, a size is a symbol and equals no number."""
    return all(isinstance(side, int) for side in (*grid, *other)) and tuple(grid) == tuple(other)


def stretch(
    image: Float[Tensor, "1 d rows cols"], to: tuple[int, int], antialias: bool = True, offset: float = 0.0
) -> Float[Tensor, "1 d rows2 cols2"]:
    """Bicubic interpolation; where repeatable kernels are asked for, as a product with its matrix."""
    grid = tuple(image.shape[2:])
    if torch.are_deterministic_algorithms_enabled() and image.requires_grad:
        # on a GPU the gradient of interpolation has no repeatable kernel
        cells = torch.eye(grid[0] * grid[1], dtype=image.dtype, device=image.device)
        weights = interpolate(rearrange(cells, "n (rows cols) -> 1 n rows cols", rows=grid[0]), to, antialias, offset)
        return torch.einsum("bdn,bnrc->bdrc", image.flatten(2), weights)
    return interpolate(image, to, antialias, offset)


def interpolate(image: Tensor, to: tuple[int, int], antialias: bool, offset: float) -> Tensor:
    """By the size wanted, or by DINO's scale factors."""
    if not offset:
        return F.interpolate(image, size=to, mode="bicubic", antialias=antialias)
    factors = [(new + offset) / old for new, old in zip(to, image.shape[2:], strict=True)]
    stretched = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=antialias)
    if stretched.shape[2:] != to:
        raise ValueError(f"positions stretched to {tuple(stretched.shape[2:])} instead of {to}")
    return stretched


def rotary_2d(
    grid: tuple[int, int], trained_grid: tuple[int, int], width: int, device: torch.device
) -> tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]]:
    """Cosines and sines of the angles of each patch: a quarter of the head's width by row, a quarter by column.

    Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", axial frequencies with base 100. On
    another grid the coordinates are stretched to the trained range.
    """
    frequencies = 100.0 ** (-torch.arange(width // 4, device=device) / (width // 4))
    sides = [
        (torch.arange(new, device=device) + 0.5) * old / new - 0.5 for new, old in zip(grid, trained_grid, strict=True)
    ]
    by_row, by_column = torch.meshgrid(*sides, indexing="ij")
    angles = torch.cat([by_row.reshape(-1, 1) * frequencies, by_column.reshape(-1, 1) * frequencies], 1)
    return angles.cos(), angles.sin()


def rotate(heads: Float[Tensor, "b heads t e"], rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (channel i, channel i + e/2) by its angle."""
    cos, sin = rotation
    first, second = heads.to(torch.promote_types(heads.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(heads.dtype)


class RelativeBias(nn.Module):
    """A learned number per head and offset (row, column) between two patches; prefix tokens have none."""

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def forward(self, places: Places) -> Float[Tensor, "*b heads t t"]:
        rows, columns = places.grid
        table = self.table
        wanted = (2 * rows - 1, 2 * columns - 1)
        if not is_same(tuple(table.shape[1:]), wanted):
            table = stretch(table[None], wanted)[0]
        place = torch.arange(rows * columns, device=table.device)
        if places.visible is not None:
            place = places.visible
        row, column = place // columns, place % columns
        by_row = row[..., :, None] - row[..., None, :] + rows - 1
        by_column = column[..., :, None] - column[..., None, :] + columns - 1
        bias = table[:, by_row, by_column]  # heads (b) k k
        if places.visible is not None:
            bias = bias.transpose(0, 1)
        return F.pad(bias, (places.prefix, 0, places.prefix, 0))
