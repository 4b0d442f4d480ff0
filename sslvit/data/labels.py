"""Convert labels in their usual forms to class numbers and names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sslvit.files import printable

NO_LABEL = -1
LABEL_NAMES = (  # usual names of columns, keys and attributes with labels
    "label", "labels", "class", "classes", "class_name", "class_names", "classname", "class_id", "category",
    "categories", "target", "targets", "species", "y",
)  # fmt: skip
MAX_CLASSES_PER_IMAGE = 2  # labels beyond this many per image (plus 1000) are not classes, but IDs


class NotClasses(ValueError):
    """Labels that cannot be class numbers or names; the message is the reason."""


class Unlabeled(NotClasses):
    """Some labels are -1, which marks images without a class, as in STL-10."""


def sorted_names(names: Iterable[str]) -> list[str]:
    """Class names in the order of their class numbers: numeric if all are numbers, otherwise alphabetical."""
    names = list(names)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def number_labels(labels: Sequence[Any]) -> tuple[list[str], list[int]]:
    """Class names and the class number of each label: integers are kept, names are numbered in sorted order.

    Raises:
        Unlabeled: some labels are -1.
        NotClasses: a label is negative, not a number or name, or far above the number of images.
    """
    texts = [_text_of(label) for label in labels]
    names = set(texts)
    negative = min((int(name) for name in names if name.startswith("-") and name[1:].isdecimal()), default=0)
    if negative == NO_LABEL:
        count = texts.count(str(NO_LABEL))
        rest = "" if count == len(texts) else ", so the others' labels are not used either"
        raise Unlabeled(f"{count} of {len(texts)} labels are -1, which marks images without a class{rest}")
    if negative:
        raise NotClasses(f"a label of {negative}; classes count from 0")
    if all(name.isdecimal() for name in names):
        largest = max(map(int, names))
        if largest >= MAX_CLASSES_PER_IMAGE * len(texts) + 1000:
            raise NotClasses(f"labels up to {largest} for {len(texts)} images are no class numbers")
        return [str(number) for number in range(largest + 1)], [int(name) for name in texts]
    classes = sorted_names(names)
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, [number_of[name] for name in texts]


def labels_in(array: np.ndarray, images: int) -> list[Any]:
    """Read one label per image from an array of shape (n,) or (n, 1) with numbers, booleans or text.

    Raises:
        NotClasses: the labels have another shape or type, or are fractional or one-hot.
    """
    if array.ndim == 2 and array.shape[0] == images and array.shape[1] > 1:
        raise NotClasses(f"{array.shape[1]} values for each image; give one class number or name for each")
    if array.size != images or array.ndim > 2:
        raise NotClasses(f"shape {array.shape} for {images} images")
    flat = array.reshape(-1)
    if flat.dtype.kind == "f":
        if not (np.isfinite(flat).all() and (flat == flat.round()).all()):
            raise NotClasses(f"{flat.dtype} numbers that are not whole")
        flat = flat.astype(np.int64)
    if flat.dtype.kind not in "biuUS":
        raise NotClasses(f"{flat.dtype} values")
    return flat.tolist()


def _text_of(label: Any) -> str:
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, (list, dict)):
        raise NotClasses(f"a label of {printable(label, 40)}; give one number or name")
    if isinstance(label, bytes):
        label = label.decode("utf-8", "surrogateescape")
    return str(label).strip()


def brief_names(names: Iterable[str], count: int = 5) -> str:
    """The first names, for a message."""
    names = [printable(name, 40) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
