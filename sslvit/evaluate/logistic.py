"""Multinomial logistic regression to convergence: many problems on the same features, side by side.

They share the features, so one matrix product serves them all. Most of the way is gone in float32; the last steps, and
the verdict that a problem is solved, are in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

HISTORY = 10  # steps that L-BFGS remembers
ROWS_FOR_AXES = 10_000
ROUGH = 1e-5  # largest entry of a gradient from which on float32 is too coarse
LARGEST_PIECE = 2**27  # logits at a time: half a gigabyte in float32


def fit_logistic(
    values: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"] | Float[Tensor, "n classes"],
    classes: int,
    strengths: Float[Tensor, "p"],
    used: Bool[Tensor, "p n"] | Float[Tensor, "p n"] | None = None,
    max_iterations: int = 5000,
    tolerance: float = 1e-5,
) -> tuple[Float[Tensor, "p classes d"], Float[Tensor, "p classes"], bool]:
    """Minimise mean cross-entropy + strength / 2 * |weight|^2 for p problems on the same features, by L-BFGS.

    Args:
        values: features, float64.
        labels: class numbers, or each row's shares of the classes.
        classes: how many there are.
        strengths: of the penalty on the weights, one per problem, float64; the bias is free.
        used: which rows each problem is fitted on, or how much each counts; all alike for None.
        max_iterations: at most, in each precision.
        tolerance: largest entry of the gradient at which a problem counts as solved.

    Returns:
        Weights and biases of each problem, and whether all are solved.
    """
    axes, spread = principal_axes(values)
    values = values @ axes
    problems, width = len(strengths), values.shape[1]
    # half the features' covariance bounds the curvature (Boehning 1992), and along its axes it is diagonal
    curvature = torch.cat([spread / 2 + strengths[:, None], spread.new_full((problems, 1), 0.5)], 1)
    inverse = (1 / curvature)[:, None].expand(-1, classes, -1).flatten(1)
    share = values.new_ones(problems, len(values)) if used is None else used.to(values)
    share = share / share.sum(1, keepdim=True)
    extended = torch.cat([values, values.new_ones(len(values), 1)], 1)  # the last feature is the bias
    target = (F.one_hot(labels, classes) if labels.ndim == 1 else labels).T.contiguous()  # classes n
    penalty = strengths[:, None, None] * torch.cat([values.new_ones(width), values.new_zeros(1)])
    theta, steps, is_solved = torch.zeros_like(inverse), [], False
    for dtype, until in ((torch.float32, max(tolerance, ROUGH)), (torch.float64, tolerance)):
        objective = penalised_loss(*(part.to(dtype) for part in (extended, target, share, penalty)))
        steps = [tuple(part.to(dtype) for part in step) for step in steps]
        theta, steps, is_solved = minimise(objective, theta.to(dtype), inverse.to(dtype), max_iterations, until, steps)
    theta = theta.view(problems, classes, width + 1)
    return theta[:, :, :-1] @ axes.T, theta[:, :, -1].contiguous(), is_solved


def penalised_loss(
    values: Float[Tensor, "n k"],
    target: Float[Tensor, "classes n"],
    share: Float[Tensor, "p n"],
    penalty: Float[Tensor, "p 1 k"],
) -> Callable[[Float[Tensor, "p m"]], tuple[Float[Tensor, "p"], Float[Tensor, "p m"]]]:
    """theta -> cross-entropy, rows weighted by their share, + penalty / 2 * theta^2; and its gradient."""
    problems, classes, width = len(share), len(target), values.shape[1]
    rows = max(1, LARGEST_PIECE // (problems * classes))
    pieces = list(zip(values.split(rows), target.split(rows, 1), share.split(rows, 1), strict=True))

    def objective(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.view(problems, classes, width)
        loss = (penalty * theta.square()).sum((1, 2)) / 2
        gradient = penalty * theta
        for x, right, weight in pieces:  # n k, classes n, p n
            logits = (theta.flatten(0, 1) @ x.T).view(problems, classes, -1)
            logits -= logits.amax(1, keepdim=True)
            of_right = (logits * right).sum(1)
            total = logits.exp_().sum(1)  # p n
            loss = loss + ((total.log() - of_right) * weight).sum(1)
            residual = logits.div_(total[:, None]).sub_(right).mul_(weight[:, None])
            gradient = gradient + (residual.flatten(0, 1) @ x).view_as(gradient)
        return loss, gradient.flatten(1)

    return objective


Step = tuple[Tensor, Tensor, Tensor]  # step, change of gradient, 1 / their product


def minimise(
    objective: Callable, start: Float[Tensor, "p m"], inverse: Float[Tensor, "p m"], max_iterations: int,
    tolerance: float, steps: list[Step],
) -> tuple[Float[Tensor, "p m"], list[Step], bool]:  # fmt: skip
    """L-BFGS (Liu and Nocedal 1989) on p independent smooth convex problems side by side.

    Args:
        objective: theta -> values 'p' and gradients 'p m'.
        start: where to begin.
        inverse: a guess at the inverse of the curvature, entry by entry; the better, the fewer steps.
        max_iterations: at most.
        tolerance: largest entry of a gradient at which its problem is done.
        steps: that an earlier search of these problems ended with.

    Returns:
        Where each search ended, its last steps, and whether all reached the tolerance.
    """
    theta = start
    value, gradient = objective(theta)
    tiny, rounding = torch.finfo(theta.dtype).tiny, 10 * torch.finfo(theta.dtype).eps
    for _ in range(max_iterations):
        is_open = gradient.abs().amax(1) > tolerance
        if not is_open.any():
            return theta, steps, True
        direction = -_quasi_newton(gradient, inverse, steps)
        slope = (direction * gradient).sum(1)
        length = is_open.to(theta)
        while True:
            new_theta = theta + length[:, None] * direction
            new_value, new_gradient = objective(new_theta)
            is_short = new_value > value + 1e-4 * length * slope + rounding * value
            is_short &= length > 1e-10
            if not is_short.any():
                break
            length = torch.where(is_short, length / 2, length)
        step, change = new_theta - theta, new_gradient - gradient
        if not step.any():
            break  # the precision is spent
        product = (step * change).sum(1)
        weight = torch.where(product > tiny, 1 / product, torch.zeros_like(product))
        steps = [*steps[1 - HISTORY :], (step, change, weight)]
        theta, value, gradient = new_theta, new_value, new_gradient
    return theta, steps, False


def principal_axes(values: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d m"], Float[Tensor, "m"]]:
    """Axes of the features' covariance and about the variance along each; as many as there can be (m = min(n, d)).

    Weights of a penalised linear model lie in the span of its features, so nothing is lost where n is below d.
    """
    if len(values) < values.shape[1]:
        _, lengths, axes = torch.linalg.svd(values, full_matrices=False)
        return axes.T, lengths.square() / len(values)
    some = values[:: max(1, len(values) // ROWS_FOR_AXES)]  # they only have to be about right
    spread, axes = torch.linalg.eigh(some.T @ some / len(some))
    return axes, spread.clamp(min=0)


def _quasi_newton(gradient: Tensor, inverse: Tensor, steps: list[Step]) -> Tensor:
    """The inverse curvature, as guessed and as seen in the last steps, applied to the gradient (two-loop recursion)."""
    direction = gradient
    alphas = []
    for step, change, weight in reversed(steps):
        alphas.append(weight * (step * direction).sum(1))
        direction = direction - alphas[-1][:, None] * change
    direction = direction * inverse
    if steps:
        step, change, weight = steps[-1]
        size = (step * change).sum(1) / (change.square() * inverse).sum(1).clamp(min=torch.finfo(gradient.dtype).tiny)
        direction = direction * torch.where(weight > 0, size, torch.ones_like(size))[:, None]
    for (step, change, weight), alpha in zip(steps, reversed(alphas), strict=True):
        direction = direction + (alpha - weight * (change * direction).sum(1))[:, None] * step
    return direction
