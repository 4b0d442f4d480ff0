"""Multinomial logistic regression to convergence: many problems on the same features, side by side.

The problems share the features, so one matrix product serves them all. Most iterations run in float32; the last ones
and the test for convergence run in float64. A weak penalty curves the loss only a little, so the tolerance depends on
it: a gradient of g leaves the weights within g / l2 of the optimum.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslvit.progress import track

SOLVED = 1e-3  # largest entry of the gradient over l2; weights are then right to a thousandth of the largest
MAX_GRADIENT = 1e-5  # largest entry of a solved problem's gradient, however strong its penalty
MAX_ITERATIONS = 5000  # in each precision
HISTORY = 10  # steps that L-BFGS remembers
ROWS_FOR_AXES = 10_000
ROUGH = 1e-5  # largest entry of a gradient below which float32 is too coarse
MIN_STEP = 1e-10  # smallest fraction of a step that a line search tries
REFRESH = 25  # iterations between two computations of the curvature
MAX_LOGITS = 2**27  # logits at a time: half a gigabyte in float32
# on a CPU: few enough for its cache; with more, 45,000 images, 10 classes and 45 penalties take 1.3 times the CPU time
MAX_LOGITS_ON_CPU = 2**20


def fit_logistic(
    values: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"] | Float[Tensor, "n classes"],
    classes: int,
    l2: Float[Tensor, "p"],
    used: Bool[Tensor, "p n"] | Float[Tensor, "p n"] | None = None,
    max_iterations: int = MAX_ITERATIONS,
    solved: float = SOLVED,
) -> tuple[Float[Tensor, "p classes d"], Float[Tensor, "p classes"], Bool[Tensor, "p"]]:
    """Minimize mean cross-entropy + l2 / 2 * |weight|^2 for p problems on the same features, by L-BFGS.

    Args:
        values: features, float64.
        labels: class numbers, or class probabilities of each row.
        classes: number of classes.
        l2: weight of the penalty, one per problem, float64; the bias is not penalized.
        used: the rows that each problem is fitted on, or the weight of each row; None for equal weights.
        max_iterations: largest number of iterations in each precision.
        solved: largest entry of the gradient over l2 at which a problem counts as solved.

    Returns:
        Weights and biases of each problem, and whether it is solved.
    """
    tolerance = (solved * l2).clamp(max=MAX_GRADIENT)
    axes = principal_axes(values)
    problems, width = len(l2), axes.shape[1]
    row_weight = values.new_ones(problems, len(values)) if used is None else used.to(values)
    row_weight = row_weight / row_weight.sum(1, keepdim=True)
    extended = values.new_ones(len(values), width + 1)  # the last feature is the bias
    extended[:, :-1] = values @ axes
    target = labels
    if labels.ndim == 2:
        target = labels.T.double().contiguous()  # classes n
        target = target / target.sum(0).clamp(min=1e-12)  # the gradient needs sums of 1 to the last digit
    penalty = l2[:, None, None] * torch.cat([values.new_ones(width), values.new_zeros(1)])
    theta = values.new_zeros(problems, classes * (width + 1))
    rough_target = target.float() if target.is_floating_point() else target
    rough = PenalizedLoss(extended.float(), rough_target, row_weight.float(), penalty.float(), classes)
    theta, steps, _ = minimize(rough, theta.float(), max_iterations, tolerance.clamp(min=ROUGH).float(), [])
    del rough  # also frees its copy of the features
    theta = theta.double()
    exact = PenalizedLoss(extended, target, row_weight, penalty, classes)
    largest = exact(theta)[1].abs().amax(1)
    is_open, is_solved = largest > tolerance, largest <= tolerance  # neither, where it is not a number
    if is_open.any():  # problems with strong penalties are solved already
        rest = PenalizedLoss(extended, target, row_weight[is_open], penalty[is_open], classes)
        steps = [(s[is_open].double(), change[is_open].double(), w[is_open].double()) for s, change, w in steps]
        theta[is_open], _, is_solved[is_open] = minimize(
            rest, theta[is_open], max_iterations, tolerance[is_open], steps
        )
    theta = theta.view(problems, classes, width + 1)
    return theta[:, :, :-1] @ axes.T, theta[:, :, -1].contiguous(), is_solved


class PenalizedLoss:
    """Weighted cross-entropy + penalty / 2 * theta^2 of p problems; targets are class numbers or probabilities."""

    def __init__(
        self, values: Float[Tensor, "n k"], target: Int[Tensor, "n"] | Float[Tensor, "classes n"],
        row_weight: Float[Tensor, "p n"], penalty: Float[Tensor, "p 1 k"], classes: int,
    ) -> None:  # fmt: skip
        self.penalty, self.shape = penalty, (len(row_weight), classes, values.shape[1])
        most = MAX_LOGITS_ON_CPU if values.device.type == "cpu" else MAX_LOGITS
        rows = max(1, most // (len(row_weight) * classes))
        self.pieces = list(zip(values.split(rows), target.split(rows, -1), row_weight.split(rows, 1), strict=True))

    def only(self, chosen: Bool[Tensor, "p"]) -> PenalizedLoss:
        """The chosen problems alone."""
        one = copy.copy(self)
        one.penalty, one.shape = self.penalty[chosen], (int(chosen.sum()), *self.shape[1:])
        one.pieces = [(x, right, weight[chosen]) for x, right, weight in self.pieces]
        return one

    def __call__(self, theta: Float[Tensor, "p m"]) -> tuple[Float[Tensor, "p"], Float[Tensor, "p m"]]:
        """The loss and its gradient."""
        theta = theta.view(self.shape)
        loss = (self.penalty * theta.square()).sum((1, 2)) / 2
        gradient = self.penalty * theta
        for x, right, weight in self.pieces:  # n k, n or classes n, p n
            logits = self.logits(theta, x)
            at_right = right.expand(len(logits), 1, -1) if right.ndim == 1 else None  # needs no one-hot matrix
            of_right = (logits * right).sum(1) if at_right is None else logits.gather(1, at_right)[:, 0]
            total = logits.exp_().sum(1)  # p n
            loss = loss + ((total.log() - of_right) * weight).sum(1)
            probs = logits.div_(total[:, None])
            if at_right is None:
                probs.sub_(right)
            else:
                probs.scatter_(1, at_right, probs.gather(1, at_right) - 1)
            residual = probs.mul_(weight[:, None])
            gradient = gradient + (residual.flatten(0, 1) @ x).view_as(gradient)
        return loss, gradient.flatten(1)

    def curvature(self, theta: Float[Tensor, "p m"]) -> Float[Tensor, "p m"]:
        """The diagonal of the matrix of second derivatives."""
        theta = theta.view(self.shape)
        diagonal = self.penalty.expand(self.shape).clone()
        for x, _, weight in self.pieces:
            probs = self.logits(theta, x).softmax(1)
            variance = probs.mul_(1 - probs).mul_(weight[:, None])  # p classes n
            diagonal += (variance.flatten(0, 1) @ x.square()).view_as(diagonal)
        return diagonal.flatten(1)

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits 'p classes n', shifted so that the largest one of each row is 0."""
        problems, classes, _ = self.shape
        logits = (theta.flatten(0, 1) @ x.T).view(problems, classes, -1)
        return logits - logits.amax(1, keepdim=True)


Step = tuple[Tensor, Tensor, Tensor]  # step, change of gradient, 1 / their product


def minimize(
    objective: PenalizedLoss, start: Float[Tensor, "p m"], max_iterations: int, tolerance: Float[Tensor, "p"],
    steps: list[Step],
) -> tuple[Float[Tensor, "p m"], list[Step], Bool[Tensor, "p"]]:  # fmt: skip
    """L-BFGS (Liu and Nocedal 1989) on p independent smooth convex problems side by side.

    A problem has converged when no entry of its gradient exceeds its tolerance; the others continue without it. `steps`
    are the last steps of an earlier search on these problems.

    Returns:
        Final parameters of each problem, its last steps, and whether it reached the tolerance.
    """
    found, is_solved = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    rows, theta = torch.arange(len(start), device=start.device), start  # of the open problems
    value, gradient = objective(theta)
    inverse, tiny, rounding = theta, torch.finfo(theta.dtype).tiny, 10 * torch.finfo(theta.dtype).eps
    for iteration in track(range(max_iterations), "logistic regression", max_iterations, "iterations at most"):
        largest = gradient.abs().amax(1)
        is_open = largest > tolerance
        if not is_open.all():
            found[rows], is_solved[rows] = theta, largest <= tolerance
            if not is_open.any():
                break
            objective = objective.only(is_open)
            theta, value, gradient, tolerance = (tensor[is_open] for tensor in (theta, value, gradient, tolerance))
            steps, rows = [(s[is_open], change[is_open], w[is_open]) for s, change, w in steps], rows[is_open]
            inverse = inverse[is_open]
        if iteration % REFRESH == 0:  # along the covariance's axes the curvature is nearly diagonal
            curvature = objective.curvature(theta)
            inverse = 1 / curvature.clamp(min=1e-3 * float(curvature.amax()) * rounding)
        direction = -_quasi_newton(gradient, inverse, steps)
        slope = (direction * gradient).sum(1)
        length = torch.ones_like(value)
        while True:
            new_theta = theta + length[:, None] * direction
            new_value, new_gradient = objective(new_theta)
            # a loss near 0 is a difference of logits, so its rounding error is that of the logits
            is_short = new_value > value + 1e-4 * length * slope + rounding * (1 + value)
            is_short &= length > MIN_STEP
            if not is_short.any():
                break
            length = torch.where(is_short, length / 2, length)
        step, change = new_theta - theta, new_gradient - gradient
        if not (length > MIN_STEP).any():
            break  # this precision resolves no further step
        product = (step * change).sum(1)
        weight = torch.where(product > tiny, 1 / product, torch.zeros_like(product))
        steps = [*steps[1 - HISTORY :], (step, change, weight)]
        theta, value, gradient = new_theta, new_value, new_gradient
    found[rows], is_solved[rows] = theta, gradient.abs().amax(1) <= tolerance
    steps = [(_spread(s, rows, found), _spread(change, rows, found), _spread(w, rows, found)) for s, change, w in steps]
    return found, steps, is_solved


def principal_axes(values: Float[Tensor, "n d"]) -> Float[Tensor, "d m"]:
    """Axes of the features' covariance, m = min(n, d) of them.

    Weights of a penalized linear model lie in the span of its features, so nothing is lost where n is below d.
    """
    if len(values) < values.shape[1]:
        return torch.linalg.svd(values, full_matrices=False).Vh.T
    some = values[:: max(1, len(values) // ROWS_FOR_AXES)]  # approximate axes are enough
    return torch.linalg.eigh(some.T @ some / len(some)).eigenvectors


def _spread(values: Float[Tensor, "open *k"], rows: Int[Tensor, "open"], every: Float[Tensor, "p m"]) -> Tensor:
    """The rows of the open problems within a tensor for all problems, which is 0 elsewhere."""
    return values.new_zeros(len(every), *values.shape[1:]).index_copy_(0, rows, values)


def _quasi_newton(gradient: Tensor, inverse: Tensor, steps: list[Step]) -> Tensor:
    """Two-loop recursion: apply the inverse curvature, estimated from `inverse` and the last steps, to the gradient."""
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
