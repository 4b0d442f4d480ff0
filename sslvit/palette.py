"""Color palettes: 3 bits per channel or k-means clusters of pixels, and conversion between pixels and indices.

iGPT (Chen et al. 2020), section 3.2: with a 9-bit palette, sequences are three times shorter than with separate red,
green and blue values. Colors are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_PIXELS = 2048  # pixels whose distances to all colors fit into the CPU's cache
LEVELS = 8  # per channel of a uniform palette: 3 bits
MAX_ROUNDS = 100  # of k-means


def uniform_palette(channels: int = 3) -> Float[Tensor, "colors c"]:
    """The centers of 8 equal boxes per channel; color r * 64 + g * 8 + b holds bytes v with v // 32 = (r, g, b)."""
    width = 256 // LEVELS
    levels = (torch.arange(LEVELS, dtype=torch.float64) * width + (width - 1) / 2) / 127.5 - 1
    return torch.cartesian_prod(*[levels] * channels).view(-1, channels).float()


def nearest_color(images: Float[Tensor, "b c h w"], palette: Float[Tensor, "colors c"]) -> Int[Tensor, "b h w"]:
    """Index of the nearest color by squared distance; the lowest index on ties.

    Args:
        images: Colors in [-1, 1].
        palette: Colors in [-1, 1].
    """
    pixels = rearrange(images, "b c h w -> (b h w) c")
    return nearest_rows(pixels, palette).view(images.shape[0], *images.shape[2:])


def nearest_rows(pixels: Float[Tensor, "n c"], palette: Float[Tensor, "colors c"]) -> Int[Tensor, "n"]:
    """`nearest_color` for a list of pixels."""
    pixels, palette = pixels.float(), palette.float()
    # the smallest |x - c|^2 is the largest x.c - |c|^2 / 2: |x|^2 is the same for every color
    offset = -palette.square().sum(1) / 2
    if torch.compiler.is_exporting():  # a loop would fix the number of chunks in the exported program
        return torch.addmm(offset, pixels, palette.T).argmax(1)
    chunk = CHUNK_PIXELS if pixels.device.type == "cpu" else 2**20 // max(len(palette) // 512, 1)
    indices = torch.empty(len(pixels), dtype=torch.long, device=pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):  # bf16 cannot tell neighboring colors apart
        for start in range(0, len(pixels), chunk):
            indices[start : start + chunk] = _scores(pixels[start : start + chunk], palette, offset).argmax(1)
    return indices


def _scores(
    pixels: Float[Tensor, "n c"], palette: Float[Tensor, "colors c"], offset: Float[Tensor, "colors"]
) -> Float[Tensor, "n colors"]:
    if pixels.device.type == "cpu":
        return torch.addmm(offset, pixels, palette.T)
    # a matrix product on a GPU may use TF32, which cannot tell neighboring colors apart either
    scores = torch.addcmul(offset, pixels[:, :1], palette[:, 0])
    for channel in range(1, pixels.shape[1]):
        scores.addcmul_(pixels[:, channel : channel + 1], palette[:, channel])
    return scores


def colors_of(indices: Int[Tensor, "b h w"], palette: Float[Tensor, "colors c"]) -> Float[Tensor, "b c h w"]:
    """The palette's colors at the given indices, in [-1, 1]."""
    return rearrange(palette[indices], "b h w c -> b c h w")


def squared_error(pixels: Float[Tensor, "n c"], palette: Float[Tensor, "colors c"]) -> float:
    """Mean over pixels and channels of the squared distance to the nearest color."""
    nearest = palette[nearest_rows(pixels, palette)]
    return float((pixels.double() - nearest.double()).square().mean())


def fit_palette(
    pixels: Float[Tensor, "n c"], colors: int, seed: int = 0, rounds: Iterable[int] = range(MAX_ROUNDS)
) -> Float[Tensor, "colors c"]:
    """Fit a palette to pixels by k-means (Lloyd 1982, initialized by k-means++), sorted by brightness.

    Stops when a round lowers the mean squared error by no more than a ten-thousandth. A color without pixels moves to
    one of the pixels with the largest error.

    Args:
        pixels: Colors in [-1, 1].
        colors: Number of colors.
        seed: Seed of the initial centers.
        rounds: Rounds to run at most, as an iterable that the caller can track.

    Raises:
        ValueError: The pixels have fewer distinct colors.
    """
    distinct = torch.unique(pixels, dim=0)
    if len(distinct) < colors:
        raise ValueError(f"--colors {colors}: these images have only {len(distinct)} different ones. Ask for fewer.")
    if len(distinct) == colors:
        return by_brightness(distinct)
    from sklearn.cluster import kmeans_plusplus

    subset = pixels[:: max(1, len(pixels) // (64 * colors))]
    subset = subset if len(torch.unique(subset, dim=0)) >= colors else distinct
    centers = torch.from_numpy(kmeans_plusplus(subset.double().numpy(), colors, random_state=seed)[0]).float()
    before = float("inf")
    for _ in rounds:
        nearest = nearest_rows(pixels, centers)
        distance = (pixels - centers[nearest]).square().sum(1)
        error = float(distance.double().mean())
        if before - error <= 1e-4 * error:
            break
        before = error
        counts = torch.bincount(nearest, minlength=colors)
        sums = torch.zeros(colors, pixels.shape[1], dtype=torch.float64).index_add_(0, nearest, pixels.double())
        centers = (sums / counts.clamp(min=1)[:, None]).float()
        empty = torch.nonzero(counts == 0)[:, 0]
        centers[empty] = pixels[distance.topk(len(empty)).indices]
    return by_brightness(centers)


def by_brightness(colors: Float[Tensor, "colors c"]) -> Float[Tensor, "colors c"]:
    """Sort colors from dark to light."""
    return colors[colors.sum(1).argsort(stable=True)]
