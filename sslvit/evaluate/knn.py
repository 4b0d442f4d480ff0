"""Weighted k-nearest-neighbour vote (Wu et al. 2018), with the conventions of DINO's evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslvit.evaluate.features import Features

CHUNK = 1024  # queries at a time


def knn_votes(
    train: Features, queries: Float[Tensor, "m d"], classes: int, neighbours: int = 20, temperature: float = 0.07
) -> Float[Tensor, "m classes"]:
    """For each query the sum of exp(cosine / temperature) of its nearest neighbours, class by class.

    Args:
        train: labelled features.
        queries: features to classify.
        classes: number of classes.
        neighbours: k; at most as many as there are training images.
        temperature: small values let the nearest decide.
    """
    bank = F.normalize(train.values, dim=1)
    votes = []
    for chunk in F.normalize(queries, dim=1).split(CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        vote = torch.zeros(len(chunk), classes).scatter_add_(1, train.labels[nearest], (similarity / temperature).exp())
        votes.append(vote)
    return torch.cat(votes)


def knn_accuracy(train: Features, val: Features, classes: int, neighbours: int, temperature: float) -> float:
    """Share of right answers, in percent."""
    votes = knn_votes(train, val.values, classes, neighbours, temperature)
    return 100 * float((votes.argmax(1) == val.labels).double().mean())
