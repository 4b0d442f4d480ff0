"""Between a step's gradients and the weights: are they finite, are they clipped, is the step skipped?"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sslvit.optim.clip import clip_by_global_norm, clip_by_parameter_norm, grad_norms
from sslvit.settings import OptimSettings


class StepGuard:
    """Clips gradients, and skips a step whose loss or gradient is not finite, so that it changes nothing.

    A skipped step leaves no gradients, so the optimizer keeps weights, moments and decay; buffers that forward passes
    changed (running statistics, sums) are put back. All ranks decide alike, since the norms are the same on each.

    Args:
        network: The weights that are trained, and buffers.
        settings: Where gradients are clipped.
    """

    def __init__(self, network: nn.Module, settings: OptimSettings) -> None:
        self.network, self.settings = network, settings
        self.skipped = False  # the last step
        self.not_finite: list[str] = []  # parameters whose gradients were not finite in it
        self.grad_norm: Tensor | None = None  # over all weights, before clipping
        self._buffers: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self) -> None:
        """Keep the buffers as they are before the first forward pass of a step."""
        buffers = list(self.network.buffers())
        if len(self._buffers) != len(buffers):
            self._buffers = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._buffers, buffers)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate; a loss that is not finite makes every gradient so, on every rank."""
        loss.backward(torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss))

    def check_gradients(self) -> None:
        """Clip the gradients, or drop them where they are not finite."""
        named = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        gradients = list(named.values())
        norms = grad_norms(gradients)
        if self.settings.clip_grad:
            clip = clip_by_parameter_norm if self.settings.clip_grad_by == "parameter" else clip_by_global_norm
            clip(gradients, norms, self.settings.clip_grad)
        self.grad_norm = norms.norm()
        self.skipped = not bool(self.grad_norm.isfinite())
        self.not_finite = []
        if self.skipped:
            finite = norms.isfinite().tolist()
            self.not_finite = [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]
            self.network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def end_step(self) -> None:
        """Undo what the forward passes of a skipped step changed in the buffers."""
        if self.skipped and self._buffers:
            torch._foreach_copy_(list(self.network.buffers()), self._buffers)
