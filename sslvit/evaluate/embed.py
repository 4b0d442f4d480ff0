"""Features of a folder of images as one file of arrays, for use without sslvit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslvit.data.loader import center_view
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.sources import LabeledSet, Readout, Source
from sslvit.files import new_file, remove_stale_parts


@dataclass
class Embeddings:
    """Features of the readable images of a data set, in its order.

    Args:
        features: features as float32, 'n d'.
        keys: names of the images.
        labels: class numbers 'n', or None where there are none.
        classes: names of the classes; empty where there are none.
    """

    features: np.ndarray
    keys: np.ndarray
    labels: np.ndarray | None
    classes: list[str]

    def save(self, file: Path) -> None:
        """Write an .npz of features, keys and, where there are labels, labels and classes; whole or not at all."""
        arrays: dict[str, np.ndarray] = {"features": self.features, "keys": self.keys}
        if self.labels is not None:
            arrays |= {"labels": self.labels, "classes": np.array(self.classes)}
        remove_stale_parts(file)
        with new_file(file) as part, part.open("wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle


def embed(
    source: Source, data: LabeledSet, readouts: list[Readout], batch: int = 256, workers: int | None = None
) -> Embeddings:
    """Features of the encoder's center view of every image that can be read.

    Raises:
        NoScore: too many images cannot be read, or features that are not finite.
    """
    table, index = (
        FeatureExtractor(batch, workers).run(source, data, readouts, center_view(source.settings)),
        data.index,
    )
    numbers = table.samples.numpy()
    labels = index.labels_of(numbers) if index.classes else None
    keys = np.array([index.key(number) for number in numbers])
    return Embeddings(table.at(readouts).values.numpy(), keys, labels, list(index.classes or []))
