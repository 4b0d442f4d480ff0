"""Where images come from before they are packed: folders, lists, arrays, data set objects."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sslvit.data.decode import IMAGE_SUFFIXES, MODES
from sslvit.data.index import NO_LABEL

PATH_COLUMNS = ("path", "file", "filename", "image", "filepath", "file_name")
LABEL_COLUMNS = ("label", "class", "target", "category")
LISTS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
IDX_BYTES = 0x08  # the IDX type code of unsigned bytes


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
    """

    key: str
    suffix: str
    source: FileImages | ArrayImages | DatasetImages
    place: Any
    label: int = NO_LABEL
    bytes: int = 0

    def read(self) -> bytes:
        return self.source.read(self.place)


class FileImages:
    """Image files; the place is a path."""

    def read(self, place: str) -> bytes:
        with open(place, "rb") as file:
            return file.read()


class ArrayImages:
    """Images in memory or mapped from a file, 'n h w' or 'n h w c', uint8 or uint16; the place is a number."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        channels = images.shape[3] if images.ndim == 4 else 1
        is_grey = channels == 1
        self.suffix = ".png" if is_grey or (channels in MODES and images.dtype == np.uint8) else ".npy"

    def digest(self) -> str:
        """Of up to 1,024 images spread over the array."""
        chosen = np.unique(np.linspace(0, len(self.images) - 1, min(len(self.images), 1024)).astype(int))
        return hashlib.sha256(b"".join(self.images[place].tobytes() for place in chosen)).hexdigest()

    def read(self, place: int) -> bytes:
        image, buffer = np.ascontiguousarray(self.images[place]), io.BytesIO()
        if self.suffix == ".npy":
            np.save(buffer, image)
        else:
            Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).save(buffer, "PNG")
        return buffer.getvalue()


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


def read_source(source: str | Path) -> tuple[list[Sample], list[str] | None]:
    """Samples and class names of whatever a path names: a folder, a list, an array or an IDX file.

    Raises:
        ValueError: nothing there that is known.
    """
    path = Path(source)
    if path.is_dir():
        return folder_samples(path)
    if not path.exists():
        raise ValueError(f"{path}: no such folder.")
    name = path.name.lower()
    if path.suffix.lower() in LISTS:
        return list_samples(path)
    if path.suffix.lower() in (".npy", ".npz"):
        return array_file_samples(path)
    if "ubyte" in name or ".idx" in name or "-idx" in name:
        return idx_samples(path)
    raise ValueError(
        f"{path}: neither a folder, nor a list ({', '.join(LISTS)}), nor an array (.npy, .npz), nor an IDX file."
    )


def folder_samples(source: Path) -> tuple[list[Sample], list[str] | None]:
    """The images of a folder in the order of their names, and the classes if there are sub-folders."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder.")
    try:
        entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{source}: not readable ({error.strerror}). Check its permissions.") from error
    folders = [entry for entry in entries if entry.is_dir()]
    here = [entry for entry in entries if entry.is_file() and _is_image(entry.name)]
    if here and folders:
        raise ValueError(
            f"{source}: holds images ({here[0].name}, ...) beside folders ({folders[0].name}, ...). "
            "Either one folder per class, or all images side by side."
        )
    files = FileImages()
    if here:
        return [_file_sample(files, str(path), str(source), NO_LABEL) for path in here], None
    samples = [
        _file_sample(files, path, str(source), label)
        for label, folder in enumerate(folders)
        for path in _files_below(folder)
        if _is_image(path)
        and (os.path.isfile(path) or not os.path.exists(path))  # no pipes; links to nowhere are named
    ]
    if not samples:
        raise ValueError(
            f"{source}: no images there (looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and its folders)."
        )
    return samples, [folder.name for folder in folders]


def list_samples(path: Path) -> tuple[list[Sample], list[str] | None]:
    """The images of a CSV, TSV or JSONL list with a column of paths, relative to the list, and perhaps one of labels.

    Raises:
        ValueError: no such column, a line that cannot be read, or an image that is not there; the line is named.
    """
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{path}: an empty list.")
    columns = rows[0][1]
    path_column = next((name for name in columns if name.lower() in PATH_COLUMNS), None)
    label_column = next((name for name in columns if name.lower() in LABEL_COLUMNS), None)
    if path_column is None:
        raise ValueError(f"{path}: no column of paths among {list(columns)}. Name it one of {', '.join(PATH_COLUMNS)}.")
    files, found = FileImages(), []
    for line, row in rows:
        name, label = row.get(path_column), row.get(label_column) if label_column else None
        if not name or (label_column and label in (None, "")):
            raise ValueError(f"{path}, line {line}: no {label_column if name else path_column} given.")
        full = os.path.join(path.parent, str(name))
        if not os.path.isfile(full):
            raise ValueError(f"{path}, line {line}: {full} does not exist.")
        found.append((full, str(name), label))
    try:
        classes, number_of = _classes([label for *_, label in found]) if label_column else (None, {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    samples = []
    for full, name, label in found:
        stem, suffix = os.path.splitext(name)
        number = number_of[str(label)] if label_column else NO_LABEL
        samples.append(Sample(stem, suffix.lower(), files, full, number, os.path.getsize(full)))
    return samples, classes


def array_samples(
    images: np.ndarray, labels: Iterable[int] | None = None, numbers: Iterable[int] | None = None
) -> list[Sample]:
    """Images in an array, 'n h w' or 'n h w c', named by their numbers (0, 1, ... for None).

    Raises:
        ValueError: not uint8 or uint16, or of another shape.
    """
    if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4):
        raise ValueError(
            f"an array of {images.dtype} and shape {images.shape}; images are uint8 or uint16, 'n h w' or 'n h w c'."
        )
    if labels is not None and len(list(labels)) != len(images):
        raise ValueError(f"{len(list(labels))} labels for {len(images)} images.")
    source = ArrayImages(images)
    labels = [NO_LABEL] * len(images) if labels is None else labels
    numbers = range(len(images)) if numbers is None else numbers
    size = int(np.prod(images.shape[1:])) * images.itemsize
    return [
        Sample(f"{number:06d}", source.suffix, source, place, int(label), size)
        for place, (number, label) in enumerate(zip(numbers, labels, strict=True))
    ]


def array_file_samples(path: Path) -> tuple[list[Sample], list[str] | None]:
    """An .npy file of images, or an .npz with them and perhaps an array of labels.

    Raises:
        ValueError: no array of images in it, several, or pickled objects.
    """
    try:
        content = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        arrays = {"images": content} if isinstance(content, np.ndarray) else {n: content[n] for n in content.files}
    except Exception as error:  # zip, header and pickle errors
        raise ValueError(f"{path}: not a readable array ({error}).") from error
    images = [name for name, array in arrays.items() if array.ndim in (3, 4)]
    labels = [name for name, array in arrays.items() if array.ndim == 1 and array.dtype.kind in "iu"]
    if len(images) != 1 or len(labels) > 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"{path}: expected one array of images and at most one of labels, found {shapes}.")
    return _labelled_arrays(path, arrays[images[0]], arrays[labels[0]] if labels else None)


def idx_samples(path: Path) -> tuple[list[Sample], list[str] | None]:
    """An IDX file of images (MNIST's layout), with its labels if the file beside it holds them.

    The labels of train-images-idx3-ubyte are looked for in train-labels-idx1-ubyte; both may be gzipped.
    """
    images = _read_idx(path)
    labels = None
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside != path and beside.exists():
        labels = _read_idx(beside)
    return _labelled_arrays(path, images, labels)


def dataset_samples(dataset: Any) -> tuple[list[Sample], list[str] | None]:
    """The images of a torchvision data set object, made without transforms.

    Raises:
        ValueError: its items are not PIL images.
    """
    source = DatasetImages(dataset)
    size = len(source.read(0))
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if targets is None and isinstance(dataset[0], tuple):
        targets = [dataset[i][1] for i in range(len(dataset))]
    if targets is None:
        return [Sample(f"{i:06d}", ".png", source, i, NO_LABEL, size) for i in range(len(dataset))], None
    labels = [int(target) for target in targets]
    names = getattr(dataset, "classes", None) or [str(label) for label in range(max(labels) + 1)]
    samples = [Sample(f"{i:06d}", ".png", source, i, label, size) for i, label in enumerate(labels)]
    return samples, [str(name) for name in names]


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


def _labelled_arrays(
    path: Path, images: np.ndarray, labels: np.ndarray | None
) -> tuple[list[Sample], list[str] | None]:
    try:
        samples = array_samples(images, labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if labels is None:
        return samples, None
    if labels.min() < 0:
        raise ValueError(f"{path}: a label of {labels.min()}; classes count from 0.")
    return samples, [str(label) for label in range(int(labels.max()) + 1)]


def _read_idx(path: Path) -> np.ndarray:
    """IDX: two zero bytes, type, number of axes, their lengths as big-endian 32 bits, then the values."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            content = file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not readable ({error}).") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != IDX_BYTES:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes.")
    axes, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path}: ends within its header.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path}: {len(values)} values, but its header says {shape}.")
    return values.reshape(shape)


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, columns) of a list."""
    try:
        yield from _parsed_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not readable ({error}).") from error


def _parsed_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".jsonl":
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {line}: not JSON ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {line}: expected an object with keys, found {row!r:.40}.")
                yield line, row
        else:
            reader = csv.DictReader(file, delimiter=LISTS[path.suffix.lower()])
            for row in reader:
                if None in row:
                    raise ValueError(f"{path}, line {reader.line_num}: more fields than the {len(row) - 1} columns.")
                yield reader.line_num, row


def _classes(labels: list[Any]) -> tuple[list[str], dict[str, int]]:
    """Class names and the number of each: whole numbers keep theirs, names are numbered in alphabetical order."""
    names = {str(label) for label in labels}
    negative = next((name for name in names if name.startswith("-") and name[1:].isdecimal()), None)
    if negative:
        raise ValueError(
            f"a label of {negative}; classes count from 0. Leave the column of labels out if there are none."
        )
    if all(name.isdecimal() for name in names):
        if max(map(int, names)) >= 2 * len(labels) + 1000:
            raise ValueError(f"labels up to {max(map(int, names))} for {len(labels)} images are no class numbers.")
        classes = [str(number) for number in range(max(map(int, names)) + 1)]
        return classes, {name: int(name) for name in names}
    classes = sorted(names)
    return classes, {name: number for number, name in enumerate(classes)}


def _is_image(path: str) -> bool:
    """By its name; the index of packed shards is an array, but none of pixels."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and os.path.basename(path) != "index.npy"


def _files_below(folder: Path) -> list[str]:
    """All files at any depth, in the order of their names; an unreadable folder is an error, not an empty class."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: not readable ({error.strerror}). Check its permissions.") from error

    found = sorted(Path(root) / name for root, _, names in os.walk(folder, onerror=refuse) for name in names)
    # no pipes and devices, which would hang; links to nowhere stay, to be named
    return [str(path) for path in found if path.is_file() or not path.exists()]


def _file_sample(files: FileImages, path: str, root: str, label: int) -> Sample:
    stem, suffix = os.path.splitext(os.path.relpath(path, root))
    size = os.path.getsize(path) if os.path.exists(path) else 0  # a link to nowhere is left out when it is read
    return Sample(stem, suffix.lower(), files, path, label, size)
