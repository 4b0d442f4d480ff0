"""What all ranks of a run know together; with one process, what it knows alone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

GLOO_PAUSE = 0.3  # seconds that its threads have to let go of the last tensors, which takes them microseconds


def is_distributed() -> bool:
    """Whether several processes have joined a group."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if is_distributed() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on each of them."""
    if is_distributed():
        home = values.device
        values = values.clone().to(_exchange_device(values))
        distributed.all_reduce(values)
        values = values.to(home)
    return values


def logsumexp_over_ranks(values: Tensor) -> Tensor:
    """log(sum(exp(values))) over all ranks, place by place, on each of them."""
    if not is_distributed():
        return values
    largest = values.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return all_reduce_sum((values - largest).exp()).log() + largest


def all_gather(values: Tensor) -> Tensor:
    """Equally long tensors of all ranks, one after the other, on each of them."""
    if not is_distributed():
        return values
    home = values.device
    values = values.contiguous().to(_exchange_device(values))
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(gathered, values)
    return torch.cat(gathered).to(home)


def _exchange_device(values: Tensor) -> torch.device:
    """Where the backend can exchange a tensor: NCCL knows GPUs only."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return values.device


def rank() -> int:
    """Number of this process, from zero."""
    return distributed.get_rank() if is_distributed() else 0


def is_first_rank() -> bool:
    """Whether this is the process that speaks for all."""
    return rank() == 0


def broadcast_from_rank0(value: Any) -> Any:
    """The first rank's value, on each of them."""
    if not is_distributed():
        return value
    said = [value]
    distributed.broadcast_object_list(said)
    return said[0]


def all_gather_objects(value: Any) -> list[Any]:
    """The values of all ranks in rank order, on each of them."""
    if not is_distributed():
        return [value]
    said: list[Any] = [None] * world_size()
    distributed.all_gather_object(said, value)
    return said


@contextmanager
def ending_groups() -> Iterator[None]:
    """End the gloo groups that are joined inside, with their threads.

    A thread that still lets go of the tensors of the last exchange while the interpreter ends would abort the process
    ("terminate called without an active exception"). NCCL's groups are ended by Lightning.
    """
    had_joined = is_distributed()
    try:
        yield
    finally:
        if is_distributed() and not had_joined and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()
            gc.collect()  # what still holds the group in a cycle: its threads end with it
            time.sleep(GLOO_PAUSE)  # torch never lets go of the group of a DTensor


@contextmanager
def all_ranks() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; the first one speaks for all.

    Tensors are exchanged on the CPU. The others may wait for long while the first one works alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # else every rank's pinned memory and events would be of the first GPU
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    with open(os.devnull, "w") as nowhere:
        try:
            if is_first_rank():
                yield
            else:
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    yield
        finally:
            distributed.destroy_process_group()
