"""Linear heads trained by SGD or LARS on features that change with every epoch's crops: the papers' own probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslvit import rng
from sslvit.evaluate.sources import Features, FeatureTable, Readout, full_float32
from sslvit.optim.lars import LARS

ROWS_AT_ONCE = 8192  # images that are scored together


class BatchNormHead(nn.Sequential):
    """Batch norm without scale and shift, then a linear map (MAE's linear probe)."""

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        linear = nn.Linear(width, classes)
        super().__init__(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)
        generator = torch.Generator(linear.weight.device).manual_seed(seed)
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(linear.bias)


@full_float32()
def fit_batch_norm_head(
    batches: Iterator[tuple[int, Features]], width: int, classes: int, lr_at: Callable[[int], float],
    momentum: float = 0.9, seed: int = 0, device: str | torch.device = "cpu",
) -> BatchNormHead:  # fmt: skip
    """Train MAE's head by LARS."""
    head = BatchNormHead(width, classes, seed).to(device)
    optimizer = LARS(head.parameters(), lr=0.0, momentum=momentum)
    for step, batch in batches:
        optimizer.param_groups[0]["lr"] = lr_at(step)
        optimizer.zero_grad()
        F.cross_entropy(head(batch.values.to(device)), batch.labels.to(device)).backward()
        optimizer.step()
    return head.eval()


class HeadGrid:
    """Linear heads for every pair of a feature and a learning rate, trained together by SGD with momentum.

    All heads of one feature are one matrix, so each step costs one product per feature and not one per head. Weights
    are initialized from a normal distribution with standard deviation 0.01, biases with zero (DINO, DINOv2).

    Args:
        features: the readouts of each feature; their columns must be adjacent in `order`.
        width: width of each readout.
        lrs: learning rates.
        classes: number of classes.
        seed: seed of the initial weights.
        device: device of the heads.

    Attributes:
        order: all readouts, in the order of their columns in a batch.
        weight: '(lrs classes) d' for each feature.
        bias: '(lrs classes)' for each feature.
        momentum_buffer: momentum of weight and bias for each feature.
    """

    def __init__(
        self, features: list[list[Readout]], width: int, lrs: list[float], classes: int, seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.features, self.width, self.lrs, self.classes = features, width, lrs, classes
        self.order = sorted({readout for readouts in features for readout in readouts})
        generator, rows = torch.Generator().manual_seed(seed), len(lrs) * classes
        shapes = [(rows, width * len(readouts)) for readouts in features]
        weights = [torch.randn(shape, generator=generator, device="cpu") * 0.01 for shape in shapes]
        self.weight = [weight.to(device) for weight in weights]
        self.bias = [torch.zeros(rows, device=device) for _ in features]
        self.momentum_buffer = [
            (torch.zeros_like(weight), torch.zeros_like(bias))
            for weight, bias in zip(self.weight, self.bias, strict=True)
        ]

    def columns(self, readouts: list[Readout]) -> slice:
        """The columns of a feature in a batch."""
        numbers = sorted(self.order.index(readout) for readout in readouts)
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise ValueError(f"{readouts} are not neighbors among {self.order}.")
        return slice(self.width * numbers[0], self.width * (numbers[-1] + 1))

    @full_float32()
    def fit(
        self, batches: Iterator[tuple[int, Features]], factor_at: Callable[[int], float], momentum: float = 0.9
    ) -> None:
        """Take a step for every batch, at each head's learning rate times factor_at(step)."""
        device = self.weight[0].device
        lrs = torch.tensor(self.lrs, device=device).repeat_interleave(self.classes)
        columns = [self.columns(readouts) for readouts in self.features]
        for step, batch in batches:
            values, labels = batch.values.to(device), batch.labels.to(device)
            target = F.one_hot(labels, self.classes).to(values)[:, None]
            lr = lrs * factor_at(step)
            for weight, bias, buffer, column in zip(self.weight, self.bias, self.momentum_buffer, columns, strict=True):
                x = values[:, column]
                logits = torch.addmm(bias, x, weight.T).view(len(x), -1, self.classes)
                residual = logits.softmax(2).sub_(target).flatten(1)  # b (lrs classes)
                buffer[0].mul_(momentum).addmm_(residual.T, x, alpha=1 / len(x))
                buffer[1].mul_(momentum).add_(residual.sum(0), alpha=1 / len(x))
                weight.addcmul_(lr[:, None], buffer[0], value=-1)
                bias.addcmul_(lr, buffer[1], value=-1)

    @full_float32()
    def accuracies(self, features: Features) -> Float[Tensor, "features lrs"]:
        """Top-1 accuracy of each head in percent; the columns of `features` are in the order of `order`."""
        device = self.weight[0].device
        right = torch.zeros(len(self.features), len(self.lrs), device=device)
        rows = zip(features.values.split(ROWS_AT_ONCE), features.labels.split(ROWS_AT_ONCE), strict=True)
        for values, labels in rows:
            values, labels = values.to(device), labels.to(device)
            for number, readouts in enumerate(self.features):
                logits = torch.addmm(self.bias[number], values[:, self.columns(readouts)], self.weight[number].T)
                guesses = logits.view(len(values), len(self.lrs), self.classes).argmax(2)
                right[number] += (guesses == labels[:, None]).sum(0)
        return (100 * right / len(features)).cpu()


def iterate_batches(
    tables: Iterator[FeatureTable], readouts: Sequence[Readout], rows: Int[Tensor, "m"] | None, batch: int, steps: int,
    seed: int,
) -> Iterator[tuple[int, Features]]:  # fmt: skip
    """Step numbers with their batches: each table is one epoch in a random order, without its last incomplete batch.

    Only `rows` of the tables are used, or all rows for None; `batch` must not exceed their number.
    """
    step = 0
    for epoch, table in enumerate(tables):
        used = torch.arange(len(table.labels)) if rows is None else rows
        order = used[torch.from_numpy(rng.generator(seed, epoch, "probe order").permutation(len(used)))]
        for start in range(0, len(order) - batch + 1, batch):
            if step == steps:
                return
            yield step, table.rows(order[start : start + batch], readouts)
            step += 1
    if step < steps:
        raise RuntimeError(f"a head took {step} of {steps} steps: an epoch had fewer readable images than the first.")
