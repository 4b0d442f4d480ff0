"""Where images come from before they are packed, whatever their source: samples, and tables of them."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sslvit.data.labels import NO_LABEL


class Images(Protocol):
    """Where the bytes of samples come from: files, an array, a data set object."""

    def read(self, item: Any) -> bytes:
        """Return the encoded image; the item is a path or an index, as the source counts."""

    def digest(self) -> str:
        """Return what tells the pixels of one source from another's; empty for files, which have times and lengths."""


@dataclass(slots=True)
class Sample:
    """One image on its way into a shard.

    Args:
        key: its name; made unique and free of dots on the way.
        suffix: Suffix of the image file, with the dot; empty where only its bytes tell.
        source: Source that holds the image.
        item: path or index of the image within its source.
        label: class number, or NO_LABEL.
        bytes: about how long it is.
        modified_ns: Time of the file's last change, which tells two of equal length apart; 0 for none.
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
    """Many texts in one piece of memory, which processes share after a fork: no object of its own for each."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.starts = np.cumsum([0, *map(len, encoded)])
        self.content = b"".join(encoded)

    def __getitem__(self, number: int) -> str:
        start, end = self.starts[number], self.starts[number + 1]
        return self.content[start:end].decode("utf-8", "surrogateescape")


class SampleTable:
    """Samples in columns: a third of the memory, and processes share it after a fork.

    A list of samples would be copied into each process, page by page, as soon as their reference counts are touched.
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
        """Return the samples as a table, which they may be already."""
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


Samples = Sequence[Sample] | SampleTable  # in their order


class FileImages:
    """Image files; the item is a path."""

    def digest(self) -> str:
        """Return nothing: times and lengths of files tell them apart."""
        return ""

    def read(self, item: str) -> bytes:
        """Return the file's bytes."""
        with open(item, "rb") as file:
            return file.read()


@dataclass
class ImageSource:
    """Images that were found somewhere, before they are packed.

    Args:
        samples: Samples in the order of their names.
        classes: Class names by label, or None for images without labels.
        skipped: what was skipped, with the reason, for the index.
        notes: what a person should know of how it was read, one line each.
        orientation: upright or stored, of shards, whose index says it; None for what packing is asked for.
    """

    samples: list[Sample]
    classes: list[str] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    orientation: str | None = None


def hold_out(samples: Samples, fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split into train and validation: the last fraction of each class, at least one image, unless it has only one.

    Raises:
        ValueError: every class has one image.
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
