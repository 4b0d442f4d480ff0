"""Linear probe: multinomial logistic regression, with an L2 penalty chosen without the reported set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslvit import rng
from sslvit.evaluate.logistic import fit_logistic
from sslvit.evaluate.sources import Features, full_float32

logger = logging.getLogger(__name__)

L2_GRID = [10.0**exponent for exponent in range(1, -7, -1)]
MAX_CROSS_VALIDATED = 1_000  # up to this many training images, l2 is chosen on 5 folds instead of one held-out fifth
FOLDS = 5
TRIAL_ITERATIONS = 1000  # an l2 whose problems are not solved within this many is not compared
NEVER = -1  # in place of a fold: an image that is never held out
FIXED_L2 = "1 / labels, fixed, since no class has two labels to hold one out"
NOT_CONVERGED = "logistic regression: not converged; the score may be a little low"


@dataclass
class LinearMap:
    """A standardization and a linear map, in float64 on the device where they were fitted."""

    mean: Float[Tensor, "d"]
    scale: Float[Tensor, "d"]
    weight: Float[Tensor, "classes d"]
    bias: Float[Tensor, "classes"]

    def logits(self, values: Float[Tensor, "*n d"]) -> Float[Tensor, "*n classes"]:
        """Logits of features that are not standardized."""
        return (values.to(self.mean) - self.mean) / self.scale @ self.weight.T + self.bias


@dataclass
class LinearHead(LinearMap):
    """A linear classifier on features.

    `held_out` is its top-1 accuracy in percent on held-out training images under the penalty `l2`, and `weakest_l2` the
    weakest penalty that was compared; both are None if no image could be held out and the penalty is fixed.
    """

    l2: float
    held_out: float | None
    weakest_l2: float | None

    def is_right(self, features: Features) -> Bool[Tensor, "n"]:
        """Whether each image is recognized."""
        return self.logits(features.values).argmax(1) == features.labels.to(self.mean.device)

    def accuracy(self, features: Features) -> float:
        """Top-1 accuracy in percent."""
        return percent(self.is_right(features))


def percent(is_right: Bool[Tensor, "n"]) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float(is_right.double().mean())


@full_float32()
def fit_probe(features: Features, classes: int, seed: int = 0, device: str | torch.device = "cpu") -> LinearHead:
    """Fit a head on all of `features`, with the L2 penalty that was best on held-out images among them.

    Held-out images are stratified by class and drawn by seed: five folds for up to 1,000 images, otherwise one
    fifth. Ties go to the lower loss. Penalties so weak that their problems are not solved in TRIAL_ITERATIONS are not
    compared, since their scores would be those of an unfinished fit. No other data is used.

    The only image of a class is never held out; if every class has just one, the penalty is 1 / labels, that of
    scikit-learn's C = 1.
    """
    values, labels = features.values.to(device, torch.float64, copy=True), features.labels.to(device)
    mean, scale = values.mean(0), values.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))  # a constant feature stays zero
    values.sub_(mean).div_(scale)  # in place, since the features of ImageNet take 8 GB
    fold = stratified_folds(features.labels, seed).to(device)
    l2, held_out, weakest_l2 = 1 / len(features), None, None
    if (fold != NEVER).any():
        l2, held_out, weakest_l2 = _select_l2(values, labels, classes, fold)
    strength = torch.tensor([l2], dtype=torch.float64, device=device)
    weight, bias, is_solved = fit_logistic(values, labels, classes, strength)
    if not is_solved:
        logger.info(NOT_CONVERGED)
    return LinearHead(mean, scale, weight[0], bias[0], l2, held_out, weakest_l2)


def _select_l2(
    values: Float[Tensor, "n d"], labels: Int[Tensor, "n"], classes: int, fold: Int[Tensor, "n"]
) -> tuple[float, float, float]:
    """The best penalty on held-out images, its accuracy there in percent, and the weakest penalty that was compared."""
    is_held_out = torch.stack([fold == f for f in range(FOLDS if len(values) <= MAX_CROSS_VALIDATED else 1)])  # folds n
    tried = torch.tensor(L2_GRID, dtype=torch.float64, device=values.device)
    used = rearrange(~is_held_out, "f n -> f 1 n").expand(-1, len(L2_GRID), -1).flatten(0, 1)
    weight, bias, is_solved = fit_logistic(
        values, labels, classes, tried.repeat(len(is_held_out)), used, TRIAL_ITERATIONS
    )
    compared = solved_in_all_folds(is_solved.view(len(is_held_out), -1))
    right, loss = torch.zeros(2, len(L2_GRID), dtype=torch.float64, device=values.device)
    for f, held_out in enumerate(is_held_out):
        reported, expected = values[held_out], labels[held_out]
        for i in range(len(L2_GRID)):
            problem = f * len(L2_GRID) + i
            logits = reported @ weight[problem].T + bias[problem]
            right[i] += (logits.argmax(1) == expected).sum()
            loss[i] += F.cross_entropy(logits, expected, reduction="sum")
    right, loss = right.cpu(), loss.cpu()
    best = min(compared, key=lambda i: (-right[i], loss[i]))
    return L2_GRID[best], 100 * float(right[best] / is_held_out.sum()), L2_GRID[max(compared)]


def solved_in_all_folds(is_solved: Bool[Tensor, "folds penalties"]) -> list[int]:
    """Indices of the penalties whose problems were solved in every fold; all indices if there are none."""
    return torch.nonzero(is_solved.all(0))[:, 0].tolist() or list(range(is_solved.shape[1]))


def stratified_folds(labels: Int[Tensor, "n"], seed: int) -> Int[Tensor, "n"]:
    """A fold number for each image, each class spread evenly over the folds; NEVER for the only one of a class."""
    fold = torch.empty_like(labels)
    for _, members in shuffled_classes(labels, seed, "folds"):
        fold[members] = torch.arange(len(members)) % FOLDS if len(members) > 1 else NEVER
    return fold


def shuffled_classes(labels: Int[Tensor, "n"], seed: int, purpose: str) -> Iterator[tuple[int, Int[Tensor, "m"]]]:
    """Each class with the indices of its images, shuffled by seed, class and purpose."""
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label)[:, 0]
        yield label, members[torch.from_numpy(rng.generator(seed, label, purpose).permutation(len(members)))]


def sample_labels(
    labels: Int[Tensor, "n"], per_class: int | None, percent: float | None, seed: int
) -> Int[Tensor, "m"]:
    """Indices of `per_class` random images of each class, or of a percentage of each class.

    Raises:
        ValueError: a class has too few.
    """
    option = f"--labels-per-class {per_class}" if per_class else f"--labels-percent {percent:g}"
    sampled = []
    for label, members in shuffled_classes(labels, seed, "draw"):
        count = per_class or round(len(members) * (percent or 0) / 100)
        if not 1 <= count <= len(members):
            raise ValueError(
                f"{option}: class {label} has only {len(members)} images, of which {count} would be drawn."
            )
        sampled.append(members[:count])
    return torch.cat(sampled)
