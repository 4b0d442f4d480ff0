"""A mixture of data sets: each fills a fixed fraction of every batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sslvit.data.header import MODES
from sslvit.data.index import ShardIndex
from sslvit.data.plan import EpochPlan


def _of_channels(values: Sequence[float], channels: int, alpha: float) -> list[float]:
    """A source's mean or standard deviation as images of another number of channels have it (gray, RGB, with alpha)."""
    found = [*values] * (min(channels, 3) if len(values) == 1 else 1)
    return found + [alpha] * (channels - len(found))


class JoinedIndex:
    """Several data sets as one, without labels; samples and shards are numbered consecutively across them.

    The weights are the sources' shares of a batch, and weight the channel statistics.

    Raises:
        ValueError: the sources differ in orientation, or in channels that cannot be converted.
    """

    def __init__(self, sources: Sequence[ShardIndex], weights: Sequence[float]) -> None:
        channels = {source.channels for source in sources}
        if len(channels) > 1 and not channels <= set(MODES):
            named = ", ".join(f"{source.location}: {source.channels}" for source in sources)
            raise ValueError(f"data.mixture: sources with other numbers of channels ({named}) cannot be mixed.")
        if len({source.orientation for source in sources}) > 1:
            named = ", ".join(f"{source.location}: {source.orientation}" for source in sources)
            raise ValueError(
                f"data.mixture: some sources are read upright, others as stored ({named}). Pack or index one of them "
                "again with the other's --orientation."
            )
        self.sources, self.orientation = list(sources), sources[0].orientation
        self.location = " + ".join(source.location for source in self.sources)
        self.first_sample = np.concatenate([[0], np.cumsum([len(source) for source in self.sources])])
        self.first_shard = np.concatenate([[0], np.cumsum([len(source.shards) for source in self.sources])])
        self.shards = [shard for source in self.sources for shard in source.shards]
        self.classes: list[str] | None = None
        self.channels = max(source.channels for source in self.sources)
        self.bits = min(source.bits for source in self.sources)
        sizes = [source.image_size for source in self.sources]
        self.image_size = sizes[0] if all(size == sizes[0] for size in sizes) else None
        weight = np.array(weights)[:, None] / sum(weights)
        means = np.array([_of_channels(source.mean, self.channels, 1.0) for source in self.sources])
        stds = np.array([_of_channels(source.std, self.channels, 0.0) for source in self.sources])
        mean = (weight * means).sum(0)
        self.mean = mean.round(4).tolist()
        self.std = np.sqrt((weight * (stds**2 + means**2)).sum(0) - mean**2).round(4).tolist()

    def __len__(self) -> int:
        return int(self.first_sample[-1])

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Return shard number, offset and length of a sample's image."""
        number, local = _position(self.first_sample, sample)
        shard, offset, size = self.sources[number].locate(local)
        return int(self.first_shard[number]) + shard, offset, size

    def shard_path(self, shard: int) -> Path:
        """Return the local path of a shard."""
        number, local = _position(self.first_shard, shard)
        return self.sources[number].shard_path(local)

    def fetch_if_free(self, shard: int) -> bool:
        """Fetch a shard in advance; False if another process or thread is fetching it."""
        number, local = _position(self.first_shard, shard)
        return self.sources[number].fetch_if_free(local)

    def key(self, sample: int) -> str:
        """Return a sample's readable name, with its data set."""
        number, local = _position(self.first_sample, sample)
        return f"{self.sources[number].location}/{self.sources[number].key(local)}"

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Raise ValueError: a mixture has no labels."""
        raise ValueError("a mixture has no labels.")

    @property
    def is_remote(self) -> bool:
        """Whether any shard is on the network."""
        return any(source.is_remote for source in self.sources)

    def missing_shards(self) -> dict[int, str]:
        """Number of each local shard that is missing or has the wrong length -> problem."""
        firsts = self.first_shard.tolist()
        return {
            first + number: wrong
            for first, source in zip(firsts, self.sources, strict=False)
            for number, wrong in source.missing_shards().items()
        }

    def shard_label(self, shard: int) -> str:
        """Return a shard's readable name, with its data set."""
        number, local = _position(self.first_shard, shard)
        return f"{self.sources[number].location}/{self.sources[number].shard_label(local)}"

    def fingerprint(self) -> str:
        """Return a short digest of the bytes of all shards."""
        return hashlib.sha256("".join(source.fingerprint() for source in self.sources).encode()).hexdigest()[:16]


def _position(firsts: np.ndarray, joined: int) -> tuple[int, int]:
    """Source of a sample or shard in the joined numbering, and its number within that source."""
    source = int(np.searchsorted(firsts, joined, side="right")) - 1
    return source, int(joined - firsts[source])


Index = ShardIndex | JoinedIndex  # a data set whose samples are read by number


class MixturePlan:
    """Batches with a fixed fraction of each source; each source has its own order and epochs.

    The rows of each source are spread evenly over the batch, so that every rank gets some of them.
    """

    def __init__(self, plans: Sequence[EpochPlan]) -> None:
        self.plans = list(plans)
        sizes = [plan.global_batch_size for plan in self.plans]
        self.samples, self.global_batch_size = sum(plan.samples for plan in self.plans), sum(sizes)
        self.seed = self.plans[0].seed
        self.first_sample = np.concatenate([[0], np.cumsum([plan.samples for plan in self.plans])])
        self.first_shard = np.concatenate([[0], np.cumsum([len(plan.shard_samples) for plan in self.plans])])
        position = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        source = np.repeat(np.arange(len(sizes)), sizes)
        self.source_of_row = source[np.argsort(position, kind="stable")]

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that the sources fill together; each source has its own epoch length."""
        return self.samples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left over at the end of each source's epoch."""
        return sum(plan.dropped_per_epoch for plan in self.plans)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return sample numbers and epochs of the given rows of a global batch."""
        sources = self.source_of_row[start:stop]
        samples, epochs = np.empty((2, len(sources)), np.int64)
        for i, plan, first, last in self._rows_by_source(start, stop):
            local, epoch = plan.batch(step, first, last)
            samples[sources == i], epochs[sources == i] = self.first_sample[i] + local, epoch
        return samples, epochs

    def shards_near(self, step: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Return the shards that these rows read at this step, then those of the next windows."""
        return [
            int(self.first_shard[i]) + shard
            for i, plan, first, last in self._rows_by_source(start, stop)
            for shard in plan.shards_near(step, first, last)
        ]

    def shards_at_once(self, start: int = 0, stop: int | None = None) -> int:
        """Return the number of shards that must be available at a time for these rows."""
        return sum(plan.shards_at_once(first, last) for _, plan, first, last in self._rows_by_source(start, stop))

    def identity(self) -> dict[str, int | str]:
        """Return everything that decides the order."""
        return {f"source {i}, {key}": value for i, p in enumerate(self.plans) for key, value in p.identity().items()}

    def _rows_by_source(self, start: int, stop: int | None) -> list[tuple[int, EpochPlan, int, int]]:
        """(source, plan, start and stop of the rows in its own batch) of each source with any of these rows."""
        before = np.bincount(self.source_of_row[:start], minlength=len(self.plans))
        rows = np.bincount(self.source_of_row[start:stop], minlength=len(self.plans))
        return [(i, plan, int(before[i]), int(before[i] + rows[i])) for i, plan in enumerate(self.plans) if rows[i]]


Plan = EpochPlan | MixturePlan  # which samples make up each batch


def split_by_weight(weights: Sequence[float], global_batch_size: int) -> list[int]:
    """Number of rows of a batch for each source, in proportion to its weight (largest remainder method).

    Raises:
        ValueError: a weight is not positive, or too small for one row.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"data.mixture: the weights {list(weights)} must all be positive numbers.")
    exact = np.array(weights) / sum(weights) * global_batch_size
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: global_batch_size - rows.sum()]] += 1
    if not rows.all():
        raise ValueError(
            f"data.mixture: a weight of {weights[int(rows.argmin())]} in {sum(weights)} is less than one image of "
            f"data.global_batch_size ({global_batch_size}). Raise the weight or the batch size."
        )
    return rows.tolist()
