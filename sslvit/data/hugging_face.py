"""Hugging Face data sets; the `datasets` library is only needed to load them by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sslvit.data.labels import LABEL_NAMES, brief_names
from sslvit.data.python_samples import IMAGE_NAMES


def is_hugging_face(dataset: Any) -> bool:
    """Whether an object is a Hugging Face table; does not import the library."""
    return hasattr(dataset, "features") and hasattr(dataset, "column_names") and hasattr(dataset, "select_columns")


def plain_columns(dataset: Any, label: str | None = None) -> Any:
    """Reduce a table to its image and label columns, with images as encoded files where the table holds files.

    A table with a format or transform (set_format, set_transform) is returned unchanged.

    Args:
        dataset: The table.
        label: Name of the label column; None to find it by type or name.

    Raises:
        ValueError: there is no image column, or no label column of that name.
    """
    if dataset.format["type"] is not None:
        return dataset
    image, label = image_name(dataset), label_name(dataset, label)
    dataset = dataset.select_columns([image] if label is None else [image, label])
    feature = dataset.features[image]
    if getattr(feature, "decode", False):
        as_files = dataset.cast_column(image, type(feature)(decode=False))
        first = as_files[0][image]
        if first is not None and (first["bytes"] is not None or os.path.isfile(first["path"] or "")):
            dataset = as_files
    names = {image: "image"} | ({} if label is None else {label: "label"})
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def image_name(dataset: Any) -> str:
    """Name of the image column.

    Raises:
        ValueError: there is none, or several candidates.
    """
    found = [name for name, feature in dataset.features.items() if type(feature).__name__ == "Image"]
    named = [name for name in found if name in IMAGE_NAMES]
    if len(found) != 1 and len(named) != 1:
        several = f"several columns of images ({brief_names(found)})" if found else "no column of images"
        raise ValueError(f"{several} among {brief_names(dataset.column_names)}. Keep one: data.select_columns([...]).")
    return named[0] if len(named) == 1 else found[0]


def label_name(dataset: Any, requested: str | None = None) -> str | None:
    """Name of the label column: the only ClassLabel column, or one with a usual name; None if there is none.

    Raises:
        ValueError: there is no column of the requested name.
    """
    if requested is not None:
        if requested not in dataset.column_names:
            raise ValueError(f"--label-column {requested}: not among the columns {brief_names(dataset.column_names)}.")
        return requested
    classes = [name for name, feature in dataset.features.items() if type(feature).__name__ == "ClassLabel"]
    named = [name for name in dataset.column_names if name.lower() in LABEL_NAMES]
    if len(classes) == 1:
        return classes[0]
    return next((name for name in named if name in classes or not classes), None)


def label_column(dataset: Any) -> tuple[Sequence[Any] | None, list[str] | None]:
    """All labels of a table and their class names; each may be None."""
    name = label_name(dataset)
    if name is None or dataset.format["type"] is not None:
        return None, None
    feature = dataset.features[name]
    return dataset.select_columns([name])[:][name], getattr(feature, "names", None)
