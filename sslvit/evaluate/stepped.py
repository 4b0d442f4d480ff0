"""Heads trained step by step on features that change with every epoch's crops: the papers' own probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslvit import rng
from sslvit.evaluate.sources import Features, FeatureTable, Place
from sslvit.optim.lars import LARS

ROWS_AT_ONCE = 8192  # that are scored together


class BatchNormHead(nn.Sequential):
    """Batch norm without scale and shift, then a linear map (MAE's linear probe)."""

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, classes))
        source = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self[1].weight, std=0.01, generator=source)
        nn.init.zeros_(self[1].bias)


def fit_batch_norm_head(
    batches: Iterator[tuple[int, Features]], width: int, classes: int, lr_at: Callable[[int], float],
    momentum: float = 0.9, seed: int = 0, device: str | torch.device = "cpu",
) -> BatchNormHead:  # fmt: skip
    """MAE's head under LARS.

    Args:
        batches: step and the features of its batch.
        width: of the features.
        classes: how many there are.
        lr_at: step -> learning rate.
        momentum: of LARS.
        seed: of the first weights.
        device: that does the work.
    """
    head = BatchNormHead(width, classes, seed).to(device)
    optimizer = LARS(head.parameters(), lr=0.0, momentum=momentum)
    for step, batch in batches:
        optimizer.param_groups[0]["lr"] = lr_at(step)
        optimizer.zero_grad()
        F.cross_entropy(head(batch.values.to(device)), batch.labels.to(device)).backward()
        optimizer.step()
    return head.eval()


@dataclass
class HeadGrid:
    """Linear heads for every pair of a feature and a rate, trained together by SGD with momentum.

    All heads of one feature are one matrix, so each step costs one product per feature and not one per head.

    Args:
        features: the places of each, among neighboring columns of `order`.
        order: all places, as their columns stand in a batch.
        widths: of each place.
        rates: learning rates.
        classes: how many there are.
        weight: '(rates classes) d' for each feature.
        bias: '(rates classes)' for each feature.
        speed: momentum of both.
    """

    features: list[list[Place]]
    order: list[Place]
    widths: dict[Place, int]
    rates: list[float]
    classes: int
    weight: list[Tensor]
    bias: list[Tensor]
    speed: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def start(
        cls, features: list[list[Place]], widths: dict[Place, int], rates: list[float], classes: int, seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> HeadGrid:  # fmt: skip
        """Fresh heads: weights from N(0, 0.01), biases zero (DINO, DINOv2)."""
        order = sorted({place for places in features for place in places})
        source = torch.Generator().manual_seed(seed)
        rows = len(rates) * classes
        total = [sum(widths[place] for place in places) for places in features]
        weight = [(torch.randn(rows, width, generator=source) * 0.01).to(device) for width in total]
        bias = [torch.zeros(rows, device=device) for _ in features]
        return cls(features, order, widths, rates, classes, weight, bias)

    def columns(self, places: list[Place]) -> slice:
        """Where a feature's columns stand in a batch."""
        numbers = sorted(self.order.index(place) for place in places)
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise ValueError(f"{places} are not neighbors among {self.order}.")
        first = sum(self.widths[place] for place in self.order[: numbers[0]])
        return slice(first, first + sum(self.widths[place] for place in places))

    def fit(
        self, batches: Iterator[tuple[int, Features]], factor_at: Callable[[int], float], momentum: float = 0.9
    ) -> None:
        """Take a step for every batch, at each head's rate times factor_at(step)."""
        device = self.weight[0].device
        rates = torch.tensor(self.rates, device=device).repeat_interleave(self.classes)
        if self.speed is None:
            self.speed = [
                (torch.zeros_like(w), torch.zeros_like(b)) for w, b in zip(self.weight, self.bias, strict=True)
            ]
        columns = [self.columns(places) for places in self.features]
        for step, batch in batches:
            values, labels = batch.values.to(device), batch.labels.to(device)
            right = F.one_hot(labels, self.classes).to(values)[:, None]
            rate = rates * factor_at(step)
            for weight, bias, speed, part in zip(self.weight, self.bias, self.speed, columns, strict=True):
                x = values[:, part]
                logits = torch.addmm(bias, x, weight.T).view(len(x), -1, self.classes)
                residual = logits.softmax(2).sub_(right).flatten(1)  # b (rates classes)
                speed[0].mul_(momentum).addmm_(residual.T, x, alpha=1 / len(x))
                speed[1].mul_(momentum).add_(residual.sum(0), alpha=1 / len(x))
                weight.addcmul_(rate[:, None], speed[0], value=-1)
                bias.addcmul_(rate, speed[1], value=-1)

    def accuracies(self, features: Features) -> Float[Tensor, "features rates"]:
        """Right answers in percent, head by head; the features' columns stand as in `order`."""
        device = self.weight[0].device
        right = torch.zeros(len(self.features), len(self.rates), device=device)
        rows = zip(features.values.split(ROWS_AT_ONCE), features.labels.split(ROWS_AT_ONCE), strict=True)
        for values, labels in rows:
            values, labels = values.to(device), labels.to(device)
            for number, places in enumerate(self.features):
                logits = torch.addmm(self.bias[number], values[:, self.columns(places)], self.weight[number].T)
                guesses = logits.view(len(values), len(self.rates), self.classes).argmax(2)
                right[number] += (guesses == labels[:, None]).sum(0)
        return (100 * right / len(features)).cpu()


def in_batches(
    tables: Iterator[FeatureTable], places: Sequence[Place], rows: Int[Tensor, "m"] | None, batch: int, steps: int,
    seed: int,
) -> Iterator[tuple[int, Features]]:  # fmt: skip
    """Step and batch: each table is one epoch, gone through in a random order, its incomplete batch left out.

    Args:
        tables: one per epoch.
        places: whose columns are put side by side.
        rows: of the table that are used; None for all.
        batch: rows per step, no more than there are.
        steps: in all.
        seed: of the order.
    """
    step = 0
    for epoch, table in enumerate(tables):
        used = torch.arange(len(table.labels)) if rows is None else rows
        order = used[torch.from_numpy(rng.generator(seed, epoch, "probe order").permutation(len(used)))]
        for start in range(0, len(order) - batch + 1, batch):
            if step == steps:
                return
            yield step, table.rows(order[start : start + batch], places)
            step += 1
    if step < steps:
        raise RuntimeError(f"a head took {step} of {steps} steps: an epoch had fewer readable images than the first.")
