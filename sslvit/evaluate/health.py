"""Measures that need no labels: how much a batch's features and choices differ from image to image."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def feature_std(features: Float[Tensor, "b d"]) -> float:
    """Deviation over images per channel, averaged; features are scaled to a mean square of one first.

    0 where all images have the same features; 1 where channels are independent of each other and centred.
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


def largest_share(choices: Int[Tensor, "b"]) -> float:
    """Share of the images that chose what most of them chose: 1 where all chose the same."""
    return float(choices.bincount().max() / len(choices))
