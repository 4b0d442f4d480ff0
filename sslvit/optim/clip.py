"""Norms of gradients, and bounds on them; a gradient may lie in parts on all ranks (FSDP2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sslvit.ranks import all_reduce_sum


def local_shard(value: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks, the same memory; any other tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value


@torch.no_grad()
def grad_norms(gradients: list[Tensor]) -> Tensor:
    """Norm of each whole gradient, the same on every rank."""
    norms = torch.stack(torch._foreach_norm([local_shard(gradient) for gradient in gradients]))
    if any(hasattr(gradient, "to_local") for gradient in gradients):
        norms = all_reduce_sum(norms.square()).sqrt()
    return norms


@torch.no_grad()
def clip_by_global_norm(gradients: list[Tensor], norms: Tensor, largest: float) -> None:
    """Shrink all gradients by one factor where the norm over them all is above the largest."""
    torch._foreach_mul_(
        [local_shard(gradient) for gradient in gradients], (largest / (norms.norm() + 1e-6)).clamp(max=1)
    )


@torch.no_grad()
def clip_by_parameter_norm(gradients: list[Tensor], norms: Tensor, largest: float) -> None:
    """Shrink every gradient whose own norm is above the largest (DINO's released code)."""
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], list(factors.unbind()))
