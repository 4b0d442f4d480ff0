"""Few colours: 3 bits a channel, or the centres of clusters of pixels; nearest colour and back.

iGPT (Chen et al. 2020), section 3.2: a 9-bit palette makes the sequence three times shorter than red, green and
blue in turn. Colours live in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

PIECE = 2048  # pixels whose distances to all colours fit into a processor's cache
LEVELS = 8  # of each channel of a uniform palette: 3 bits
ROUNDS = 100  # of k-means at most


def uniform_palette(channels: int = 3) -> Float[Tensor, "colours c"]:
    """The centres of 8 equal boxes per channel; colour r * 64 + g * 8 + b holds bytes v with v // 32 = (r, g, b)."""
    width = 256 // LEVELS
    levels = (torch.arange(LEVELS, dtype=torch.float64) * width + (width - 1) / 2) / 127.5 - 1
    return torch.cartesian_prod(*[levels] * channels).view(-1, channels).float()


def nearest_colour(images: Float[Tensor, "b c h w"], palette: Float[Tensor, "colours c"]) -> Int[Tensor, "b h w"]:
    """Index of the nearest colour by squared distance; the lowest index on ties.

    Args:
        images: colours in [-1, 1].
        palette: colours in [-1, 1].
    """
    pixels = rearrange(images, "b c h w -> (b h w) c")
    return nearest_rows(pixels, palette).view(images.shape[0], *images.shape[2:])


def nearest_rows(pixels: Float[Tensor, "n c"], palette: Float[Tensor, "colours c"]) -> Int[Tensor, "n"]:
    """nearest_colour for single pixels."""
    pixels, palette = pixels.float(), palette.float()
    # the smallest |x - c|^2 is the largest x.c - |c|^2 / 2: |x|^2 is the same for every colour
    offset = -palette.square().sum(1) / 2
    if torch.compiler.is_exporting():  # the number of pieces would be a constant of the program
        return torch.addmm(offset, pixels, palette.T).argmax(1)
    piece = PIECE if pixels.device.type == "cpu" else 2**20 // max(len(palette) // 512, 1)
    found = torch.empty(len(pixels), dtype=torch.long, device=pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):  # bf16 cannot tell neighbouring colours apart
        for start in range(0, len(pixels), piece):
            near = torch.addmm(offset, pixels[start : start + piece], palette.T)
            found[start : start + piece] = near.argmax(1)
    return found


def colours_of(indices: Int[Tensor, "b h w"], palette: Float[Tensor, "colours c"]) -> Float[Tensor, "b c h w"]:
    """The palette's colours at the given indices, in [-1, 1]."""
    return rearrange(palette[indices], "b h w c -> b c h w")


def squared_error(pixels: Float[Tensor, "n c"], palette: Float[Tensor, "colours c"]) -> float:
    """Mean over pixels and channels of the squared distance to the nearest colour."""
    nearest = palette[nearest_rows(pixels, palette)]
    return float((pixels.double() - nearest.double()).square().mean())


def fit_palette(
    pixels: Float[Tensor, "n c"], colours: int, seed: int = 0, rounds: Iterable[int] = range(ROUNDS)
) -> Float[Tensor, "colours c"]:
    """Centres of the pixels' clusters (k-means: Lloyd 1982, begun with k-means++), sorted by brightness.

    Ends when a round lowers the mean squared error by less than a ten-thousandth of it. A colour without pixels moves
    to one of the pixels that are worst served.

    Args:
        pixels: colours in [-1, 1].
        colours: how many.
        seed: of the first centres.
        rounds: as many as may be taken; a caller can watch them pass.

    Raises:
        ValueError: the pixels have fewer different colours.
    """
    distinct = torch.unique(pixels, dim=0)
    if len(distinct) < colours:
        raise ValueError(f"--colours {colours}: these images have only {len(distinct)} different ones. Ask for fewer.")
    if len(distinct) == colours:
        return by_brightness(distinct)
    from sklearn.cluster import kmeans_plusplus

    few = pixels[:: max(1, len(pixels) // (64 * colours))]
    few = few if len(torch.unique(few, dim=0)) >= colours else distinct
    centres = torch.from_numpy(kmeans_plusplus(few.double().numpy(), colours, random_state=seed)[0]).float()
    before = float("inf")
    for _ in rounds:
        nearest = nearest_rows(pixels, centres)
        distance = (pixels - centres[nearest]).square().sum(1)
        error = float(distance.double().mean())
        if before - error <= 1e-4 * error:
            break
        before = error
        counts = torch.bincount(nearest, minlength=colours)
        sums = torch.zeros(colours, pixels.shape[1], dtype=torch.float64).index_add_(0, nearest, pixels.double())
        centres = (sums / counts.clamp(min=1)[:, None]).float()
        empty = torch.nonzero(counts == 0)[:, 0]
        centres[empty] = pixels[distance.topk(len(empty)).indices]
    return by_brightness(centres)


def by_brightness(colours: Float[Tensor, "colours c"]) -> Float[Tensor, "colours c"]:
    """The same colours from dark to light."""
    return colours[colours.sum(1).argsort(stable=True)]
