"""Features of a folder of images as one file of arrays, for use without sslvit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.data.loader import center_view
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.sources import LabeledSet, Readout, Source, view_in_words
from sslvit.files import new_file, remove_stale_temporaries
from sslvit.results import Result


@dataclass(repr=False)
class Embeddings(Result):
    """Features of the readable images of a data set, in its order.

    Args:
        features: features as float32, 'n d'.
        keys: names of the images.
        labels: class numbers 'n', or None where there are none.
        classes: names of the classes; empty where there are none.
        heading: the data set, and the view of each image.
        image_size: height and width of the view in pixels.
        path: the file they were written to.
    """

    features: np.ndarray
    keys: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    heading: str = ""
    image_size: list[int] | None = None
    path: Path | None = None

    def text(self) -> str:
        """A description of the arrays."""
        arrays = "features, keys, labels and classes" if self.labels is not None else "features and keys"
        where = f"{self.path}: " if self.path else ""
        about, _, view = self.heading.partition("\n")
        return f"{where}{arrays} of {about}, {self.features.shape[1]} numbers each\n{view}"

    def to_dict(self) -> dict[str, Any]:
        """The file and a summary of its content, without the arrays."""
        return {
            "path": self.path and str(self.path), "images": len(self.features), "width": self.features.shape[1],
            "classes": self.classes if self.labels is not None else None, "image_size": self.image_size,
        }  # fmt: skip

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """Shapes and types of the arrays."""
        arrays = {"features": self.features, "keys": self.keys, "labels": self.labels}
        found = [(name, " x ".join(map(str, of.shape)), of.dtype) for name, of in arrays.items() if of is not None]
        return ("array", "shape", "type"), found

    def save(self, file: Path) -> None:
        """Write features and keys, and labels and classes if there are any, as .npz; the file is complete or absent."""
        arrays: dict[str, np.ndarray] = {"features": self.features, "keys": self.keys}
        if self.labels is not None:
            arrays |= {"labels": self.labels, "classes": np.array(self.classes)}
        remove_stale_temporaries(file)
        with new_file(file) as temporary, temporary.open("wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle
        self.path = file


def embed(
    source: Source, data: LabeledSet, readouts: list[Readout], batch: int = 256, workers: int | None = None
) -> Embeddings:
    """Features of the encoder's center view of every image that can be read; empty on ranks other than the first.

    Raises:
        NoScore: too many images cannot be read, or features are not finite.
    """
    table = FeatureExtractor(batch, workers).run(source, data, readouts, center_view(source.settings))
    index = data.index
    numbers = table.samples.numpy()
    labels = index.labels_of(numbers).astype(np.int64) if index.classes else None  # the type that torch's losses take
    keys = np.array([index.key(number) for number in numbers])
    heading = f"{data.count_text}\neach image: {view_in_words(source.settings, source.precision)}"
    size = source.settings.image_size
    return Embeddings(table.at(readouts).values.numpy(), keys, labels, list(index.classes or []), heading, size)
