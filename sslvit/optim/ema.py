"""Moving averages of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sslvit.optim.clip import local_shard


@torch.no_grad()
def ema_update(average: nn.Module, source: nn.Module, momentum: float) -> None:
    """average = momentum x average + (1 - momentum) x source, parameter by parameter; buffers stay as they are."""
    for module in (*average.modules(), *source.modules()):
        if isinstance(module, FSDPModule):  # weights that a forward pass gathered from all ranks are a copy
            module.reshard()
    ours = [local_shard(parameter) for parameter in average.parameters()]
    theirs = [local_shard(parameter.detach()) for parameter in source.parameters()]
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)
