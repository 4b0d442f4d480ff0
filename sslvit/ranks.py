"""What all ranks of a run know together; with one process, what it knows alone."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def count_ranks() -> int:
    return distributed.get_world_size() if is_distributed() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on each of them."""
    if is_distributed():
        values = values.clone()
        distributed.all_reduce(values)
    return values


def logsumexp_over_ranks(values: Tensor) -> Tensor:
    """log(sum(exp(values))) over all ranks, place by place, on each of them."""
    if not is_distributed():
        return values
    largest = values.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return sum_over_ranks((values - largest).exp()).log() + largest


def gather_over_ranks(values: Tensor) -> Tensor:
    """Equally long tensors of all ranks, one after the other, on each of them."""
    if not is_distributed():
        return values
    parts = [torch.empty_like(values) for _ in range(count_ranks())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
