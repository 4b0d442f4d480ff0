"""Labeled data sets to probe on: checks by names alone before packing, and checks before features are computed."""

from __future__ import annotations

import numpy as np

from sslvit.data.folders import check_labeled
from sslvit.data.index import ShardIndex
from sslvit.data.labels import brief_names, sorted_names
from sslvit.data.open import check_present, open_shards
from sslvit.data.overlap import check_same_data, check_same_source
from sslvit.data.sources import ImageSource
from sslvit.files import brief, counted, printable
from sslvit.settings import ProbeSettings
from sslvit.settings.protocols import DINOv2ProbeSettings


def open_labeled(settings: ProbeSettings) -> tuple[ShardIndex, ShardIndex]:
    """Open the two data sets of a probe; refuse them unless they have the same classes and different images."""
    for key in ("train", "val"):
        check_labeled(f"--{key}", getattr(settings, key))  # before anything is packed
    check_same_source(settings.train, settings.val, settings.allow_same_data, "--allow-same-data")

    def check(found: ImageSource) -> None:
        if found.classes is not None:
            check_counts(found.classes, np.array([sample.label for sample in found.samples]), settings)

    train = open_shards(settings.train, check=check)
    val = open_shards(settings.val, check=lambda found: check_same_classes(train, found.classes, settings.val))
    check_classes(train, val, settings)
    check_same_data(train, val, settings.allow_same_data, "--allow-same-data")
    return train, val


def class_difference(train: ShardIndex, of_val: list[str], location: str) -> str:
    """The difference between the classes of two data sets, in words."""
    of_train = train.classes or []
    missing = [
        f"{brief_names(sorted_names(set(one) - set(other)))} only in {where}"
        for one, other, where in ((of_train, of_val, train.location), (of_val, of_train, location))
        if set(one) - set(other)
    ]
    if missing:
        return "; ".join(missing)
    number = next(i for i, (one, other) in enumerate(zip(of_train, of_val, strict=True)) if one != other)
    return f"the same names in another order (number {number} is {of_train[number]} and {of_val[number]})"


def check_classes(train: ShardIndex, val: ShardIndex, settings: ProbeSettings) -> None:
    """Refuse data that cannot be probed before any feature is computed."""
    for index in (train, val):
        check_present(index, 0.0)
        index.labels_of(np.arange(0))  # refuses unlabeled data
    check_same_classes(train, val.classes, val.location)
    check_counts(train.classes or [], train.labels_of(slice(None)), settings)


def check_same_classes(train: ShardIndex, classes: list[str] | None, location: str) -> None:
    """Refuse scored images whose classes differ from those of the training images.

    Args:
        train: Data that heads are fitted on.
        classes: Classes of the scored images; None for unlabeled images, which another check refuses.
        location: Location of the scored images.

    Raises:
        ValueError: The classes differ.
    """
    if classes is not None and train.classes != classes:
        raise ValueError(
            f"{train.location} and {printable(location)} have different classes: "
            f"{class_difference(train, classes, printable(location))}. Pack both from one folder with --holdout."
        )


def check_counts(classes: list[str], labels: np.ndarray, settings: ProbeSettings) -> None:
    """Refuse training images of one class, more neighbors or labels than there are, and classes held out as a whole.

    Args:
        classes: Class names.
        labels: Class number of each training image.
        settings: Settings of the probe.

    Raises:
        ValueError: There are too few training images, or all are of one class.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        raise ValueError(
            f"--train: all images are of one class ({brief(classes[int(counts.argmax())])}), so any answer is right. "
            "Give images of two or more."
        )
    if settings.neighbors and min(settings.neighbors) > len(labels):
        raise ValueError(f"--neighbors {min(settings.neighbors)}: there are only {len(labels):,} training images.")
    few, smallest = settings.labels_per_class, classes[int(counts.argmin())]
    if few and counts.min() < few:
        raise ValueError(f"--labels-per-class {few}: class {brief(smallest)} has only {counts.min()} training images.")
    if settings.labels_percent and round(counts.min() * settings.labels_percent / 100) < 1:
        raise ValueError(
            f"--labels-percent {settings.labels_percent:g}: of class {brief(smallest)} ({counts.min()} training "
            "images) none would be drawn. Give a larger percentage, or --labels-per-class."
        )
    protocol, fewest = settings.protocol, int(counts[counts > 0].min())
    if isinstance(protocol, DINOv2ProbeSettings) and protocol.held_out_of(fewest) >= fewest:
        images = f"class {brief(classes[counts.tolist().index(fewest)])} ({counted(fewest, 'training image')})"
        raise ValueError(
            f"--protocol.held_out {protocol.held_out:g}: of {images} none would be left to fit on. Give more images "
            "of it, a smaller fraction, or another protocol."
        )
