"""A step on fake tensors, which have shapes but no content, to count its matrix products and its peak memory.

It runs on any machine, also for a GPU that is not there: the tensors are CPU tensors, and where a GPU's kernels keep
other tensors for the backward pass, functions with the memory footprint of those kernels take their place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sslvit.data.batch import Batch
from sslvit.data.views import view_sizes
from sslvit.models.transformer import Attention, WrittenOutAttention, in_chunks
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.tasks import make_task
from sslvit.train.hardware import precision_of, trains_on_gpu

FEW = 4  # images in the step whose products are counted
# settings of fine-tuning whose effect on an image is drawn at random; they take no matrix product, and at most a copy
# of the images
DRAWN = ("erase", "mixup", "cutmix")
# computed in float32 under autocast on a GPU, but not on a CPU
IN_FLOAT32 = (F.layer_norm, F.cross_entropy, Tensor.softmax, Tensor.log_softmax)


class FakeStep:
    """Counts the FLOPs and the memory of a step.

    Args:
        settings: Settings of the run.
        run: Steps, batch sizes and ranks.
        images: Number of images in the data set.
        classes: Number of its classes, if it has labels.
    """

    def __init__(self, settings: RunSettings, run: RunPlan, images: int, classes: int | None = None) -> None:
        self.settings, self.run, self.images = settings, run, images
        self.on_gpu, self.precision = trains_on_gpu(settings.train), precision_of(settings.train)
        fitted: Any = settings.task.fitted(images, run.global_batch_size, run.total_steps, classes)
        fitted = replace(fitted, **{key: 0.0 for key in DRAWN if hasattr(fitted, key)})
        with torch.device("meta"):  # initialization would need the values of fake tensors
            self.task = make_task(replace(settings, task=fitted), run)
        if self.precision == "float64":
            self.task.double()
        self.total_params = sum(value.numel() for value in self.task.state_dict().values())
        self.peaks: dict[tuple[int, int, bool], int] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.task.to_empty(device="cpu")

    @cached_property
    def flops_per_image(self) -> int:
        """FLOPs of all matrix products, forward and backward; attention counts as two in any kernel.

        The mean over the run, if its resolution changes.
        """
        total = 0.0
        for side, share in self.settings.data.fractions_of_sides.items():
            with self._faked(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                self.task.compute(self._example(FEW, side), 0).objective.backward()
            self.task.zero_grad()
            total += share * counter.get_total_flops()
        return round(total) // FEW

    def peak(self, images: int, passes: int, has_gradients: bool = False) -> int:
        """Peak bytes in the passes of a step: gradients and images are included, weights are not.

        Args:
            images: Images per pass.
            passes: Forward passes in the step.
            has_gradients: Whether gradients are allocated before the step, and therefore not counted.
        """
        passes = min(passes, 2)  # the gradients of the first stay while the second runs
        key = images, passes, has_gradients
        if key in self.peaks:
            return self.peaks[key]
        known = [*self.task.parameters(), *self.task.buffers()]
        with self._faked(), FusedKernels() if self.on_gpu else one_chunk(self.task):
            if has_gradients:
                for parameter in self.task.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
                        known.append(parameter.grad)
            with LiveBytes(known) as live:
                for _ in range(passes):
                    batch = self._example(images, self.settings.data.largest_side)
                    with self._autocast():
                        loss = self.task.compute(batch, 0).objective
                    _backward(loss)
                    del batch, loss
        self.task.zero_grad()
        self.peaks[key] = live.peak
        return live.peak

    @contextmanager
    def _faked(self) -> Iterator[None]:
        try:
            with self.mode:
                yield
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ValueError(
                f"task.name: a step of {self.settings.task.name} depends on what its images show or on what is drawn "
                "for each, so it cannot be counted beforehand."
            ) from error

    def _autocast(self) -> Any:
        # float16 has the same size, and never writes out attention scores, as bf16 may on a CPU
        dtype = torch.float16 if self.on_gpu else torch.bfloat16
        return torch.autocast("cpu", dtype, enabled=self.precision == "bf16")

    def _example(self, count: int, side: int | None = None) -> Batch:
        batch = example(self.settings, count, side)
        batch.views = [view.to(self.task.dtype) for view in batch.views]
        return batch


def _backward(loss: Tensor) -> None:
    """Like loss.backward(), but within FusedKernels, where recomputed blocks must run, too."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)


def example(settings: RunSettings, count: int = FEW, side: int | None = None) -> Batch:
    """A batch as the task would get it; `side` is the side of the main views, None for the encoder's own."""
    numbers = torch.zeros(count, dtype=torch.long)
    images = [torch.zeros(count, settings.encoder.channels, *size) for size in view_sizes(settings, side)]
    return Batch(images, numbers, numbers, torch.ones(count, dtype=torch.bool), numbers)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors while active, each storage once; `peak` is the largest number.

    Args:
        known: Tensors that are not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = {value.untyped_storage()._cdata: 0 for value in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.on_alloc, result)
        return result

    def on_alloc(self, value: Tensor) -> Tensor:
        """Count a tensor's storage, once."""
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.on_free, key)
        return value

    def on_free(self, key: int) -> None:
        """Subtract a freed storage."""
        self.now -= self.alive.pop(key)


@contextmanager
def one_chunk(task: nn.Module) -> Iterator[None]:
    """While active, attention that is written out computes one chunk of a batch: the others would take its place."""
    attentions = [module for module in task.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.written_out = _OneChunk
    try:
        yield
    finally:
        for attention in attentions:
            del attention.written_out


class FusedKernels(TorchFunctionMode):
    """While active, attention and norms keep the same tensors as a GPU's kernels; their results are meaningless."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if function in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), bias)


def _rms_norm(tokens: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return _RMSNorm.apply(tokens, weight)


class _OneChunk(torch.autograd.Function):
    """`WrittenOutAttention` of the first chunk, with room for the results of all."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        mixed = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, bias, mixed)
        ctx.scale = scale
        query, key, value = next(in_chunks(query, key, value))
        WrittenOutAttention.mixed(query, key, value, bias, scale)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *saved, bias, mixed = ctx.saved_tensors
        gradients = [torch.empty_like(one) for one in saved]
        query, key, value, mixed, grad = next(in_chunks(*saved, mixed, grad))
        WrittenOutAttention.gradients(query, key, value, mixed, grad, bias, ctx.scale)
        return *gradients, None, None


class _Attention(torch.autograd.Function):
    """The fused kernel keeps its inputs, its output and one number per row of the scores, which it recomputes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        mixed = query.new_empty(batch, length, heads, width).transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, mixed, query.new_empty(batch, heads, length, dtype=torch.float))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, bias, *_ = ctx.saved_tensors
        of_bias = None
        if ctx.needs_input_grad[3]:
            every = query.new_empty(*query.shape[:3], key.shape[2])
            of_bias = every.sum_to_size(bias.shape).to(bias.dtype)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_bias


class _RMSNorm(torch.autograd.Function):
    """The fused kernel keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight, tokens.new_empty(tokens.shape[:-1]))
        return torch.empty_like(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tokens, weight, _ = ctx.saved_tensors
        return torch.empty_like(tokens), torch.empty_like(weight)
