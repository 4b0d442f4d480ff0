"""Features of a folder of images as one file of arrays, for use without sslvit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslvit.data.loader import evaluation_loader, normalized_view
from sslvit.evaluate.sources import LabeledSet, NoScore, Place, Source
from sslvit.files import new_file, remove_stale_parts
from sslvit.progress import track


@dataclass
class Embeddings:
    """Of the readable images of a data set, in its order.

    Args:
        features: float32 'n d'.
        keys: the images' names.
        labels: class numbers 'n', or None where there are none.
        classes: names of the classes; empty where there are none.
    """

    features: np.ndarray
    keys: np.ndarray
    labels: np.ndarray | None
    classes: list[str]

    def save(self, file: Path) -> None:
        """As .npz: features, keys, and, where there are labels, labels and classes; whole or not at all.

        Raises:
            WriteError: the disk is full or cannot be written to.
        """
        arrays = {"features": self.features, "keys": self.keys}
        if self.labels is not None:
            arrays |= {"labels": self.labels, "classes": np.array(self.classes)}
        remove_stale_parts(file)
        with new_file(file) as part, part.open("wb") as out:
            np.savez(out, **arrays)


@torch.no_grad()
def embed(source: Source, data: LabeledSet, places: list[Place], batch: int = 256, workers: int = 0) -> Embeddings:
    """Features of the encoder's center view of every image that can be read.

    Args:
        source: of the features.
        data: the images, labeled or not.
        places: whose features stand side by side.
        batch: images per forward pass.
        workers: loader processes.

    Raises:
        NoScore: too many images cannot be read, or features that are not finite.
    """
    settings, index = source.settings, data.index
    loader = evaluation_loader(data.reader, settings, batch, workers, subset=data.chosen)
    rows, samples, bad = [], [], {}
    for piece in track(loader, "features", len(loader) * batch, each=batch):
        values = torch.cat(source.features_at(normalized_view(piece, settings, source.device), places), 1)
        rows.append(values.float().cpu()[piece.valid])
        samples.append(piece.samples[piece.valid])
        bad |= piece.unreadable
    data.account_for(torch.cat(samples), bad)
    features = torch.cat(rows)
    if not features.isfinite().all():
        raise NoScore(f"features are not finite on {index.location}: the weights are broken.")
    numbers = torch.cat(samples).numpy()
    labels = index.labels_of(numbers) if index.classes else None
    keys = np.array([index.key(number) for number in numbers])
    return Embeddings(features.numpy(), keys, labels, list(index.classes or []))
