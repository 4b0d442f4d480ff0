"""Labels of a data set given from Python, from an attribute, a column or the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from sslvit.data.header import BadImage
from sslvit.data.hugging_face import is_hugging_face, label_column
from sslvit.data.labels import NotClasses, Unlabeled, labels_in, number_labels
from sslvit.data.parallel import in_parallel
from sslvit.data.python_samples import Samples

CHUNK_SAMPLES = 256  # samples per piece of work for a process


@dataclass
class Labels:
    """Class names, and the class number of every sample; both None without labels.

    The note is the reason why existing labels are not used; otherwise empty.
    """

    classes: list[str] | None = None
    numbers: np.ndarray | None = None
    note: str = ""


def find_labels(source: Samples, examples: Mapping[int, Any], reads_samples: bool) -> Labels:
    """Find the labels of a data set.

    Args:
        source: The data set.
        examples: Labels of some samples by number, as given by the samples themselves.
        reads_samples: Whether to read all samples if no attribute or column lists the labels.
    """
    if is_hugging_face(source.dataset):
        found, names = label_column(source.dataset)
    else:
        found, names = listed_labels(source.dataset)
    told = {item: label for item, label in examples.items() if label is not None}
    if found is not None and any(plain(found[item]) != plain(label) for item, label in told.items()):
        found = None  # the samples say something else
    if found is None and reads_samples and told:
        found = read_labels(source)
    if found is None:
        return Labels()
    try:
        values = np.asarray([plain(label) for label in found])
    except ValueError:
        return Labels(note="labels are not used: they are lists or arrays of different lengths, not one class each")
    try:
        classes, numbers = number_labels(labels_in(values, len(source)))
    except Unlabeled as error:
        return Labels(note=str(error))
    except NotClasses as error:
        return Labels(note=f"labels are not used: {error}")
    is_numbered = all(name.isdecimal() for name in classes)
    if names is not None and is_numbered and len(names) >= len(classes):
        classes = [str(name) for name in names]
    return Labels(classes, np.asarray(numbers))


def listed_labels(dataset: Any) -> tuple[list[Any] | None, list[str] | None]:
    """Labels and class names from attributes, as torchvision's data sets have them; each may be None."""
    if isinstance(dataset, Subset):
        whole, names = listed_labels(dataset.dataset)
        return None if whole is None else [whole[item] for item in dataset.indices], names
    found: Any
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    names = getattr(dataset, "classes", None)
    if not isinstance(found, (list, tuple, np.ndarray, Tensor)) or len(found) != len(dataset):
        return None, None
    return list(found), list(names) if isinstance(names, (list, tuple)) else None


def read_labels(source: Samples) -> list[Any]:
    """Read every sample for its label; an unreadable sample gets the first label that was found."""

    def read_chunk(chunk: int, tick: Callable[[int], None]) -> list[Any]:
        found: list[Any] = []
        for item in range(chunk * CHUNK_SAMPLES, min((chunk + 1) * CHUNK_SAMPLES, len(source))):
            try:
                found.append(plain(source.read(item)[1]))
            except BadImage:
                found.append(None)
        tick(len(found))
        return found

    chunks = math.ceil(len(source) / CHUNK_SAMPLES)
    workers = None if chunks >= 4 else 1  # starting processes takes longer
    labels = [one for chunk in in_parallel(read_chunk, chunks, workers, "labels", len(source)) for one in chunk]
    first = next((label for label in labels if label is not None), None)
    return [first if label is None else label for label in labels]


def plain(label: Any) -> Any:
    """Convert a label to plain Python numbers, text or lists."""
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    if isinstance(label, (np.ndarray, np.generic)):
        return label.item() if label.size == 1 else label.tolist()
    return label
