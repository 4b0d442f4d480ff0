"""Measures that need no labels: how much a batch's features and choices differ from image to image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MAX_PAIRED = 4096  # images whose pairs are all compared


def feature_std(features: Float[Tensor, "b d"]) -> float:
    """Standard deviation over images, averaged over channels, of features scaled to a mean square of one.

    0 if all images have the same features; 1 if channels are independent of each other and centered.
    """
    scaled = features / features.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    return float(scaled.std(0, unbiased=False).mean())


def rankme(features: Float[Tensor, "b d"]) -> float:
    """Effective rank: exponential of the entropy of the normalized singular values (Garrido et al. 2023, section 3).

    Between 1 (all features on one line) and the smaller of images and channels. Compare it only between equally
    many images. NaN where a feature is not finite.
    """
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(features)
    probs = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(probs * probs.log()).sum()))


def label_free(features: Float[Tensor, "b d"]) -> dict[str, float]:
    """All measures of one set of features; those that need more images are left out."""
    of_many = {"alpha": alpha_of_spectrum(features), "uniformity": uniformity(features)}
    given = {name: value for name, value in of_many.items() if math.isfinite(value)}
    return {"feature_std": feature_std(features), "rankme": rankme(features), **given}


def alpha_of_spectrum(features: Float[Tensor, "b d"]) -> float:
    """Decay alpha of the covariance's eigenvalues, i ** -alpha (Agrawal et al. 2022): near 1 in good representations.

    Fitted by least squares on log-log axes between the first tenth of the eigenvalues and the point where they have
    fallen to a millionth. NaN with fewer than three such eigenvalues.
    """
    if not features.isfinite().all():
        return float("nan")
    centered = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centered).square()
    values = values[values > 1e-6 * values[0]] if len(values) and values[0] > 0 else values[:0]
    first = max(1, min(len(values) // 10, 10))
    if len(values) - first < 2:
        return float("nan")
    log_index = torch.arange(first + 1, len(values) + 1, dtype=values.dtype, device=values.device).log()
    log_index = log_index - log_index.mean()
    return float(-(log_index * values[first:].log()).sum() / log_index.square().sum())


def alignment(one: Float[Tensor, "b d"], other: Float[Tensor, "b d"]) -> float:
    """Mean squared distance on the unit sphere between two views of an image (Wang and Isola 2020): 0 if they agree."""
    return float((F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean())


def uniformity(features: Float[Tensor, "b d"]) -> float:
    """log of the mean of exp(-2 distance^2) over pairs on the unit sphere (Wang and Isola 2020): 0 if all are alike.

    The lower it is, the more evenly the features cover the sphere. Above 4,096 images an evenly spaced subset is used.
    """
    if len(features) < 2:
        return float("nan")
    some = features[:: -(-len(features) // MAX_PAIRED)]
    unit = F.normalize(some.double(), dim=1)
    distances = torch.pdist(unit).square()
    return float((-2 * distances).exp().mean().log())


def largest_fraction(choices: Int[Tensor, "b"]) -> float:
    """Fraction of the images that made the most frequent choice: 1 if all made the same choice."""
    return float(choices.bincount().max() / len(choices))
