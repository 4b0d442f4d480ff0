"""Linear probe: multinomial logistic regression, its strength chosen without the reported set."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslvit import rng
from sslvit.evaluate.logistic import fit_logistic
from sslvit.evaluate.sources import Features

logger = logging.getLogger(__name__)

STRENGTHS = [10.0**exponent for exponent in range(1, -7, -1)]
FEW = 1_000  # up to this many training images the strength is chosen by 5 folds instead of one held-out fifth
FOLDS = 5
TRIAL_ITERATIONS = 1000  # in which a strength must be solved to be among those that are compared
FEWEST_LABELS = 2  # of a class: the strength is chosen on held-out ones
NOT_CONVERGED = "logistic regression: not converged; the score may be a little low"


@dataclass
class LinearHead:
    """A standardization and a linear map.

    Args:
        mean: subtracted from features.
        scale: divides them.
        weight: (classes, d).
        bias: (classes,).
        strength: of the squared penalty on the weight that it was fitted with.
        held_out: right answers in percent on training images held out, under that strength.
        weakest: strength that was compared with the others.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    strength: float
    held_out: float
    weakest: float

    def logits(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        return (values.double() - self.mean) / self.scale @ self.weight.T + self.bias

    def accuracy(self, features: Features) -> float:
        """Share of right answers, in percent."""
        return 100 * float((self.logits(features.values).argmax(1) == features.labels).double().mean())


def fit_probe(features: Features, classes: int, seed: int = 0, device: str = "cpu") -> LinearHead:
    """A head on all of `features`, with the strength that was best on parts of them held out.

    The parts are stratified by class and drawn by seed: five folds for up to 1,000 images, else one fifth. Ties go
    to the lower loss. Strengths so weak that their problems are not solved in a while are not compared: their scores
    would be those of an unfinished fit. No other data is looked at.
    """
    values, labels = features.values.to(device).double(), features.labels.to(device)
    mean, scale = values.mean(0), values.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))  # a constant feature stays zero
    values = (values - mean) / scale
    fold = stratified_folds(features.labels, seed).to(device)
    is_kept = torch.stack([fold == f for f in range(FOLDS if len(features) <= FEW else 1)])  # folds n
    tried = torch.tensor(STRENGTHS, dtype=torch.float64, device=device)
    used = rearrange(~is_kept, "f n -> f 1 n").expand(-1, len(STRENGTHS), -1).flatten(0, 1)
    weight, bias, is_solved = fit_logistic(values, labels, classes, tried.repeat(len(is_kept)), used, TRIAL_ITERATIONS)
    compared = solved_in_all(is_solved.view(len(is_kept), -1))
    right, loss = torch.zeros(2, len(STRENGTHS), dtype=torch.float64)
    for f, kept in enumerate(is_kept):
        for i in range(len(STRENGTHS)):
            problem = f * len(STRENGTHS) + i
            logits = values[kept] @ weight[problem].T + bias[problem]
            right[i] += (logits.argmax(1) == labels[kept]).sum().cpu()
            loss[i] += F.cross_entropy(logits, labels[kept], reduction="sum").cpu()
    best = min(compared, key=lambda i: (-right[i], loss[i]))
    weight, bias, is_solved = fit_logistic(values, labels, classes, tried[best : best + 1])
    if not is_solved:
        logger.info(NOT_CONVERGED)
    held_out = 100 * float(right[best] / is_kept.sum())
    parts = (part.cpu() for part in (mean, scale, weight[0], bias[0]))
    return LinearHead(*parts, STRENGTHS[best], held_out, STRENGTHS[max(compared)])


def solved_in_all(is_solved: Bool[Tensor, "folds strengths"]) -> list[int]:
    """Places of the strengths that were solved in every fold; all, where none was."""
    return torch.nonzero(is_solved.all(0))[:, 0].tolist() or list(range(is_solved.shape[1]))


def stratified_folds(labels: Int[Tensor, "n"], seed: int) -> Int[Tensor, "n"]:
    """A fold number for each image, every class spread evenly over the folds."""
    fold = torch.empty_like(labels)
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label)[:, 0]
        order = rng.generator(seed, label, "folds").permutation(len(members))
        fold[members[torch.from_numpy(order)]] = torch.arange(len(members)) % FOLDS
    return fold


def draw_labels(labels: Int[Tensor, "n"], per_class: int | None, percent: float | None, seed: int) -> Int[Tensor, "m"]:
    """Places of `per_class` random images of each class, or of a percentage of each class.

    Raises:
        ValueError: a class has too few.
    """
    said = f"--labels-per-class {per_class}" if per_class else f"--labels-percent {percent:g}"
    chosen = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label)[:, 0]
        count = per_class or round(len(members) * percent / 100)
        if count < FEWEST_LABELS or len(members) < count:
            raise ValueError(f"{said}: class {label} has only {len(members)} images, of which {count} would be drawn.")
        order = rng.generator(seed, label, "draw").permutation(len(members))[:count]
        chosen.append(members[torch.from_numpy(order)])
    return torch.cat(chosen)
