"""Measures that need no labels: how much a batch's features and targets differ from image to image."""

from __future__ import annotations

import torch
from jaxtyping import Float
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
    many images.
    """
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_entropy(shares: Float[Tensor, "b k"]) -> float:
    """Entropy of an image's shares of the prototypes in nats, averaged: from 0 (one prototype) to ln k (all alike)."""
    return float(-torch.xlogy(shares, shares).sum(1).mean())


def largest_prototype_share(shares: Float[Tensor, "b k"]) -> float:
    """Share of the images whose first choice is the prototype that most of them choose: 1 where all choose one."""
    return float(shares.argmax(1).bincount().max() / len(shares))
