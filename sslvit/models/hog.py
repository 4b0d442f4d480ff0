"""Histograms of oriented gradients (Dalal and Triggs 2005), an additional target of masked prediction beside pixels.

"Masked Feature Prediction for Self-Supervised Visual Pre-Training" (Wei et al. 2022), section 3.2, predicts them
instead of pixels: they describe the orientation of a patch's edges, independent of contrast.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

BINS = 9  # orientations from 0 to pi
FLAT = 1e-2  # norm of a histogram, in normalized pixel values, below which its orientations are noise
MIN_CELL = 4  # pixels


def hog_cell(patch: int) -> int:
    """Side of a cell in pixels: half the patch if that is at least 4 pixels, otherwise the patch."""
    return patch // 2 if patch % 2 == 0 and patch // 2 >= MIN_CELL else patch


def hog_size(patch: int, channels: int) -> int:
    """Length of a patch's descriptor: the bins of all cells and channels."""
    return (patch // hog_cell(patch)) ** 2 * channels * BINS


def hog_patches(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n k"]:
    """Histograms of oriented gradients of each patch, patches row by row.

    Gradients are central differences per pixel and channel (with replicated pixels at the border). Each votes for the
    two nearest orientations, weighted by its magnitude. The histogram of a cell and channel is normalized to a norm of
    3, the square root of the number of bins, so that its mean square is 1, like that of normalized pixels; flat cells
    have a smaller norm.

    Args:
        images: Normalized pixels.
        patch: Side of a patch in pixels.
    """
    pixels, cell = images.to(torch.promote_types(images.dtype, torch.float32)), hog_cell(patch)
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    length = (across.square() + down.square()).sqrt()
    direction = torch.atan2(down, across).remainder(math.pi) * (BINS / math.pi)  # in bins
    # ramps[k]: the mean of a cell's magnitudes, each times its direction's part between bins k and k + 1, from 0 to 1.
    # What a bin gets is the ramp up to it minus the one that leaves it; the last bin is next to the first.
    total = F.avg_pool2d(length, cell)
    ramps = [F.avg_pool2d(direction.clamp(k, k + 1) * length, cell) - k * total for k in range(BINS)]
    votes = [total - ramps[0] + ramps[-1]] + [before - after for before, after in pairwise(ramps)]
    histograms = torch.stack(votes, 2)  # b c bins rows cols
    size = (histograms.square().sum(2, keepdim=True) + FLAT**2).sqrt()
    side = patch // cell
    return rearrange(
        histograms / size * math.sqrt(BINS), "b c k (rows p) (cols q) -> b (rows cols) (p q c k)", p=side, q=side
    )
