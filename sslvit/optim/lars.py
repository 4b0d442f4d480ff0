"""Layer-wise adaptive rates (You et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum that scales the update of each matrix to the norm of the matrix, as in MAE's linear probe.

    Vectors have neither weight decay nor scaling.

    Args:
        parameters: parameters to update.
        lr: learning rate, applied outside the momentum, so that a change of the rate acts on the whole history.
        weight_decay: factor of the weights that are added to the gradients of matrices.
        momentum: Momentum of the scaled gradients.
        trust: norm of a matrix's update relative to the norm of the matrix, at a learning rate of 1.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.9,
        trust: float = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                change = parameter.grad
                if parameter.ndim > 1:
                    change = change + group["weight_decay"] * parameter
                    size, step = parameter.norm(), change.norm()
                    is_zero = (size == 0) | (step == 0)
                    change = change * torch.where(is_zero, 1.0, group["trust"] * size / step)
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(change)
                parameter.sub_(group["lr"] * state["momentum"])
        return loss
