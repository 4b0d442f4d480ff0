"""Checks between the backward pass and the optimizer: clip gradients, and skip steps that are not finite.

Gradients may be sharded over ranks (FSDP2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sslvit.ranks import all_reduce_sum
from sslvit.settings import OptimSettings

MAX_PENDING = 64  # steps with an outcome that has not been read yet


class HostCopy:
    """An asynchronous copy of a tensor from the device to the host; only reading it waits."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.arrival = value, None
        if value.device.type == "cuda":
            pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self.value = pinned.copy_(value, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(value.device))  # the stream of the copy

    @property
    def is_here(self) -> bool:
        """Whether the copy has arrived, so that reading it does not wait."""
        return self.arrival is None or self.arrival.query()

    def read(self) -> Tensor:
        """Wait for the copy, and return the tensor on the host."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.value


class StepOutcome(NamedTuple):
    """The outcome of one step.

    Attributes:
        step: Its number, counted from one.
        skipped: Whether the update was skipped.
        not_finite: Names of the parameters with non-finite gradients.
    """

    step: int
    skipped: bool
    not_finite: list[str]


class StepGuard:
    """Clips gradients, and skips steps with a loss or gradient that is not finite, so that they change nothing.

    The decision to skip a step is a tensor on the device, which the optimizer reads there (like `found_inf` in mixed
    precision). In a skipped step, weights and moments stay unchanged, without weight decay, and buffers that the
    forward passes changed (running statistics, sums) are restored. The host reads the decision later, without waiting
    for the device. All ranks decide alike, since the norms are identical on each.

    Args:
        network: The module with the trained weights and the buffers.
        settings: Settings of gradient clipping.
    """

    def __init__(self, network: nn.Module, settings: OptimSettings) -> None:
        self.network, self.settings = network, settings
        self.skip = torch.zeros(())  # 1 if the last step was skipped, else 0; on the device
        self.grad_norm: Tensor | None = None  # global norm before clipping
        self._kept: list[tuple[Tensor, Tensor, int]] = []  # each buffer, its values before the step, and its version
        self._pending: deque[tuple[int, HostCopy, Tensor, list[str]]] = deque(maxlen=MAX_PENDING)

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped; waits for the device."""
        return bool(self.skip)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Copy the buffers before the first forward pass of a step."""
        buffers, copies = list(self.network.buffers()), [before for _, before, _ in self._kept]
        if len(copies) != len(buffers):
            copies = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(copies, buffers)
        # kernels that update running statistics do not increase the version counter
        statistics = {id(b) for m in self.network.modules() if isinstance(m, _NormBase) for b in m.buffers(False)}
        versions = [-1 if id(buffer) in statistics else buffer._version for buffer in buffers]
        self._kept = list(zip(buffers, copies, versions, strict=True))

    def backward(self, loss: Tensor) -> None:
        """Backpropagate; a loss that is not finite makes every gradient non-finite, on every rank."""
        loss.backward(loss.detach() * 0 + 1)  # 1, or NaN

    @torch.no_grad()
    def check_gradients(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Clip the gradients, and make the optimizer skip the step if they are not finite.

        Args:
            optimizer: The optimizer that is about to update the weights.
            step: The number of the step, counted from one.
        """
        named = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        gradients = list(named.values())
        norms = grad_norms(gradients)
        if self.settings.clip_grad:
            clip = clip_by_parameter_norm if self.settings.clip_grad_by == "parameter" else clip_by_global_norm
            clip(gradients, norms, self.settings.clip_grad)
        self.grad_norm = norms.norm()
        self.skip = 1 - self.grad_norm.isfinite().float()
        self._pending.append((step, HostCopy(self.skip), norms, list(named)))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf, optimizer.grad_scale = self.skip, None  # type: ignore[attr-defined]  # as GradScaler's
        elif self.skipped:  # other optimizers ignore parameters without a gradient
            self.network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def end_step(self) -> None:
        """Restore the buffers that the forward passes of a skipped step changed."""
        is_skipped = self.skip.bool()
        for buffer, before, version in self._kept:
            if buffer._version != version:
                buffer.copy_(torch.where(is_skipped, before, buffer))

    def outcomes(self, wait: bool) -> Iterator[StepOutcome]:
        """Yield the outcomes of all steps since the last call, in order.

        Args:
            wait: Whether to wait for the device; otherwise, unfinished steps are left for the next call.
        """
        while self._pending and (wait or self._pending[0][1].is_here):
            step, skip, norms, names = self._pending.popleft()
            if not skip.read():
                yield StepOutcome(step, False, [])
                continue
            finite = zip(names, norms.isfinite().tolist(), strict=True)
            yield StepOutcome(step, True, [name for name, is_finite in finite if not is_finite])

    @property
    def pending(self) -> int:
        """Number of steps with an outcome that has not been read yet."""
        return len(self._pending)


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
