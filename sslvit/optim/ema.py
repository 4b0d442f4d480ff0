"""Moving averages of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sslvit.optim.guard import local_shard


@torch.no_grad()
def ema_update(average: nn.Module, source: nn.Module, momentum: float, skip: Tensor) -> None:
    """average = momentum x average + (1 - momentum) x source, for every parameter; buffers are unchanged.

    Args:
        average: The module to update.
        source: A module of the same architecture.
        momentum: Weight of the old average.
        skip: 1 to leave the average unchanged, else 0; a tensor on the device, which is not synchronized.
    """
    for module in (*average.modules(), *source.modules()):
        if isinstance(module, FSDPModule):  # weights that a forward pass gathered are a copy
            module.reshard()
    ours = [local_shard(parameter) for parameter in average.parameters()]
    theirs = [local_shard(parameter.detach()) for parameter in source.parameters()]
    if is_on_host(skip):  # reading it does not synchronize, and the update needs no copy of the weights
        if not skip:
            torch._foreach_mul_(ours, momentum)
            torch._foreach_add_(ours, theirs, alpha=1 - momentum)
        return
    torch._foreach_mul_(ours, momentum + (1 - momentum) * skip)
    torch._foreach_add_(ours, torch._foreach_mul(theirs, (1 - momentum) * (1 - skip)))


def is_on_host(value: Tensor) -> bool:
    """Whether a number can be read without synchronizing with a device."""
    return value.device.type == "cpu"
