"""Gradient norms and clipping, also for gradients that are sharded over ranks (FSDP2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sslvit.ranks import all_reduce_sum


def local_shard(value: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, without a copy; any other tensor unchanged."""
    return value.to_local() if hasattr(value, "to_local") else value


@torch.no_grad()
def grad_norms(gradients: list[Tensor]) -> Tensor:
    """Norm of each full gradient, identical on every rank."""
    norms = torch.stack(torch._foreach_norm([local_shard(gradient) for gradient in gradients]))
    if any(hasattr(gradient, "to_local") for gradient in gradients):
        norms = all_reduce_sum(norms.square()).sqrt()
    return norms


@torch.no_grad()
def clip_by_global_norm(gradients: list[Tensor], norms: Tensor, largest: float) -> None:
    """Scale all gradients by one factor if their global norm exceeds `largest`."""
    torch._foreach_mul_(
        [local_shard(gradient) for gradient in gradients], (largest / (norms.norm() + 1e-6)).clamp(max=1)
    )


@torch.no_grad()
def clip_by_parameter_norm(gradients: list[Tensor], norms: Tensor, largest: float) -> None:
    """Scale every gradient with a norm above `largest` on its own (DINO's released code)."""
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], list(factors.unbind()))
