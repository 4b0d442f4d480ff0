"""torch.compile for a step: the whole loss as one program, or block by block where ranks communicate meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn

from sslvit.models.transformer import Block
from sslvit.tasks.base import Task

MAX_PROGRAMS = 64  # per function: one for each size of views, in training and in evaluation


def compile_task(task: Task, mode: str) -> None:
    """Compile the computation of a step; names and weights do not change.

    On one rank, the model's loss becomes one program, forward and backward. On several ranks, each block is compiled
    alone: gradients are exchanged, or weights gathered, during the backward pass, and one program would have to end
    first.

    Args:
        task: The task.
        mode: Mode of torch.compile.

    Raises:
        ValueError: CUDA graphs and several passes per step: the second would overwrite the gradients of the first.
    """
    if mode == "reduce-overhead" and task.run.accumulation_steps > 1:
        raise ValueError(
            f"train.compile: reduce-overhead takes one pass per step, not {task.run.accumulation_steps} of "
            f"{task.run.images_per_pass} images (train.micro_batch_size). Use default, or a smaller global batch."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_PROGRAMS)
    if task.run.ranks == 1:
        task.loss_fn = _compiled(task.loss_fn, mode)
        return
    for block in blocks(task):
        block.forward = _compiled(block.forward, mode)  # type: ignore[method-assign]  # of this block alone


def undo_compilation(task: Task) -> None:
    """Undo `compile_task`, since the trained model is used in other ways."""
    task.loss_fn = task.model.loss  # type: ignore[assignment]  # a module's attribute
    for block in blocks(task):
        block.__dict__.pop("forward", None)


def blocks(task: nn.Module) -> list[Block]:
    """Every block of every network."""
    return [module for module in task.modules() if isinstance(module, Block)]


def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    # every size gets a program of its own: there are few, and one for any size would be slower
    compiled = torch.compile(function, mode=mode, dynamic=False)
    if mode == "default":
        return compiled

    def replayed(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last replay may be overwritten
        return compiled(*args, **kwargs)

    return replayed
