"""A random subset of a data set (`data.limit`, `data.limit_per_class`) that depends only on the seed."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from sslvit import rng
from sslvit.data.index import ShardIndex
from sslvit.files import printable
from sslvit.settings import DataSettings
from sslvit.stopping import is_first_process

logger = logging.getLogger(__name__)


def limit_samples(index: ShardIndex, settings: DataSettings, seed: int) -> ShardIndex:
    """Restrict an index to the images selected by the limits, in the same order.

    The fingerprint stays that of the whole data set.

    Args:
        index: The whole data set.
        settings: The limits.
        seed: Seed of the selection.

    Raises:
        ValueError: there are fewer images than the limit, or no labels for a limit per class.
    """
    settings.images_of(len(index), index.location)  # raises ValueError for a limit above the number of images
    if settings.limit is not None:
        chosen = draw(len(index), seed)[: settings.limit]
        what = f"data.limit: {len(chosen):,} of {len(index):,} images"
    else:
        labels = index.labels_of(slice(None))
        chosen = draw_per_class(labels, settings.limit_per_class or 0, seed)
        counts = np.bincount(labels[chosen])
        few = int(((counts < (settings.limit_per_class or 0)) & (counts > 0)).sum())
        what = f"data.limit_per_class: {len(chosen):,} of {len(index):,} images of {np.count_nonzero(counts):,} classes"
        what += f" ({few:,} of which have fewer)" if few else ""
    if is_first_process():
        logger.info(f"{printable(index.location)}: {what}, drawn by the seed ({seed})")
    numbers = np.sort(chosen)
    counts = np.diff(np.searchsorted(numbers, index.first_of_shard))
    shards = [replace(shard, samples=int(count)) for shard, count in zip(index.shards, counts, strict=True)]
    return replace(index, shards=shards, records=index.records[numbers])


def draw(count: int, seed: int) -> np.ndarray:
    """All sample numbers in random order. A limit takes the first, so a larger limit includes those of a smaller."""
    return rng.generator(seed, "limit").permutation(count)


def draw_per_class(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Sample numbers of `limit` images of each class, or of all images if the class has fewer.

    Args:
        labels: Class number of each sample.
        limit: Number of images per class.
        seed: Seed of the selection.
    """
    order = draw(len(labels), seed)
    by_class = order[np.argsort(labels[order], kind="stable")]  # sorted by class; random order within a class
    sorted_labels = labels[by_class]
    within_class = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return by_class[within_class < limit]
