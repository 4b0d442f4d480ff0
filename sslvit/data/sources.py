"""Samples and tables of samples: images from any source, before they are packed."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sslvit.data.labels import NO_LABEL


class Images(Protocol):
    """Source of the bytes of samples: files, an array or a data set object."""

    def read(self, item: Any) -> bytes:
        """Return the encoded image; the item is a path or an index, depending on the source."""

    def digest(self) -> str:
        """Return a digest of the pixels; empty for files, which are identified by time and size."""


@dataclass(slots=True)
class Sample:
    """One image on its way into a shard.

    Args:
        key: Name of the sample; packing makes it unique and removes dots.
        suffix: Suffix of the image file, with the dot; empty if it has to be found from the bytes.
        source: Source that holds the image.
        item: Path or index of the image within its source.
        label: Class number, or NO_LABEL.
        bytes: Approximate size in bytes.
        modified_ns: Modification time of the file, to detect changes that keep its size; 0 for none.
    """

    key: str
    suffix: str
    source: Images
    item: Any
    label: int = NO_LABEL
    bytes: int = 0
    modified_ns: int = 0

    def read(self) -> builtins.bytes:
        """Return the encoded image."""
        return self.source.read(self.item)


class Texts:
    """Many strings in one block of memory, which forked processes share; individual str objects would be copied."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.starts = np.cumsum([0, *map(len, encoded)])
        self.content = b"".join(encoded)

    def __getitem__(self, number: int) -> str:
        start, end = self.starts[number], self.starts[number + 1]
        return self.content[start:end].decode("utf-8", "surrogateescape")


class SampleTable:
    """Samples in columns, which take a third of the memory and are shared by forked processes.

    A list of samples would be copied into each process, page by page, as soon as reference counts change.
    """

    def __init__(self, samples: Samples) -> None:
        sources = {id(sample.source): sample.source for sample in samples}
        self.sources = list(sources.values())
        number_of = {key: number for number, key in enumerate(sources)}
        suffixes = list(dict.fromkeys(sample.suffix for sample in samples))
        number_of_suffix = {suffix: number for number, suffix in enumerate(suffixes)}
        self._suffixes, count = suffixes, len(samples)
        self._source = np.fromiter((number_of[id(sample.source)] for sample in samples), np.int32, count)
        self._suffix = np.fromiter((number_of_suffix[sample.suffix] for sample in samples), np.int32, count)
        self.labels = np.fromiter((sample.label for sample in samples), np.int64, count)
        self.bytes = np.fromiter((sample.bytes for sample in samples), np.int64, count)
        self.modified_ns = np.fromiter((sample.modified_ns for sample in samples), np.int64, count)
        self.keys = Texts(sample.key for sample in samples)
        is_path = all(type(sample.item) is str for sample in samples)
        is_number = all(type(sample.item) is int for sample in samples)
        items = (sample.item for sample in samples)
        self._items = Texts(items) if is_path else np.fromiter(items, np.int64, count) if is_number else [*items]

    @classmethod
    def of(cls, samples: Samples) -> SampleTable:
        """Return the samples as a table; a table is returned unchanged."""
        return samples if isinstance(samples, cls) else cls(samples)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Sample:
        item = self._items[number]
        return Sample(
            self.keys[number], self._suffixes[self._suffix[number]], self.sources[self._source[number]],
            int(item) if isinstance(item, np.integer) else item, int(self.labels[number]), int(self.bytes[number]),
            int(self.modified_ns[number]),
        )  # fmt: skip


Samples = Sequence[Sample] | SampleTable


class FileImages:
    """Image files; the item is a path."""

    def digest(self) -> str:
        """Return an empty string, since files are identified by time and size."""
        return ""

    def read(self, item: str) -> bytes:
        """Return the file's bytes."""
        with open(item, "rb") as file:
            return file.read()


@dataclass
class ImageSource:
    """The images found in a source, before they are packed.

    Args:
        samples: Samples in the order of their names.
        classes: Class names by label, or None for images without labels.
        skipped: Name of each skipped entry -> reason, for the index.
        notes: Remarks for the user on how the source was read, one line each.
        orientation: upright or stored, from the index of shards; None for other sources.
    """

    samples: list[Sample]
    classes: list[str] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    orientation: str | None = None


def hold_out(samples: Samples, fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split into training and validation samples.

    The last fraction of each class is held out, at least one image unless the class has only one.

    Raises:
        ValueError: no class has two images.
    """
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    train: list[Sample] = []
    val: list[Sample] = []
    for _, of_class in sorted(by_class.items()):
        cut = max(1, len(of_class) - max(1, round(fraction * len(of_class))))
        train += of_class[:cut]
        val += of_class[cut:]
    if not val:
        raise ValueError(f"--holdout {fraction}: no class has two images, so none can be held out.")
    return train, val
