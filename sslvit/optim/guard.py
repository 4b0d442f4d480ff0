"""Between a step's gradients and the weights: are they finite, are they clipped, is the step skipped?"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sslvit.optim.clip import clip_by_global_norm, clip_by_parameter_norm, grad_norms
from sslvit.settings import OptimSettings

MAX_PENDING = 64  # steps whose outcome nobody has asked for


class HostCopy:
    """A tensor on its way from the device to the host, for which nothing waits until it is read."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.arrival = value, None
        if value.device.type == "cuda":
            pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self.value = pinned.copy_(value, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(value.device))  # which the copy is queued on

    @property
    def is_here(self) -> bool:
        """Whether reading it would wait for nothing."""
        return self.arrival is None or self.arrival.query()

    def read(self) -> Tensor:
        """The tensor on the host; waits until it is there."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.value


class StepOutcome(NamedTuple):
    """What became of one step.

    Attributes:
        step: Its number, counted from one.
        skipped: Whether it changed nothing.
        not_finite: Names of the parameters whose gradients were not finite.
    """

    step: int
    skipped: bool
    not_finite: list[str]


class StepGuard:
    """Clips gradients, and skips a step whose loss or gradient is not finite, so that it changes nothing.

    Whether a step is skipped is a number on the device, which the optimizer reads there (as `found_inf` of mixed
    precision): weights, moments and their decay stay, and buffers that forward passes changed (running statistics,
    sums) are put back. The host learns of it later, so it waits for nothing. All ranks decide alike, since the norms
    are the same on each.

    Args:
        network: The weights that are trained, and buffers.
        settings: Where gradients are clipped.
    """

    def __init__(self, network: nn.Module, settings: OptimSettings) -> None:
        self.network, self.settings = network, settings
        self.skip = torch.zeros(())  # 1 where the last step is skipped, else 0; a number on the device
        self.grad_norm: Tensor | None = None  # over all weights, before clipping
        self._kept: list[tuple[Tensor, Tensor, int]] = []  # each buffer, its values before the step, and its version
        self._pending: deque[tuple[int, HostCopy, Tensor, list[str]]] = deque(maxlen=MAX_PENDING)

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped; waits for the device."""
        return bool(self.skip)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Keep the buffers as they are before the first forward pass of a step."""
        buffers, copies = list(self.network.buffers()), [before for _, before, _ in self._kept]
        if len(copies) != len(buffers):
            copies = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(copies, buffers)
        # running statistics are changed by kernels that do not say so
        statistics = {id(b) for m in self.network.modules() if isinstance(m, _NormBase) for b in m.buffers(False)}
        versions = [-1 if id(buffer) in statistics else buffer._version for buffer in buffers]
        self._kept = list(zip(buffers, copies, versions, strict=True))

    def backward(self, loss: Tensor) -> None:
        """Backpropagate; a loss that is not finite makes every gradient so, on every rank."""
        loss.backward(loss.detach() * 0 + 1)  # 1, or NaN

    @torch.no_grad()
    def check_gradients(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Clip the gradients, and tell the optimizer to skip the step where they are not finite.

        Args:
            optimizer: Is about to move the weights.
            step: Its number, counted from one.
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
        elif self.skipped:  # an optimizer that cannot be told passes by what has no gradient
            self.network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def end_step(self) -> None:
        """Undo what the forward passes of a skipped step changed in the buffers."""
        is_skipped = self.skip.bool()
        for buffer, before, version in self._kept:
            if buffer._version != version:
                buffer.copy_(torch.where(is_skipped, before, buffer))

    def outcomes(self, wait: bool) -> Iterator[StepOutcome]:
        """What became of the steps since this was asked last, in their order.

        Args:
            wait: Whether to wait for the device; otherwise steps that it has not finished come the next time.
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
        """Number of steps whose outcome has not been asked for."""
        return len(self._pending)
