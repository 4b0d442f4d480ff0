"""Samples to pack from data sets given from Python, by Hugging Face or by torchvision."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.data import hugging_face
from sslvit.data.header import BadImage
from sslvit.data.labels import NO_LABEL
from sslvit.data.plan import evenly_spaced
from sslvit.data.preprocess import encoded
from sslvit.data.python_data import look_at, samples_of
from sslvit.data.python_labels import find_labels
from sslvit.data.python_samples import Samples
from sslvit.data.sources import ImageSource, Sample
from sslvit.environment import require_packages
from sslvit.files import printable
from sslvit.settings.pack import SourceOptions

HUGGING_FACE, TORCHVISION = "hf:", "torchvision:"  # prefixes of the names of their data sets
SAVED = ("state.json", "dataset_dict.json")  # files that `save_to_disk` writes
TRAIN_WORDS = {"train": True, "test": False, "val": False}  # --split for data sets with an argument `train`
SIZED = 16  # images read to estimate the mean size of all


class DatasetImages:
    """Images of a data set object: files unchanged, decoded images as PNG, or as .npy for other numbers of channels."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def digest(self) -> str:
        """Return a digest of some images."""
        return str(look_at(self.samples)[1].hexdigest())

    def read(self, item: int) -> bytes:
        """Return an image as the bytes of a file.

        Raises:
            BadImage: the sample has no image.
        """
        content, _ = self.samples.read(item)
        return content if isinstance(content, bytes) else encoded(content)


def dataset_source(dataset: Any, label_column: str | None = None) -> ImageSource:
    """Read the images of a data set object, with its labels.

    Args:
        dataset: A map-style data set.
        label_column: Label column of a Hugging Face table; None to find it by type or name.

    Raises:
        ValueError: the data set is not map-style or holds no images.
    """
    samples = samples_of(dataset, label_column)
    *_, examples = look_at(samples)
    labels = find_labels(samples, examples, reads_samples=True)
    source, size = DatasetImages(samples), _usual_size(samples)
    numbers = np.full(len(samples), NO_LABEL) if labels.numbers is None else labels.numbers
    packed = [Sample(f"{item:06d}", "", source, item, int(label), size) for item, label in enumerate(numbers)]
    return ImageSource(packed, labels.classes, notes=[labels.note] if labels.note else [])


def _usual_size(samples: Samples) -> int:
    """Approximate size of an image in bytes."""
    source, sizes = DatasetImages(samples), []
    for item in evenly_spaced(len(samples), SIZED):
        with suppress(BadImage):
            sizes.append(len(source.read(int(item))))
    return int(np.mean(sizes)) if sizes else 0


# ---- by name -------------------------------------------------------------------------------------------------


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by Hugging Face's `save_to_disk`."""
    return any((folder / name).is_file() for name in SAVED)


def hugging_face_source(name: str, options: SourceOptions) -> ImageSource:
    """Images of a Hugging Face data set, hf:NAME or hf:NAME:CONFIG, or of a folder written by `save_to_disk`.

    Raises:
        ImportError: the library is not installed.
        ValueError: there is no such data set or split, or it holds no images.
    """
    require_packages(printable(name), "sslvit[datasets]", "datasets")
    import datasets

    if name.startswith(HUGGING_FACE):
        path, _, config = name.removeprefix(HUGGING_FACE).partition(":")
        names = _loaded(name, lambda: datasets.get_dataset_split_names(path, config or None))
        split = _only_split(name, names, options.split)
        dataset = _loaded(name, lambda: datasets.load_dataset(path, config or None, split=split))
    else:
        dataset = _loaded(name, lambda: datasets.load_from_disk(name))
        if isinstance(dataset, dict):
            dataset = dataset[_only_split(name, list(dataset), options.split)]
        elif options.split is not None:
            raise ValueError(f"--split {options.split}: {printable(name)} is one split. Omit the option.")
    found = dataset_source(dataset, options.label_column)
    label = hugging_face.label_name(dataset, options.label_column)
    left = [column for column in dataset.column_names if column not in (hugging_face.image_name(dataset), label)]
    if left:
        remedy = "" if label else f" (for labels: --label-column {printable(left[0])})"
        found.notes.append(f"columns that are not used: {hugging_face.brief_names(left)}{remedy}")
    return found


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """Call `load`; any exception becomes a ValueError of one line."""
    try:
        return load()
    except Exception as error:  # from files, the network, formats or the library itself
        reason = printable(" ".join(str(error).split()), 200)
        raise ValueError(f"{printable(name)}: cannot be loaded ({type(error).__name__}: {reason}).") from error


def _only_split(name: str, names: list[str], requested: str | None) -> str:
    """The requested split, or the only one."""
    if requested is None and len(names) == 1:
        return names[0]
    if requested not in names:
        given = "several splits" if requested is None else f"no split {requested}"
        raise ValueError(f"{printable(name)}: {given}. Choose one with --split: {', '.join(map(printable, names))}.")
    return requested


def torchvision_source(name: str, options: SourceOptions) -> ImageSource:
    """Images of one of torchvision's data sets, such as torchvision:CIFAR100.

    Raises:
        ValueError: there is no such data set or split, or its files are missing.
    """
    from torchvision import datasets

    kinds = {one: getattr(datasets, one) for one in datasets.__all__}
    kind = kinds.get(name.removeprefix(TORCHVISION))
    if kind is None or "root" not in inspect.signature(kind).parameters:
        near = difflib.get_close_matches(name.removeprefix(TORCHVISION), kinds, 3, 0.4)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise ValueError(f"{printable(name)}: not among torchvision's data sets.{hint}")
    if options.root is None:
        raise ValueError(f"{printable(name)}: where are its files? Give --root FOLDER (--download fetches them there).")
    parameters = inspect.signature(kind).parameters
    given: dict[str, Any] = {"root": options.root}
    if options.split is not None:
        given |= _split_keyword(name, parameters, options.split)
    if "download" in parameters:
        given["download"] = options.download
    elif options.download:
        raise ValueError(f"{printable(name)}: torchvision cannot download it. Leave --download out.")
    try:
        dataset = kind(**given)
    except Exception as error:  # from files, the network or the values of arguments
        reason = printable(" ".join(str(error).split()), 160)
        remedy = "" if options.download else f" Is it in {printable(options.root)}? --download fetches it there."
        raise ValueError(f"{printable(name)}: {reason.rstrip('.')}.{remedy}") from error
    return dataset_source(dataset)


def _split_keyword(name: str, parameters: Any, split: str) -> dict[str, Any]:
    """The keyword argument that selects a split of a torchvision data set."""
    for keyword in ("split", "image_set"):
        if keyword in parameters:
            return {keyword: split}
    if "train" in parameters and split in TRAIN_WORDS:
        return {"train": TRAIN_WORDS[split]}
    remedy = "Choose train or test." if "train" in parameters else "It has no splits: omit the option."
    raise ValueError(f"--split {split}: {printable(name)} has no such split. {remedy}")
