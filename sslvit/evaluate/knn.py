"""Weighted k-nearest-neighbor vote (Wu et al. 2018), with the conventions of DINO's evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslvit.evaluate.sources import Features

QUERIES_AT_ONCE = 1024
BANK_AT_ONCE = 131_072  # training images: half a gigabyte of similarities


def knn_votes(
    train: Features, queries: Float[Tensor, "m d"], classes: int, neighbors: int = 20, temperature: float = 0.07
) -> Float[Tensor, "m classes"]:
    """For each query the sum of exp(cosine / temperature) of its nearest neighbors, class by class.

    Args:
        train: labeled features.
        queries: features to classify.
        classes: number of classes.
        neighbors: k; at most as many as there are training images.
        temperature: small values let the nearest decide.
    """
    bank = F.normalize(train.values, dim=1)
    chunks = F.normalize(queries, dim=1).split(QUERIES_AT_ONCE)
    found = []
    for chunk in chunks:
        similarity, labels = nearest(chunk, bank, train.labels, neighbors)
        largest = (similarity[:, :1] / temperature).exp()
        found.append(votes(similarity, labels, classes, temperature) * largest)
    return torch.cat(found)


def knn_accuracies(
    train: Features, val: Features, classes: int, neighbors: list[int], temperature: float, device: str = "cpu"
) -> dict[int, float]:
    """Share of right answers in percent for each k, from one search."""
    bank, known = F.normalize(train.values.to(device), dim=1), train.labels.to(device)
    right = dict.fromkeys(neighbors, 0)
    rows = zip(val.values.split(QUERIES_AT_ONCE), val.labels.split(QUERIES_AT_ONCE), strict=True)
    for values, labels in rows:
        similarity, found = nearest(F.normalize(values.to(device), dim=1), bank, known, max(neighbors))
        for k in neighbors:
            guesses = votes(similarity[:, :k], found[:, :k], classes, temperature).argmax(1)
            right[k] += int((guesses == labels.to(device)).sum())
    return {k: 100 * count / len(val) for k, count in right.items()}


def nearest(
    queries: Float[Tensor, "m d"], bank: Float[Tensor, "n d"], labels: Int[Tensor, "n"], neighbors: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Similarities and labels of each query's nearest rows of the bank, nearest first."""
    best, found = None, None
    for start in range(0, len(bank), BANK_AT_ONCE):
        part = bank[start : start + BANK_AT_ONCE]
        similarity, place = (queries @ part.T).topk(min(neighbors, len(part)), dim=1)
        named = labels[start : start + BANK_AT_ONCE][place]
        if best is not None:
            similarity, named = torch.cat([best, similarity], 1), torch.cat([found, named], 1)
            similarity, place = similarity.topk(min(neighbors, similarity.shape[1]), dim=1)
            named = named.gather(1, place)
        best, found = similarity, named
    return best, found


def votes(
    similarity: Float[Tensor, "m k"], labels: Int[Tensor, "m k"], classes: int, temperature: float
) -> Float[Tensor, "m classes"]:
    """The sum of exp((similarity - the nearest's) / temperature) of each class's neighbors, nearest first.

    Without the difference the sum of a small temperature would be beyond float32.
    """
    empty = similarity.new_zeros(len(similarity), classes)
    return empty.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())
