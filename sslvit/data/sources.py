"""Where images come from before they are packed: folders, lists, arrays, data set objects."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sslvit.data.labels import NO_LABEL, NotClasses, labels_in, number_labels


class Images(Protocol):
    """Where the bytes of samples come from."""

    def read(self, place: Any) -> bytes: ...


@dataclass
class Sample:
    """One image on its way into a shard.

    Args:
        key: its name; made unique and free of dots on the way.
        suffix: of the image file, with the dot.
        source: holds the image.
        place: which one of those that it holds.
        label: class number, or NO_LABEL.
        bytes: about how long it is.
        modified_ns: when its file was changed last, which tells two of equal length apart; 0 for none.
    """

    key: str
    suffix: str
    source: Images
    place: Any
    label: int = NO_LABEL
    bytes: int = 0
    modified_ns: int = 0

    def read(self) -> bytes:
        return self.source.read(self.place)


class FileImages:
    """Image files; the place is a path."""

    def read(self, place: str) -> bytes:
        with open(place, "rb") as file:
            return file.read()


class DatasetImages:
    """A data set object of torchvision's kind: dataset[i] is (image, label) or an image; stored as PNG."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def read(self, place: int) -> bytes:
        item = self.dataset[place]
        image = item[0] if isinstance(item, tuple) else item
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"item {place} holds a {type(image).__name__}, not a PIL image. Make the data set without transform."
            )
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()


@dataclass
class ImageSource:
    """Images that were found somewhere, before they are packed.

    Args:
        samples: in the order of their names.
        classes: names by label, or None for images without labels.
        skipped: what is left out, with the reason, for the index.
        notes: what a person should know of how it was read, one line each.
    """

    samples: list[Sample]
    classes: list[str] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def dataset_source(dataset: Any) -> ImageSource:
    """The images of a torchvision data set object, made without transforms.

    Raises:
        ValueError: its items are not PIL images, or its labels cannot be class numbers.
    """
    source = DatasetImages(dataset)
    size = len(source.read(0))
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if targets is None and isinstance(dataset[0], tuple):
        targets = [dataset[i][1] for i in range(len(dataset))]
    if targets is None:
        return ImageSource([Sample(f"{i:06d}", ".png", source, i, NO_LABEL, size) for i in range(len(dataset))])
    try:
        classes, labels = number_labels(labels_in(np.asarray(targets), len(dataset)))
    except NotClasses as error:
        raise ValueError(f"{type(dataset).__name__}: {error}.") from error
    names = getattr(dataset, "classes", None) or classes
    samples = [Sample(f"{i:06d}", ".png", source, i, label, size) for i, label in enumerate(labels)]
    return ImageSource(samples, [str(name) for name in names])


def hold_out(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Train and validation: the last share of each class, at least one image, unless it has only one.

    Raises:
        ValueError: every class has one image.
    """
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    train, val = [], []
    for _, of_class in sorted(by_class.items()):
        cut = max(1, len(of_class) - max(1, round(share * len(of_class))))
        train, val = train + of_class[:cut], val + of_class[cut:]
    if not val:
        raise ValueError(f"--holdout {share}: no class has two images, so none can be held out.")
    return train, val
