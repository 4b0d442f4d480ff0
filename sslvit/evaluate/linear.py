"""Linear probe: multinomial logistic regression to convergence, its strength chosen without the reported set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslvit.chance import generator
from sslvit.evaluate.features import Features

STRENGTHS = [10.0**exponent for exponent in range(1, -7, -1)]  # strong first: each fit starts from the one before
FEW = 2_000  # up to this many training images the strength is chosen by 5 folds instead of one held-out fifth
FOLDS = 5


@dataclass
class LinearHead:
    """A standardisation and a linear map.

    Args:
        mean: subtracted from features.
        scale: divides them.
        weight: (classes, d).
        bias: (classes,).
        strength: of the squared penalty on the weight that it was fitted with.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    strength: float

    def logits(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        return (values.double() - self.mean) / self.scale @ self.weight.T + self.bias

    def accuracy(self, features: Features) -> float:
        """Share of right answers, in percent."""
        return 100 * float((self.logits(features.values).argmax(1) == features.labels).double().mean())


def fit_logistic(
    features: Features,
    classes: int,
    strength: float,
    start: LinearHead | None = None,
    max_iterations: int = 500,
) -> LinearHead:
    """Minimise mean cross-entropy + strength / 2 * |weight|^2 over standardised features by L-BFGS, in float64.

    Args:
        features: to fit on; standardised by their own mean and deviation.
        classes: number of classes.
        strength: of the penalty; the bias is free.
        start: a head to start from; the optimum does not depend on it.
        max_iterations: L-BFGS stops earlier once the gradient has vanished.
    """
    values = features.values.double()
    mean, scale = values.mean(0), values.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))  # a constant feature stays zero
    values = (values - mean) / scale
    weight = torch.zeros(classes, values.shape[1], dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(values @ weight.T + bias, features.labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return LinearHead(mean, scale, weight.detach(), bias.detach(), strength)


def fit_probe(features: Features, classes: int, seed: int = 0) -> LinearHead:
    """A head on all of `features`, with the strength that was best on parts of them held out.

    The parts are stratified by class and drawn by seed: five folds for up to 2,000 images, else one fifth. Ties go
    to the lower loss. No other data is looked at.
    """
    fold = stratified_folds(features.labels, seed)
    folds = range(FOLDS) if len(features) <= FEW else [0]
    right = torch.zeros(len(STRENGTHS))
    loss = torch.zeros(len(STRENGTHS))
    for held_out in folds:
        fitted, kept = features[fold != held_out], features[fold == held_out]
        head = None
        for i, strength in enumerate(STRENGTHS):
            head = fit_logistic(fitted, classes, strength, head)
            logits = head.logits(kept.values)
            right[i] += (logits.argmax(1) == kept.labels).sum()
            loss[i] += F.cross_entropy(logits, kept.labels, reduction="sum")
    best = min(range(len(STRENGTHS)), key=lambda i: (-right[i], loss[i]))
    return fit_logistic(features, classes, STRENGTHS[best])


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
