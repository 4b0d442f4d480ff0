"""Data sets given from Python: torch's map-style ones, Hugging Face's, arrays and lists.

Settings hold text only, so a name stands for such a data set while a call runs that was given it: `open_shards` finds
the data set under that name. The name tells the number of images and a digest, so that config.yaml says in words what
ran, and a resume on another data set is refused.
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

LOOKED_AT = 64  # images that a data set is known by: their pixels, sizes and channels
READ_TWICE = 8  # of them, to see whether a sample stays the same
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
    """A data set given from Python, as one shard without a file: a record's `offset` is the number of its sample.

    Args:
        source: The data set.
        label_note: Why labels that are there are not used; empty where none are there.
    """

    source: Samples
    label_note: str = ""

    def read(self, sample: int) -> Content:
        """Return a sample's image.

        Raises:
            BadImage: there is none.
        """
        return self.source.read(int(self.records[sample]["offset"]))[0]

    def labels_of(self, samples: np.ndarray | slice) -> np.ndarray:
        """Return class numbers, for which the samples are read where nothing lists them.

        Raises:
            ValueError: these images have none.
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
        """Read the samples for their labels, unless these are known."""
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
        """Return nothing: there are no files."""
        return {}


def is_dataset(data: Any) -> bool:
    """Whether data is given as an object, and not by names."""
    if data is None or isinstance(data, (str, os.PathLike)):
        return False
    is_names = isinstance(data, (list, tuple)) and all(isinstance(name, (str, os.PathLike)) for name in data)
    return not is_names


def samples_of(dataset: Any, label_column: str | None = None) -> Samples:
    """The samples of a data set, by number; of a table of Hugging Face, the columns of image and label.

    Args:
        dataset: A map-style data set.
        label_column: Column of labels in a table; None for the one that its type or name tells.

    Raises:
        ValueError: it gives no samples by number; the message says what does.
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
    return Samples(plain_columns(dataset, label_column) if is_hugging_face(dataset) else dataset)


def python_index(dataset: Any) -> PythonIndex:
    """The index of a data set that is given from Python.

    Some of its images are looked at. Labels are those that an attribute or a column lists; `read_labels` finds others.

    Args:
        dataset: A map-style data set.

    Raises:
        ValueError: not map-style, none of the images that are looked at can be read, or they differ from one reading to
            the next.
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
    """Measure some images, and compute a digest of them and of their number; also their labels, by sample.

    Raises:
        ValueError: none can be read, or one is another image when it is read again.
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
    """What tells an image from others."""
    if isinstance(content, bytes):
        return content
    shape = content.shape if isinstance(content, np.ndarray) else (content.mode, content.size)
    return repr(shape).encode() + content.tobytes()


# ---- names of data sets that are given -----------------------------------------------------------------------

_given: dict[str, PythonIndex] = {}  # while a call runs that was given them


def given_index(name: str) -> PythonIndex:
    """The data set that a name stands for.

    Raises:
        ValueError: it was not given to the call that runs.
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
    """A decorator of functions that take data by name: their parameters, and those settings, take data sets, too.

    Args:
        parameters: Names of parameters, or of settings among **changes, such as online.train, which need labels.
        labels: What becomes of labels in the data of the parameters: taken where something lists them all; read from
            the samples otherwise; refused where there are none.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound, registered = signature.bind(*args, **kwargs), []
            named: dict[str, Any] = bound.arguments
            changes = named.get("changes", {})
            for name in parameters:
                where = changes if "." in name else named
                if is_dataset(where.get(name)):
                    use = "needed" if "." in name else labels
                    index = python_index(where[name])
                    if use == "read":
                        index.read_labels()
                    elif use == "needed":
                        index.labels_of(slice(0))  # refuses before anything is done
                    where[name] = index.location
                    if index.location not in _given:  # a callback may score on what its run was given
                        registered.append(index.location)
                        _given[index.location] = index
            try:
                return function(*bound.args, **bound.kwargs)
            finally:
                for name in registered:
                    del _given[name]

        return call

    return decorate


NameLike = str | Path | Sequence[str | Path]
DataLike = NameLike | MapDataset  # what stands for images in a call


def name_of(data: DataLike | None) -> str | None:
    """Data by one name; a data set has one by now (`takes_datasets`)."""
    return one_source(cast(NameLike | None, data))


def path_of(data: DataLike) -> str:
    """The same with the user's home in the place of `~`, empty where there is no data."""
    return expand_path(name_of(data) or "")
