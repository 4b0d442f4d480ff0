"""Weighted k-nearest-neighbor vote (Wu et al. 2018), with the conventions of DINO's evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslvit.evaluate.sources import Features, full_float32
from sslvit.progress import track

QUERIES_AT_ONCE = 1024
DAMPING = 0.05  # in whitening: fraction of the largest standard deviation that is added to every one
BANK_AT_ONCE = 131_072  # training images: half a gigabyte of similarities


def knn_accuracies(
    train: Features, val: Features, classes: int, neighbors: list[int], temperature: float,
    device: str | torch.device = "cpu",
) -> dict[int, float]:  # fmt: skip
    """Top-1 accuracy in percent for each k, from one search."""
    is_right = recognized_by_neighbors(train, val, classes, neighbors, temperature, device)
    return {k: 100 * int(found.sum()) / len(val) for k, found in is_right.items()}


@full_float32()
def recognized_by_neighbors(
    train: Features, val: Features, classes: int, neighbors: list[int], temperature: float,
    device: str | torch.device = "cpu", whiten: bool = False,
) -> dict[int, Bool[Tensor, "n"]]:  # fmt: skip
    """Whether each image is recognized, for each k, from one search; optionally on whitened features."""
    if whiten:
        whitened = fit_whitening(train.values, device)
        train, val = (Features(whitened(one.values), one.labels) for one in (train, val))
    bank, bank_labels = F.normalize(train.values.to(device), dim=1), train.labels.to(device)
    is_right: dict[int, list[Tensor]] = {k: [] for k in neighbors}
    rows = zip(val.values.split(QUERIES_AT_ONCE), val.labels.split(QUERIES_AT_ONCE), strict=True)
    for values, labels in track(rows, "nearest neighbors", len(val), each=QUERIES_AT_ONCE):
        similarity, found = nearest(F.normalize(values.to(device), dim=1), bank, bank_labels, max(neighbors))
        labels = labels.to(device)
        for k in neighbors:
            is_right[k].append(votes(similarity[:, :k], found[:, :k], classes, temperature).argmax(1) == labels)
    return {k: torch.cat(found).cpu() for k, found in is_right.items()}  # the host waits only once, at the end


def nearest(
    queries: Float[Tensor, "m d"], bank: Float[Tensor, "n d"], labels: Int[Tensor, "n"], neighbors: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Similarities and labels of each query's nearest rows of the bank, nearest first."""
    best = queries.new_empty(len(queries), 0)
    best_labels = labels.new_empty(len(queries), 0)
    for rows, row_labels in zip(bank.split(BANK_AT_ONCE), labels.split(BANK_AT_ONCE), strict=True):
        similarity, index = (queries @ rows.T).topk(min(neighbors, len(rows)), dim=1)
        is_first = not best.shape[1]
        best, best_labels = torch.cat([best, similarity], 1), torch.cat([best_labels, row_labels[index]], 1)
        if not is_first:
            best, index = best.topk(min(neighbors, best.shape[1]), dim=1)
            best_labels = best_labels.gather(1, index)
    return best, best_labels


def votes(
    similarity: Float[Tensor, "m k"], labels: Int[Tensor, "m k"], classes: int, temperature: float
) -> Float[Tensor, "m classes"]:
    """For each class, the sum of exp((similarity - the largest one) / temperature) over its neighbors.

    Neighbors come nearest first. Without the difference, a small temperature would overflow float32.
    """
    empty = similarity.new_zeros(len(similarity), classes)
    return empty.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())


def fit_whitening(values: Float[Tensor, "n d"], device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """Fit a map that centers features and gives their principal components about equal variance.

    See Jegou and Chum 2012, section 4. A few directions that all images share often have most of the variance and
    decide every cosine similarity. Each component is divided by its standard deviation plus a fraction of the largest
    one, so that components of noise count less than the others. Mean and covariance are those of `values`, computed in
    float64; labels are not used.

    Returns:
        A function from features 'n d' to whitened ones, on the CPU.
    """
    values = values.to(device)
    mean = torch.stack([rows.double().sum(0) for rows in values.split(QUERIES_AT_ONCE)]).sum(0) / len(values)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=values.device)
    for rows in values.split(QUERIES_AT_ONCE):
        centered = rows.double() - mean
        covariance += centered.T @ centered
    variances, directions = torch.linalg.eigh(covariance / len(values))
    deviations = variances.clamp(min=0).sqrt()
    to_components = directions / (deviations + DAMPING * deviations[-1]).clamp(min=1e-12)  # d d

    def whiten(values: Tensor) -> Tensor:
        rows = values.split(QUERIES_AT_ONCE)
        return torch.cat([((one.to(mean) - mean) @ to_components).float().cpu() for one in rows])

    return whiten
