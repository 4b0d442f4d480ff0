"""Muon (Jordan et al. 2024): momentum whose updates of matrices are made nearly orthogonal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the iteration's polynomial (Jordan et al. 2024)
ITERATIONS = 5
RMS = 0.2  # of an update's entries relative to the learning rate, about that of AdamW (Liu et al. 2025, section 2.2)


def block_matrices(name: str, parameter: nn.Parameter) -> int:
    """Number of matrices stacked in a parameter that Muon updates: weights of transformer blocks; 0 for all others.

    Queries, keys and values are three. Embeddings, heads, norms and biases are AdamW's (Jordan et al. 2024).
    """
    if parameter.ndim != 2 or ".blocks." not in f".{name}" or not name.endswith(".weight"):
        return 0
    return 3 if name.endswith(".qkv.weight") else 1


def check_matrices(network: nn.Module) -> None:
    """Refuse a network that Muon cannot train.

    Raises:
        ValueError: It has no transformer blocks, or its weights are sharded over ranks.
    """
    matrices = [p for name, p in network.named_parameters() if block_matrices(name, p)]
    if not matrices:
        raise ValueError(
            "optim.name: muon is for matrices of transformer blocks, and this network has none. Use adamw."
        )
    if any(hasattr(matrix, "to_local") for matrix in matrices):
        raise ValueError("optim.name: muon needs whole matrices, and these weights are sharded. Use ddp, or adamw.")


def orthogonalize(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Move all singular values of each matrix close to 1 by Newton-Schulz iterations in bfloat16, as the paper does.

    The polynomial trades accuracy for speed: singular values end between about 0.7 and 1.2.

    Args:
        matrices: Matrices; with more rows than columns, the products would only cost more.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class Matrix(NamedTuple):
    """Views of a matrix, of its gradient and of its momentum; transposed if it has more rows than columns."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor


class Muon(torch.optim.AdamW):
    """Muon for groups with `matrices`, and fused AdamW for the others.

    Learning rate and weight decay mean the same for both, since Muon's updates are scaled to the size of AdamW's
    (Liu et al. 2025). Like fused AdamW, it skips a step whose `found_inf` is set, without waiting for the device.

    Args:
        groups: Parameter groups; `matrices` is the number of matrices that are stacked in each of a group's parameters,
            0 for AdamW (`block_matrices`).
        lr: Learning rate.
        betas: Coefficients of AdamW's moving averages.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[torch.Size, float, float], list[Matrix]] = defaultdict(list)
        gradients = []
        for group in self.param_groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.grad is None:
                    continue
                for matrix in self.stacked_matrices(parameter, parameter.grad, group["matrices"]):
                    alike[matrix.weight.shape, group["lr"], group["weight_decay"]].append(matrix)
                gradients.append((parameter, parameter.grad))
                parameter.grad = None  # so that AdamW passes over it
        super().step()
        for (_, lr, weight_decay), matrices in alike.items():
            self.update(matrices, lr, weight_decay)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return loss

    def stacked_matrices(self, parameter: Tensor, gradient: Tensor, count: int) -> Iterator[Matrix]:
        """The matrices of a parameter."""
        state = self.state[parameter]
        if "momentum" not in state:
            # loading AdamW's state requires `step` in each
            state |= {"step": torch.zeros((), device=parameter.device), "momentum": torch.zeros_like(parameter)}
        for views in zip(*(t.chunk(count) for t in (parameter, gradient, state["momentum"])), strict=True):
            is_tall = views[0].shape[0] > views[0].shape[1]
            yield Matrix(*(view.mT if is_tall else view for view in views))

    def update(self, matrices: list[Matrix], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape, all products in one batch."""
        weights, gradients, momenta = (list(tensors) for tensors in zip(*matrices, strict=True))
        old, gradient, before = torch.stack(weights), torch.stack(gradients), torch.stack(momenta)
        after = before.lerp(gradient, 1 - MOMENTUM)
        direction = orthogonalize(gradient.lerp(after, MOMENTUM))  # Nesterov's momentum
        new = old * (1 - lr * weight_decay) - lr * RMS * max(direction.shape[1:]) ** 0.5 * direction
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            new, after = torch.where(skip.bool(), old, new), torch.where(skip.bool(), before, after)
        torch._foreach_copy_(weights, list(new))
        torch._foreach_copy_(momenta, list(after))
