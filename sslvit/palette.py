"""Few colors: 3 bits a channel, or the centers of clusters of pixels; nearest color and back.

iGPT (Chen et al. 2020), section 3.2: a 9-bit palette makes the sequence three times shorter than red, green and
blue in turn. Colors live in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_PIXELS = 2048  # pixels whose distances to all colors fit into a processor's cache
LEVELS = 8  # of each channel of a uniform palette: 3 bits
MAX_ROUNDS = 100  # of k-means at most


def uniform_palette(channels: int = 3) -> Float[Tensor, "colors c"]:
    """The centers of 8 equal boxes per channel; color r * 64 + g * 8 + b holds bytes v with v // 32 = (r, g, b)."""
    width = 256 // LEVELS
    levels = (torch.arange(LEVELS, dtype=torch.float64) * width + (width - 1) / 2) / 127.5 - 1
    return torch.cartesian_prod(*[levels] * channels).view(-1, channels).float()


def nearest_color(images: Float[Tensor, "b c h w"], palette: Float[Tensor, "colors c"]) -> Int[Tensor, "b h w"]:
    """Index of the nearest color by squared distance; the lowest index on ties.

    Args:
        images: colors in [-1, 1].
        palette: colors in [-1, 1].
    """
    pixels = rearrange(images, "b c h w -> (b h w) c")
    return nearest_rows(pixels, palette).view(images.shape[0], *images.shape[2:])


def nearest_rows(pixels: Float[Tensor, "n c"], palette: Float[Tensor, "colors c"]) -> Int[Tensor, "n"]:
    """nearest_color for single pixels."""
    pixels, palette = pixels.float(), palette.float()
    # the smallest |x - c|^2 is the largest x.c - |c|^2 / 2: |x|^2 is the same for every color
    offset = -palette.square().sum(1) / 2
    if torch.compiler.is_exporting():  # the number of chunks would be a constant of the program
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
    # beside bf16 a GPU's matrix product may be of TF32, which cannot tell neighboring colors apart either
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
    """Centers of the pixels' clusters (k-means: Lloyd 1982, begun with k-means++), sorted by brightness.

    Ends when a round lowers the mean squared error by less than a ten-thousandth of it. A color without pixels moves
    to one of the pixels that are worst served.

    Args:
        pixels: colors in [-1, 1].
        colors: Number of colors.
        seed: Seed of the first centers.
        rounds: At most so many rounds; a caller can track them.

    Raises:
        ValueError: the pixels have fewer different colors.
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
    """The same colors from dark to light."""
    return colors[colors.sum(1).argsort(stable=True)]
