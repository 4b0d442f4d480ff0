"""A trained classifier -> top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslvit.data.loader import evaluation_loader, normalized_view
from sslvit.environment import pick_workers
from sslvit.evaluate.features import labels_of
from sslvit.evaluate.sources import LabeledSet, NoScore, in_pieces
from sslvit.progress import track
from sslvit.ranks import all_gather, all_gather_objects, all_reduce_sum, rank, world_size
from sslvit.settings import EncoderSettings

TOP_K = 5


@dataclass
class Accuracy:
    """Accuracy in percent on the readable images of a data set, each counted once on any number of ranks.

    With five classes or fewer there is no top-5 accuracy.
    """

    top1: float
    top5: float | None
    images: int
    unreadable: int


@torch.no_grad()
def accuracy(
    logits_of: Callable[[Tensor], Tensor], data: LabeledSet, settings: EncoderSettings, device: torch.device,
    batch: int = 256, workers: int | None = 0,
) -> Accuracy:  # fmt: skip
    """Accuracy of a classifier on the encoder's center views.

    Raises:
        NoScore: too many images cannot be read, or logits are not finite.
    """
    loader = evaluation_loader(
        data.reader,
        settings,
        batch,
        data.workers(pick_workers(workers, device.type)),
        rank(),
        world_size(),
        subset=data.subset,
        for_gpu=device.type == "cuda",
    )
    counts = torch.zeros(3, dtype=torch.long, device=device)  # right, right among the first k, images
    classes = len(data.classes)
    samples: list[Tensor] = []
    unreadable: dict[str, str] = {}
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    for piece in track(loader, "validation", len(data.samples), each=batch * world_size()):
        images = normalized_view(piece, settings, device)
        pieces = in_pieces(images, settings.largest_activation(images.shape[2], images.shape[3]))
        logits = torch.cat([logits_of(some) for some in pieces]).float()
        valid, labels = (column.to(device, non_blocking=True)[:, None] for column in (piece.valid, labels_of(piece)))
        is_finite &= (logits.isfinite() | ~valid).all()  # the host waits for the device once, at the end
        samples.append(all_gather(piece.samples)[all_gather(piece.valid)])
        unreadable |= piece.unreadable
        is_right = (logits.topk(min(TOP_K, classes), dim=1).indices == labels) & valid
        counts += torch.stack([is_right[:, 0].sum(), is_right.any(1).sum(), valid.sum()])
    data.account_for(torch.cat(samples), unreadable)
    if not all(all_gather_objects(bool(is_finite))):
        raise NoScore(
            f"the classifier's logits are not finite on {data.index.location}: the weights are broken. Has the run "
            "diverged (health.json)?"
        )
    top1, top5, images = all_reduce_sum(counts.cpu()).tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images if classes > TOP_K else None, images, data.unreadable)
