"""A trained classifier -> right answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslvit.data.loader import evaluation_loader, normalised_view
from sslvit.data.reader import ShardReader
from sslvit.ranks import count_ranks, rank, sum_over_ranks
from sslvit.settings import EncoderSettings
from sslvit.settings.views import CentreSettings

FIRST = 5  # answers that count for the second measure


@dataclass
class Accuracy:
    """Of the readable images of a data set, each counted once on any number of ranks.

    Args:
        top1: share of right answers, in percent.
        top5: share of images with the right answer among the five likeliest; None for five classes or fewer.
        images: how many.
    """

    top1: float
    top5: float | None
    images: int


@torch.no_grad()
def accuracy(
    logits_of: Callable[[Tensor], Tensor], reader: ShardReader, settings: EncoderSettings, device: torch.device,
    batch: int = 256, workers: int = 0, fraction: float = 1.0,
) -> Accuracy:  # fmt: skip
    """Right answers on centre views.

    Args:
        logits_of: normalised images 'b c h w' -> 'b classes'.
        reader: of the labelled data set.
        settings: how images reach the encoder.
        device: that computes.
        batch: images per forward pass and rank.
        workers: loader processes.
        fraction: share of the shorter side that the view keeps.
    """
    view = CentreSettings(fraction=fraction)
    loader = evaluation_loader(reader, settings, batch, workers, rank(), count_ranks(), view)
    counts = torch.zeros(3, dtype=torch.long)  # right, right among the first, images
    classes = len(reader.index.classes)
    for piece in loader:
        logits = logits_of(normalised_view(piece, settings, device)).float().cpu()
        likeliest = logits.topk(min(FIRST, classes), dim=1).indices[piece.valid]
        is_right = likeliest == piece.labels[piece.valid][:, None]
        counts += torch.tensor([is_right[:, 0].sum(), is_right.any(1).sum(), len(is_right)])
    right, near, images = sum_over_ranks(counts).tolist()
    return Accuracy(100 * right / images, 100 * near / images if classes > FIRST else None, images)
