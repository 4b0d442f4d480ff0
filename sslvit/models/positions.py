"""Position embeddings.

Kinds (`encoder.pos_embed`):
    none           no positions: the encoder sees an unordered set of patches
    learned_1d     one learned row per patch
    learned_2d     a learned row per grid row plus one per grid column
    sincos_1d/_2d  fixed sines and cosines (Vaswani et al. 2017; MAE's 2-D table, He et al. 2022, appendix A.1)
    rotary_2d      queries and keys rotated by angles that grow along rows and columns (Heo et al. 2024)
    rotary_2d_normalized
                   the same, with coordinates from -1 to 1 on any grid (DINOv3, Siméoni et al. 2025, section 3.2)
    relative_bias  a learned bias w[i - j] per head, added before the softmax (CoAtNet, Dai et al. 2021)

The learned and sine-cosine kinds are a table that is added to the tokens and resampled for other grids; rotary
coordinates and the bias table are interpolated likewise. Normalized coordinates have the same range on every grid, so
they need no interpolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass
class TokenLayout:
    """Positions of the tokens in one forward pass.

    Args:
        grid: rows and columns of patches.
        prefix: number of tokens in front of the patches.
        visible: which patches are present ('b k'); None for all, in order.
        rotation: cosines and sines for rotary positions, '(b) 1 t e', or None.
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
    """The first half of the channels encodes the column, the second half the row (MAE's table). float64."""
    rows, columns = grid
    of_row = sincos_1d(rows, width // 2)[:, None].expand(rows, columns, -1)
    of_column = sincos_1d(columns, width // 2)[None].expand(rows, columns, -1)
    return torch.cat([of_column, of_row], 2).flatten(0, 1)


def sincos_table(patches: Float[Tensor, "n d"], prefix: int) -> Float[Tensor, "1 t d"]:
    """A fixed table in the form that modules store: float32, with rows of zeros for the prefix tokens in front."""
    return torch.cat([patches.new_zeros(prefix, patches.shape[1]), patches]).float()[None]


def table_on_grid(
    table: Float[Tensor, "1 t d"],
    prefix: int,
    trained_grid: tuple[int, int],
    grid: tuple[int, int],
    antialias: bool = True,
    offset: float = 0.0,
) -> tuple[Float[Tensor, "prefix d"], Float[Tensor, "n d"]]:
    """Split a table for `trained_grid` into the rows of prefix tokens and those of patches, resampled to `grid`.

    The first `prefix` rows of the table belong to prefix tokens; `antialias` and `offset` are those of
    `resample_table`.
    """
    return table[0, :prefix], resample_table(table[0, prefix:], trained_grid, grid, antialias, offset)


def resample_table(
    table: Float[Tensor, "n d"],
    grid: tuple[int, int],
    to: tuple[int, int],
    antialias: bool = True,
    offset: float = 0.0,
) -> Float[Tensor, "m d"]:
    """Interpolate a position table from one grid to another, bicubically. For the same grid, it is returned unchanged.

    Args:
        table: one row per patch, row by row.
        grid: rows and columns of the table.
        to: rows and columns of the result.
        antialias: smooth when shrinking.
        offset: 0 interpolates to the exact size (MAE, timm, DINOv2 with registers). DINO and DINOv2 passed
            (cells + 0.1) / old cells as a scale factor, which also shifts the sampling points; 0.1 reproduces that.
    """
    if is_same(grid, to):
        return table
    image = rearrange(table, "(rows cols) d -> 1 d rows cols", rows=grid[0])
    return rearrange(interpolate(image, to, antialias, offset), "1 d rows cols -> (rows cols) d")


def is_same(grid: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two grids are equal. While tracing for dynamic sizes, a size is a symbol and equals no number."""
    return all(isinstance(side, int) for side in (*grid, *other)) and tuple(grid) == tuple(other)


def interpolate(
    image: Float[Tensor, "1 d rows cols"], to: tuple[int, int], antialias: bool = True, offset: float = 0.0
) -> Float[Tensor, "1 d rows2 cols2"]:
    """Bicubic interpolation; with deterministic algorithms enabled, as a product with the interpolation matrix."""
    grid = tuple(image.shape[2:])
    if torch.are_deterministic_algorithms_enabled() and image.requires_grad:
        # on a GPU, the gradient of interpolation has no deterministic kernel
        cells = torch.eye(grid[0] * grid[1], dtype=image.dtype, device=image.device)
        weights = _bicubic(rearrange(cells, "n (rows cols) -> 1 n rows cols", rows=grid[0]), to, antialias, offset)
        return torch.einsum("bdn,bnrc->bdrc", image.flatten(2), weights)
    return _bicubic(image, to, antialias, offset)


def _bicubic(image: Tensor, to: tuple[int, int], antialias: bool, offset: float) -> Tensor:
    """Resize to the given size, with an offset by DINO's scale factors."""
    pixels = image.float() if image.dtype in (torch.bfloat16, torch.float16) else image  # which a CPU cannot
    is_narrow = antialias and is_same(to[1:], (1,))  # torch 2.15 resizes one column of pixels wrongly, not one row
    if is_narrow:
        pixels, to = pixels.mT, to[::-1]
    if offset:
        factors = [(new + offset) / old for new, old in zip(to, pixels.shape[2:], strict=True)]
        resized = F.interpolate(pixels, scale_factor=factors, mode="bicubic", antialias=antialias)
        if resized.shape[2:] != to:
            raise ValueError(f"positions interpolated to {tuple(resized.shape[2:])} instead of {to}")
    else:
        resized = F.interpolate(pixels, size=to, mode="bicubic", antialias=antialias)
    return (resized.mT if is_narrow else resized).to(image.dtype)


def scaled_coordinates(grid: tuple[int, int], trained_grid: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Indices of the rows and of the columns, scaled to the range of the trained grid (rotary_2d)."""
    return [
        (torch.arange(new, device=device) + 0.5) * old / new - 0.5 for new, old in zip(grid, trained_grid, strict=True)
    ]


def normalized_coordinates(grid: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Centers of the rows and of the columns from -1 to 1 along each side, times 2 pi (rotary_2d_normalized).

    DINOv3 (Siméoni et al. 2025), section 3.2. The shortest period is half of a side.
    """
    return [2 * math.pi * (2 * (torch.arange(side, device=device) + 0.5) / side - 1) for side in grid]


def rotary_2d(sides: list[Tensor], width: int) -> tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]]:
    """Cosines and sines of each patch's angles: head width / 4 angles for its row, and as many for its column.

    Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", axial frequencies with base 100.

    Args:
        sides: coordinates of the rows and of the columns.
        width: channels of a head.
    """
    frequencies = 100.0 ** (-torch.arange(width // 4, device=sides[0].device) / (width // 4))
    by_row, by_column = torch.meshgrid(*sides, indexing="ij")
    angles = torch.cat([by_row.reshape(-1, 1) * frequencies, by_column.reshape(-1, 1) * frequencies], 1)
    return angles.cos(), angles.sin()


def rotate(heads: Float[Tensor, "b heads t e"], rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (channel i, channel i + e/2) by its angle, in the precision of the heads."""
    cos, sin = (table.to(heads.dtype) for table in rotation)
    # each channel times its cosine, plus its partner times -sin or sin: half the memory traffic of rotating by pairs
    partners = heads.roll(heads.shape[-1] // 2, -1)
    return heads * torch.cat([cos, cos], -1) + partners * torch.cat([-sin, sin], -1)


class RelativeBias(nn.Module):
    """A learned bias per head and offset (row, column) between two patches; zero for prefix tokens."""

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def forward(self, layout: TokenLayout) -> Float[Tensor, "*b heads t t"]:
        """The bias of every pair of tokens; with visible patches, one matrix per image."""
        rows, columns = layout.grid
        table: Tensor = self.table
        wanted = (2 * rows - 1, 2 * columns - 1)
        if not is_same(tuple(table.shape[1:]), wanted):
            table = interpolate(table[None], wanted)[0]
        every = torch.arange(rows * columns, device=table.device)
        index = every if layout.visible is None else layout.visible
        row, column = index // columns, index % columns
        by_row = row[..., :, None] - row[..., None, :] + rows - 1
        by_column = column[..., :, None] - column[..., None, :] + columns - 1
        bias = table[:, by_row, by_column]  # heads (b) k k
        if layout.visible is not None:
            bias = bias.transpose(0, 1)
        return F.pad(bias, (layout.prefix, 0, layout.prefix, 0))
