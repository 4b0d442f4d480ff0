"""Measures that need no labels: how much a batch's features and choices differ from image to image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MOST_PAIRED = 4096  # images of which every pair is compared


def feature_std(features: Float[Tensor, "b d"]) -> float:
    """Deviation over images per channel, averaged; features are scaled to a mean square of one first.

    0 where all images have the same features; 1 where channels are independent of each other and centered.
    """
    scaled = features / features.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    return float(scaled.std(0, unbiased=False).mean())


def rankme(features: Float[Tensor, "b d"]) -> float:
    """Effective rank: the exponential of the entropy of the singular values' shares (Garrido et al. 2023, section 3).

    Between 1 (all features on one line) and the smaller of images and channels. Compare it only between equally
    many images. NaN where a feature is not finite.
    """
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def label_free(features: Float[Tensor, "b d"]) -> dict[str, float]:
    """All measures of one set of features; those that so few images cannot give are left out."""
    found = {
        "feature_std": feature_std(features), "rankme": rankme(features), "alpha": alpha_of_spectrum(features),
        "uniformity": uniformity(features),
    }  # fmt: skip
    few = ("alpha", "uniformity")
    return {name: value for name, value in found.items() if name not in few or math.isfinite(value)}


def alpha_of_spectrum(features: Float[Tensor, "b d"]) -> float:
    """Decay alpha of the covariance's eigenvalues, i ** -alpha (Agrawal et al. 2022): near 1 in good representations.

    Fitted by least squares on log-log axes between the 10th part of the eigenvalues and the place where they have
    fallen to a millionth. NaN with fewer than three such eigenvalues.
    """
    if not features.isfinite().all():
        return float("nan")
    centered = features.double() - features.double().mean(0)
    spread = torch.linalg.svdvals(centered).square()
    spread = spread[spread > 1e-6 * spread[0]] if len(spread) and spread[0] > 0 else spread[:0]
    first = max(1, min(len(spread) // 10, 10))
    if len(spread) - first < 2:
        return float("nan")
    place = torch.arange(first + 1, len(spread) + 1, dtype=spread.dtype, device=spread.device).log()
    height = spread[first:].log()
    place = place - place.mean()
    return float(-(place * height).sum() / place.square().sum())


def alignment(one: Float[Tensor, "b d"], other: Float[Tensor, "b d"]) -> float:
    """Mean squared distance on the unit sphere between two views of an image (Wang and Isola 2020): 0 if they agree."""
    return float((F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean())


def uniformity(features: Float[Tensor, "b d"]) -> float:
    """log of the mean of exp(-2 distance^2) over pairs on the unit sphere (Wang and Isola 2020): 0 where all are alike.

    The lower, the more evenly the images are spread. Of many images some 4,096 are paired, evenly spread.
    """
    if len(features) < 2:
        return float("nan")
    some = features[:: -(-len(features) // MOST_PAIRED)]
    unit = F.normalize(some.double(), dim=1)
    distances = torch.pdist(unit).square()
    return float((-2 * distances).exp().mean().log())


def largest_share(choices: Int[Tensor, "b"]) -> float:
    """Share of the images that chose what most of them chose: 1 where all chose the same."""
    return float(choices.bincount().max() / len(choices))
