"""Bounds on gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Shrink every gradient whose own norm is above the largest (DINO's released code); the norms before that."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms
