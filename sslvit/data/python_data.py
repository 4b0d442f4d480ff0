"""Data sets given as Python objects: map-style data sets of torch, Hugging Face tables, arrays and lists.

Settings hold text only, so such a data set is registered under a name while the call that was given it runs, and
`open_shards` looks it up. The name contains the number of images and a digest, so that config.yaml records which data
was used, and a resume with another data set is rejected.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from sslvit import rng
from sslvit.data.header import BadImage, Content, read_header
from sslvit.data.hugging_face import is_hugging_face, plain_columns
from sslvit.data.index import Shard, ShardIndex
from sslvit.data.labels import NO_LABEL
from sslvit.data.measure import Measured
from sslvit.data.python_labels import find_labels
from sslvit.data.python_samples import Samples
from sslvit.data.records import RECORD
from sslvit.files import counted, expand_path, printable
from sslvit.settings.data import one_source

LOOKED_AT = 64  # images read for the digest and properties of a data set
READ_TWICE = 8  # of these, to check that reading is deterministic
P = ParamSpec("P")
R = TypeVar("R")


@runtime_checkable
class MapDataset(Protocol):
    """Samples by number: `len(data)` and `data[i]`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, item: int) -> Any:
        """A sample."""


@dataclass(kw_only=True)
class PythonIndex(ShardIndex):
    """The index of a data set given from Python: one shard without a file; a record's `offset` is its sample number.

    Args:
        source: The data set.
        label_note: Reason why existing labels are not used; otherwise empty.
    """

    source: Samples
    label_note: str = ""

    def read(self, sample: int) -> Content:
        """Return a sample's image.

        Raises:
            BadImage: the sample has no image.
        """
        return self.source.read(int(self.records[sample]["offset"]))[0]

    def labels_of(self, samples: np.ndarray | slice) -> np.ndarray:
        """Return class numbers; reads all samples if no attribute or column lists the labels.

        Raises:
            ValueError: the images have no labels.
        """
        self.read_labels()
        if self.classes is None:
            reason = f" ({self.label_note})" if self.label_note else ""
            raise ValueError(
                f"{self.location}: no labels, which are needed here{reason}. Give samples of (image, label), a dict "
                "with a key label, or an attribute targets that lists them all."
            )
        return super().labels_of(samples)

    def read_labels(self) -> None:
        """Read all samples for their labels, unless the labels are known."""
        if self.classes is None and not self.label_note:
            *_, examples = look_at(self.source)
            found = find_labels(self.source, examples, reads_samples=True)
            if found.numbers is not None:
                self.records["label"] = found.numbers[self.records["offset"]]
            self.classes, self.label_note = found.classes, found.note

    def key(self, sample: int) -> str:
        """Return a sample's readable name."""
        return f"{self.source.kind}[{int(self.records[sample]['offset'])}]"

    def missing_shards(self) -> dict[int, str]:
        """Return an empty dict, since there are no files."""
        return {}


def is_dataset(data: Any) -> bool:
    """Whether data is a data set object, not a name or several names."""
    if data is None or isinstance(data, (str, os.PathLike)):
        return False
    is_names = isinstance(data, (list, tuple)) and all(isinstance(name, (str, os.PathLike)) for name in data)
    return not is_names


def samples_of(dataset: Any, label_column: str | None = None) -> Samples:
    """Give access to a data set's samples by number; for a Hugging Face table, to its image and label columns.

    Args:
        dataset: A map-style data set.
        label_column: Label column of a table; None to find it by type or name.

    Raises:
        ValueError: the data set is empty or not map-style; the message says what to give instead.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise ValueError(f"{kind}: batches in an order of their own. Give its data set: loader.dataset.")
    if isinstance(dataset, dict):
        raise ValueError(f"{kind}: several data sets. Give one of them: data[{next(iter(dataset), 'train')!r}].")
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, MapDataset):
        raise ValueError(
            f"{kind}: samples come one after the other and cannot be asked for by number, so their order could be "
            "neither shuffled by the seed nor resumed. Give a map-style data set (len(data) and data[i]), or write the "
            "images into shards (sslvit shards pack)."
        )
    if not len(dataset):
        raise ValueError(f"{kind}: no images in it.")
    if _is_pair(dataset):
        raise ValueError(
            f"{kind}: images and their labels, which would be taken for two images. Give samples of (image, label), "
            "such as list(zip(images, labels))."
        )
    return Samples(plain_columns(dataset, label_column) if is_hugging_face(dataset) else dataset)


def _is_pair(dataset: Any) -> bool:
    """Whether a list of two holds all images and all labels."""
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        return False
    images, labels = dataset
    return getattr(images, "ndim", 0) >= 3 and (isinstance(labels, (list, tuple)) or getattr(labels, "ndim", 0) == 1)


def python_index(dataset: Any) -> PythonIndex:
    """Make the index of a data set given from Python.

    A few images are read. Labels come from an attribute or column; `read_labels` finds labels given by the samples.

    Args:
        dataset: A map-style data set.

    Raises:
        ValueError: the data set is not map-style, none of the images read is usable, or an image changes from one
            reading to the next.
    """
    source = samples_of(dataset)
    measured, digest, examples = look_at(source)
    kind, count = printable(source.kind), len(source)
    labels = find_labels(source, examples, reads_samples=False)
    digest.update(repr((labels.classes, [label for _, label in sorted(examples.items())])).encode())
    location = f"{kind} of {counted(count, 'image')} given from Python ({digest.hexdigest()[:8]})"
    records = np.zeros(count, RECORD)
    records["offset"], records["label"] = np.arange(count), NO_LABEL if labels.numbers is None else labels.numbers
    return PythonIndex(
        location, [Shard(kind, count, 0, digest.hexdigest())], records, labels.classes,
        **measured.describe(location), source=source, label_note=labels.note,
    )  # fmt: skip


def look_at(source: Samples) -> tuple[Measured, Any, dict[int, Any]]:
    """Read some images; returns their properties, a digest of them and of the number of images, and their labels.

    Raises:
        ValueError: no image is readable, or one changes when it is read again.
    """
    count = len(source)
    items = rng.generator(count, "look").choice(count, min(LOOKED_AT, count), replace=False, shuffle=False)
    measured, digest, labels = Measured(), hashlib.sha256(f"{count}".encode()), {}
    problems: list[str] = []
    for number, item in enumerate(sorted(items.tolist())):
        try:
            content, labels[item] = source.read(item)
            header = read_header(content)
            measured.measure(content, header)
        except BadImage as error:
            problems.append(f"{source.kind}[{item}]: {error}")
            continue
        measured.count(header)
        bits = as_bytes(content)
        digest.update(bits)
        if number < READ_TWICE and as_bytes(source.read(item)[0]) != bits:
            raise ValueError(
                f"{source.kind}[{item}] is another image each time it is read, so that no run on it could be resumed "
                "exactly. Leave random transforms out of the data set: sslvit makes the views (data.view), or your own "
                "function does (sslvit.pretrain(..., transform=))."
            )
    if not measured.images:
        raise ValueError(
            f"{source.kind}: none of the {len(items)} samples that were looked at holds an image. {problems[0]}."
        )
    return measured, digest, labels


def as_bytes(content: Content) -> bytes:
    """Bytes that identify an image."""
    if isinstance(content, bytes):
        return content
    shape = content.shape if isinstance(content, np.ndarray) else (content.mode, content.size)
    return repr(shape).encode() + content.tobytes()


# ---- names of data sets that are given -----------------------------------------------------------------------

_given: dict[str, PythonIndex] = {}  # registered only during the call that was given them


def given_index(name: str) -> PythonIndex:
    """Look up the data set registered under a name.

    Raises:
        ValueError: no running call was given this data set.
    """
    if name not in _given:
        raise ValueError(
            f"{printable(name)}: an object of a Python process, which no file holds. Give it again from Python "
            "(data=...), or pack it into shards and name these: sslvit.pack(DATASET, FOLDER)."
        )
    return _given[name]


def takes_datasets(
    *parameters: str, labels: Literal["listed", "read", "needed"] = "listed"
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function that takes data by name, so that the given parameters and settings also take data sets.

    Args:
        parameters: Names of parameters, or of settings in **changes such as online.train, which require labels.
        labels: Use of labels for the parameters: "listed" uses labels from an attribute or column only, "read" also
            reads the samples for them, and "needed" raises ValueError if there are none.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound, registered = signature.bind(*args, **kwargs), []
            named: dict[str, Any] = bound.arguments
            changes = named.get("changes", {})
            try:
                for name in parameters:
                    where = changes if "." in name else named
                    if is_dataset(where.get(name)):
                        use = "needed" if "." in name else labels
                        index = python_index(where[name])
                        if use == "read":
                            index.read_labels()
                        elif use == "needed":
                            index.labels_of(slice(0))  # raises an error before any work is done
                        where[name] = index.location
                        if index.location not in _given:  # nested calls may be given the same data set
                            registered.append(index.location)
                            _given[index.location] = index
                return function(*bound.args, **bound.kwargs)
            finally:
                for name in registered:
                    del _given[name]

        return call

    return decorate


NameLike = str | Path | Sequence[str | Path]
DataLike = NameLike | MapDataset  # data as the Python functions accept it


def name_of(data: DataLike | None) -> str | None:
    """Data as a single name; `takes_datasets` has already replaced data sets by names."""
    return one_source(cast(NameLike | None, data))


def path_of(data: DataLike) -> str:
    """`name_of` with `~` expanded; empty if there is no data."""
    return expand_path(name_of(data) or "")
