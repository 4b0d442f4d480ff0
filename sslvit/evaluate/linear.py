"""Linear probe: multinomial logistic regression to convergence, its strength chosen without the reported set.

All strengths and folds of one choice are fitted at once: they share the features, so one matrix product serves
them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sslvit.chance import generator
from sslvit.evaluate.features import Features

STRENGTHS = [10.0**exponent for exponent in range(1, -7, -1)]
FEW = 1_000  # up to this many training images the strength is chosen by 5 folds instead of one held-out fifth
FOLDS = 5
TRIAL_ITERATIONS = 150  # of a fit that only compares strengths; the chosen one is fitted to convergence
HISTORY = 10  # steps that L-BFGS remembers


@dataclass
class LinearHead:
    """A standardisation and a linear map.

    Args:
        mean: subtracted from features.
        scale: divides them.
        weight: (classes, d).
        bias: (classes,).
        strength: of the squared penalty on the weight that it was fitted with.
        held_out: right answers in percent on training images held out, under that strength.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    strength: float
    held_out: float

    def logits(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        return (values.double() - self.mean) / self.scale @ self.weight.T + self.bias

    def accuracy(self, features: Features) -> float:
        """Share of right answers, in percent."""
        return 100 * float((self.logits(features.values).argmax(1) == features.labels).double().mean())


def fit_probe(features: Features, classes: int, seed: int = 0) -> LinearHead:
    """A head on all of `features`, with the strength that was best on parts of them held out.

    The parts are stratified by class and drawn by seed: five folds for up to 1,000 images, else one fifth. Ties go
    to the lower loss. No other data is looked at.
    """
    mean, scale = features.values.double().mean(0), features.values.double().std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))  # a constant feature stays zero
    values = (features.values.double() - mean) / scale
    fold = stratified_folds(features.labels, seed)
    is_kept = torch.stack([fold == f for f in range(FOLDS if len(features) <= FEW else 1)])  # folds n
    used = rearrange(~is_kept, "f n -> f 1 n").expand(-1, len(STRENGTHS), -1).flatten(0, 1)
    strengths = torch.tensor(STRENGTHS, dtype=torch.float64).repeat(len(is_kept))
    weight, bias = fit_logistic(values, features.labels, classes, strengths, used, TRIAL_ITERATIONS)
    right, loss = torch.zeros(2, len(STRENGTHS), dtype=torch.float64)
    for f, kept in enumerate(is_kept):
        for i in range(len(STRENGTHS)):
            problem = f * len(STRENGTHS) + i
            logits = values[kept] @ weight[problem].T + bias[problem]
            right[i] += (logits.argmax(1) == features.labels[kept]).sum()
            loss[i] += F.cross_entropy(logits, features.labels[kept], reduction="sum")
    best = min(range(len(STRENGTHS)), key=lambda i: (-right[i], loss[i]))
    strength = STRENGTHS[best]
    weight, bias = fit_logistic(values, features.labels, classes, torch.tensor([strength], dtype=torch.float64))
    return LinearHead(mean, scale, weight[0], bias[0], strength, 100 * float(right[best] / is_kept.sum()))


def fit_logistic(
    values: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    classes: int,
    strengths: Float[Tensor, "p"],
    used: Tensor | None = None,
    max_iterations: int = 5000,
    tolerance: float = 1e-6,
) -> tuple[Float[Tensor, "p classes d"], Float[Tensor, "p classes"]]:
    """Minimise mean cross-entropy + strength / 2 * |weight|^2 for p problems on the same features, by L-BFGS.

    Args:
        values: features, float64.
        labels: class numbers.
        classes: how many there are.
        strengths: of the penalty on the weights, one per problem; the bias is free.
        used: which images each problem is fitted on ('p n' bool); all of them for None.
        max_iterations: at most.
        tolerance: largest entry of the gradient at which a problem counts as solved.

    Returns:
        Weights and biases of each problem.
    """
    axes, spread = principal_axes(values)
    values = values @ axes
    problems, width = len(strengths), values.shape[1]
    # half the features' covariance bounds the curvature (Boehning 1992), and along its axes it is diagonal
    curvature = torch.cat([spread / 2 + strengths[:, None], torch.full((problems, 1), 0.5)], 1)
    share = torch.ones(problems, len(values), dtype=torch.float64) if used is None else used.double()
    share = rearrange(share / share.sum(1, keepdim=True), "p n -> n p 1")
    extended = torch.cat([values, values.new_ones(len(values), 1)], 1)  # the last feature is the bias
    penalty = strengths[:, None, None] * torch.cat([torch.ones(width), torch.zeros(1)]).double()
    target = F.one_hot(labels, classes).double()[:, None]  # n 1 classes

    def objective(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.view(problems, classes, width + 1)
        logits = (extended @ theta.flatten(0, 1).T).view(-1, problems, classes)
        log_share = logits.log_softmax(2)
        loss = -(log_share * target * share).sum((0, 2)) + (penalty * theta.square()).sum((1, 2)) / 2
        residual = (log_share.exp() - target) * share
        gradient = (residual.flatten(1).T @ extended).view_as(theta) + penalty * theta
        return loss, gradient.flatten(1)

    inverse = (1 / curvature)[:, None].expand(-1, classes, -1).flatten(1)
    theta, is_solved = minimise(objective, inverse, max_iterations, tolerance)
    if not is_solved and max_iterations > TRIAL_ITERATIONS:
        print(f"logistic regression: not converged to {tolerance:.0e} after {max_iterations} iterations")
    theta = theta.view(problems, classes, width + 1)
    return theta[:, :, :-1] @ axes.T, theta[:, :, -1].contiguous()


def minimise(
    objective, inverse: Float[Tensor, "p k"], max_iterations: int, tolerance: float
) -> tuple[Float[Tensor, "p k"], bool]:
    """L-BFGS (Liu and Nocedal 1989) on p independent smooth convex problems side by side, from zero.

    Args:
        objective: theta -> values 'p' and gradients 'p k'.
        inverse: a guess at the inverse of the curvature, entry by entry; the better, the fewer steps.
        max_iterations: at most.
        tolerance: largest entry of a gradient at which its problem is done.

    Returns:
        Where each search ended, and whether all reached the tolerance.
    """
    theta = torch.zeros_like(inverse)
    value, gradient = objective(theta)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []  # step, change of gradient, 1 / their product
    for _ in range(max_iterations):
        is_open = gradient.abs().amax(1) > tolerance
        if not is_open.any():
            return theta, True
        direction = -_quasi_newton(gradient, inverse, steps)
        slope = (direction * gradient).sum(1)
        length = is_open.double()
        while True:
            new_theta = theta + length[:, None] * direction
            new_value, new_gradient = objective(new_theta)
            is_short = new_value > value + 1e-4 * length * slope
            is_short &= length > 1e-10
            if not is_short.any():
                break
            length = torch.where(is_short, length / 2, length)
        step, change = new_theta - theta, new_gradient - gradient
        product = (step * change).sum(1)
        weight = torch.where(product > 1e-300, 1 / product, torch.zeros_like(product))
        steps = [*steps[1 - HISTORY :], (step, change, weight)]
        theta, value, gradient = new_theta, new_value, new_gradient
    return theta, False


def principal_axes(values: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d m"], Float[Tensor, "m"]]:
    """Axes of the features' covariance and the variance along each; as many as there can be (m = min(n, d)).

    Weights of a penalised linear model lie in the span of its features, so nothing is lost where n is below d.
    """
    if len(values) < values.shape[1]:
        _, lengths, axes = torch.linalg.svd(values, full_matrices=False)
        return axes.T, lengths.square() / len(values)
    spread, axes = torch.linalg.eigh(values.T @ values / len(values))
    return axes, spread.clamp(min=0)


def _quasi_newton(gradient: Tensor, inverse: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The inverse curvature, as guessed and as seen in the last steps, applied to the gradient (two-loop recursion)."""
    direction = gradient
    alphas = []
    for step, change, weight in reversed(steps):
        alphas.append(weight * (step * direction).sum(1))
        direction = direction - alphas[-1][:, None] * change
    direction = direction * inverse
    if steps:
        step, change, weight = steps[-1]
        size = (step * change).sum(1) / (change.square() * inverse).sum(1).clamp(min=1e-300)
        direction = direction * torch.where(weight > 0, size, torch.ones_like(size))[:, None]
    for (step, change, weight), alpha in zip(steps, reversed(alphas), strict=True):
        direction = direction + (alpha - weight * (change * direction).sum(1))[:, None] * step
    return direction


def stratified_folds(labels: Int[Tensor, "n"], seed: int) -> Int[Tensor, "n"]:
    """A fold number for each image, every class spread evenly over the folds."""
    fold = torch.empty_like(labels)
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label)[:, 0]
        order = generator(seed, label, "folds").permutation(len(members))
        fold[members[torch.from_numpy(order)]] = torch.arange(len(members)) % FOLDS
    return fold


def draw_labels(labels: Int[Tensor, "n"], per_class: int, seed: int) -> Int[Tensor, "m"]:
    """Places of `per_class` random images of each class.

    Raises:
        ValueError: a class has fewer.
    """
    chosen = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label)[:, 0]
        if len(members) < per_class:
            raise ValueError(f"--labels-per-class {per_class}: class {label} has only {len(members)} images.")
        order = generator(seed, label, "draw").permutation(len(members))[:per_class]
        chosen.append(members[torch.from_numpy(order)])
    return torch.cat(chosen)
