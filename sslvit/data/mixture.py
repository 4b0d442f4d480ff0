"""Several data sets as one: a fixed share of every batch for each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sslvit.data.decode import MODES
from sslvit.data.index import ShardIndex
from sslvit.data.plan import EpochPlan


class JoinedIndex:
    """Several data sets as one: their samples and shards numbered through, without labels.

    Args:
        parts: the data sets.
        weights: share of each in a batch, for the channel statistics.

    Raises:
        ValueError: their images cannot be converted to one number of channels.
    """

    def __init__(self, parts: Sequence[ShardIndex], weights: Sequence[float]) -> None:
        channels = {part.channels for part in parts}
        if len(channels) > 1 and not channels <= set(MODES):
            named = ", ".join(f"{part.location}: {part.channels}" for part in parts)
            raise ValueError(f"data.mixture: sources with other numbers of channels ({named}) cannot be mixed.")
        if len({part.orientation for part in parts}) > 1:
            named = ", ".join(f"{part.location}: {part.orientation}" for part in parts)
            raise ValueError(
                f"data.mixture: some sources are read upright, others as stored ({named}). Pack or index one of them "
                "again with the other's --orientation."
            )
        self.parts, self.orientation = list(parts), parts[0].orientation
        self.location = " + ".join(part.location for part in self.parts)
        self.first_sample = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])
        self.first_shard = np.concatenate([[0], np.cumsum([len(part.shards) for part in self.parts])])
        self.shards = [shard for part in self.parts for shard in part.shards]
        self.classes = None
        self.channels = max(part.channels for part in self.parts)
        self.bits = min(part.bits for part in self.parts)
        sizes = [part.image_size for part in self.parts]
        self.image_size = sizes[0] if all(size == sizes[0] for size in sizes) else None
        share = np.array(weights)[:, None] / sum(weights)
        means, stds = (
            np.array([(getattr(part, name) * self.channels)[: self.channels] for part in self.parts])
            for name in ("mean", "std")
        )
        mean = (share * means).sum(0)
        self.mean = mean.round(4).tolist()
        self.std = np.sqrt((share * (stds**2 + means**2)).sum(0) - mean**2).round(4).tolist()

    def __len__(self) -> int:
        return int(self.first_sample[-1])

    def locate(self, sample: int) -> tuple[int, int, int]:
        part, own = self._part_of(sample)
        shard, offset, size = self.parts[part].locate(own)
        return int(self.first_shard[part]) + shard, offset, size

    def shard_path(self, shard: int) -> Path:
        part, own = self._part_of_shard(shard)
        return part.shard_path(own)

    def fetch_if_free(self, shard: int) -> bool:
        part, own = self._part_of_shard(shard)
        return part.fetch_if_free(own)

    def key(self, sample: int) -> str:
        part, own = self._part_of(sample)
        return f"{self.parts[part].location}/{self.parts[part].key(own)}"

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        raise ValueError("a mixture has no labels.")

    @property
    def is_remote(self) -> bool:
        return any(part.is_remote for part in self.parts)

    def absent(self) -> dict[int, str]:
        firsts = self.first_shard.tolist()
        return {
            first + number: wrong
            for first, part in zip(firsts, self.parts, strict=False)
            for number, wrong in part.absent().items()
        }

    def shard_label(self, shard: int) -> str:
        part, own = self._part_of_shard(shard)
        return f"{part.location}/{part.shard_label(own)}"

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()[:16]

    def _part_of_shard(self, shard: int) -> tuple[ShardIndex, int]:
        part = int(np.searchsorted(self.first_shard, shard, side="right")) - 1
        return self.parts[part], shard - int(self.first_shard[part])

    def _part_of(self, sample: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.first_sample, sample, side="right")) - 1
        return part, int(sample - self.first_sample[part])


class MixturePlan:
    """A fixed share of every batch for each source, and each source its own order and epochs.

    Rows of the sources are spread evenly over the batch, so that every rank gets its share of each.

    Args:
        plans: one per source; their batches add up to the mixture's.
    """

    def __init__(self, plans: Sequence[EpochPlan]) -> None:
        self.plans = list(plans)
        shares = [plan.global_batch_size for plan in self.plans]
        self.samples, self.global_batch_size = sum(plan.samples for plan in self.plans), sum(shares)
        self.seed = self.plans[0].seed
        self.first_sample = np.concatenate([[0], np.cumsum([plan.samples for plan in self.plans])])
        self.first_shard = np.concatenate([[0], np.cumsum([len(plan.shard_samples) for plan in self.plans])])
        place = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
        source = np.repeat(np.arange(len(shares)), shares)
        self.source_of_row = source[np.argsort(place, kind="stable")]

    @property
    def steps_per_epoch(self) -> int:
        """As many batches as the sources hold together; each source has epochs of its own length."""
        return self.samples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        return sum(plan.dropped_per_epoch for plan in self.plans)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        sources = self.source_of_row[start:stop]
        samples, epochs = np.empty((2, len(sources)), np.int64)
        for i, plan, first, last in self._parts(start, stop):
            own, epoch = plan.batch(step, first, last)
            samples[sources == i], epochs[sources == i] = self.first_sample[i] + own, epoch
        return samples, epochs

    def shards_near(self, step: int, start: int = 0, stop: int | None = None) -> list[int]:
        parts = self._parts(start, stop)
        return [self.first_shard[i] + shard for i, plan, *rows in parts for shard in plan.shards_near(step, *rows)]

    def shards_at_once(self, start: int = 0, stop: int | None = None) -> int:
        return sum(plan.shards_at_once(*rows) for _, plan, *rows in self._parts(start, stop))

    def identity(self) -> dict[str, int | str]:
        return {f"source {i}, {key}": value for i, p in enumerate(self.plans) for key, value in p.identity().items()}

    def _parts(self, start: int, stop: int | None) -> list[tuple[int, EpochPlan, int, int]]:
        """(source, its plan, and the rows of its own batch) for those that have any of these rows."""
        before = np.bincount(self.source_of_row[:start], minlength=len(self.plans))
        own = np.bincount(self.source_of_row[start:stop], minlength=len(self.plans))
        return [(i, plan, before[i], before[i] + own[i]) for i, plan in enumerate(self.plans) if own[i]]


def shares_of_batch(shares: Sequence[float], global_batch_size: int) -> list[int]:
    """Rows of a batch for each source, as near to its share as whole rows allow (largest remainders).

    Raises:
        ValueError: a share is not positive, or too small for one row.
    """
    if not all(0 < share < math.inf for share in shares):
        raise ValueError(f"data.mixture: the shares {list(shares)} must all be positive numbers.")
    exact = np.array(shares) / sum(shares) * global_batch_size
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: global_batch_size - rows.sum()]] += 1
    if not rows.all():
        raise ValueError(
            f"data.mixture: a share of {shares[int(rows.argmin())]} in {sum(shares)} is less than one image of "
            f"data.global_batch_size ({global_batch_size}). Raise the share or the batch."
        )
    return rows.tolist()
