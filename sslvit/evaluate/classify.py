"""A trained classifier -> right answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslvit.data.loader import evaluation_loader, normalized_view
from sslvit.evaluate.sources import LabeledSet, NoScore
from sslvit.ranks import all_gather, all_reduce_sum, rank, said_by_all, world_size
from sslvit.settings import EncoderSettings

FIRST = 5  # answers that count for the second measure


@dataclass
class Accuracy:
    """Of the readable images of a data set, each counted once on any number of ranks.

    Args:
        top1: share of right answers, in percent.
        top5: share of images with the right answer among the five likeliest; None for five classes or fewer.
        images: how many.
        unreadable: how many others were left out.
    """

    top1: float
    top5: float | None
    images: int
    unreadable: int


@torch.no_grad()
def accuracy(
    logits_of: Callable[[Tensor], Tensor], data: LabeledSet, settings: EncoderSettings, device: torch.device,
    batch: int = 256, workers: int = 0,
) -> Accuracy:  # fmt: skip
    """Right answers on the encoder's center views.

    Args:
        logits_of: normalized images 'b c h w' -> 'b classes'.
        data: labeled images.
        settings: how images reach the encoder.
        device: that computes.
        batch: images per forward pass and rank.
        workers: loader processes.

    Raises:
        NoScore: too many images cannot be read, or logits that are not finite.
    """
    loader = evaluation_loader(data.reader, settings, batch, workers, rank(), world_size(), subset=data.chosen)
    counts = torch.zeros(3, dtype=torch.long)  # right, right among the first, images
    classes = len(data.index.classes)
    samples, bad, is_finite = [], {}, True
    for piece in loader:
        logits = logits_of(normalized_view(piece, settings, device)).float().cpu()
        is_finite &= bool(logits[piece.valid].isfinite().all())
        samples.append(all_gather(piece.samples)[all_gather(piece.valid)])
        bad |= piece.unreadable
        likeliest = logits.topk(min(FIRST, classes), dim=1).indices[piece.valid]
        is_right = likeliest == piece.labels[piece.valid][:, None]
        counts += torch.tensor([is_right[:, 0].sum(), is_right.any(1).sum(), len(is_right)])
    data.account_for(torch.cat(samples), bad)
    if not all(said_by_all(is_finite)):
        raise NoScore(
            f"the classifier's logits are not finite on {data.index.location}: the weights are broken. Has the run "
            "diverged (health.json)?"
        )
    right, near, images = all_reduce_sum(counts).tolist()
    return Accuracy(100 * right / images, 100 * near / images if classes > FIRST else None, images, data.unreadable)
