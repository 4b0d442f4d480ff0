"""Collective operations over the ranks of a run; with a single process they return their input."""

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

GLOO_PAUSE = 0.3  # seconds for gloo's threads to release the last tensors, which takes them microseconds


def is_distributed() -> bool:
    """Whether this process has joined a process group."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if is_distributed() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks; every rank gets the result."""
    if is_distributed():
        home = values.device
        values = values.clone().to(_exchange_device(values))
        distributed.all_reduce(values)
        values = values.to(home)
    return values


def logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Elementwise log(sum(exp(values))) over all ranks; every rank gets the result."""
    if not is_distributed():
        return values
    largest = values.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return all_reduce_sum((values - largest).exp()).log() + largest


def all_gather(values: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, which have equal shapes; every rank gets the result."""
    if not is_distributed():
        return values
    home = values.device
    values = values.contiguous().to(_exchange_device(values))
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(gathered, values)
    return torch.cat(gathered).to(home)


def _exchange_device(values: Tensor) -> torch.device:
    """Device on which the backend can exchange a tensor: NCCL supports only GPUs."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return values.device


def rank() -> int:
    """Rank of this process, from zero."""
    return distributed.get_rank() if is_distributed() else 0


def is_first_rank() -> bool:
    """Whether this is rank 0, which prints and writes for all."""
    return rank() == 0


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not is_distributed():
        return value
    said = [value]
    distributed.broadcast_object_list(said)
    return said[0]


def all_gather_objects(value: Any) -> list[Any]:
    """Gather the values of all ranks in rank order; every rank gets the list."""
    if not is_distributed():
        return [value]
    said: list[Any] = [None] * world_size()
    distributed.all_gather_object(said, value)
    return said


@contextmanager
def ending_groups() -> Iterator[None]:
    """Destroy a gloo process group that was created in the block, and end its threads.

    A thread that is still releasing tensors of the last exchange while the interpreter exits would abort the process
    ("terminate called without an active exception"). Lightning destroys NCCL groups.
    """
    had_joined = is_distributed()
    try:
        yield
    finally:
        if is_distributed() and not had_joined and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()
            gc.collect()  # frees reference cycles that contain the group, so that its threads end
            time.sleep(GLOO_PAUSE)  # torch never releases the group of a DTensor


@contextmanager
def all_ranks() -> Iterator[None]:
    """Join the processes that torchrun started, if any; only rank 0 prints.

    Tensors are exchanged on the CPU. The timeout is long because other ranks may have to wait while rank 0 works alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # otherwise all ranks would use the first GPU for pinned memory
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
