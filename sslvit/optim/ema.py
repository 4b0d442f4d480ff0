"""Moving averages of weights."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def move_average(average: nn.Module, source: nn.Module, momentum: float) -> None:
    """average = momentum x average + (1 - momentum) x source, parameter by parameter; buffers stay as they are."""
    ours = list(average.parameters())
    theirs = [parameter.detach() for parameter in source.parameters()]
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)
