"""The samples of each batch, as a pure function of (seed, step). There is no I/O, and no state but the step.

Global batch t of B samples is the same, in the same order, for any number of ranks, workers and micro-batches;
rank r takes the contiguous slice r of it, and micro-batch m the contiguous slice m of that. To resume, only the step
is needed.

A small data set is permuted as a whole in every epoch. For a large one, every batch would then touch B shards. Instead,
its shards are permuted into a ring, L lanes of equal length are cut from the ring at a random position, and each lane
is shuffled within windows of a few shards; a batch takes B/L samples of every lane. L and the window are properties of
the run and never depend on ranks or workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sslvit import rng

FULL_PERMUTATION_SAMPLES = 1_000_000  # data sets up to this size are permuted as a whole
LANES = 64


def evenly_spaced(images: int, limit: int) -> np.ndarray:
    """Numbers of at most `limit` images, evenly spaced over a data set."""
    return np.unique(np.linspace(0, images - 1, min(images, limit)).astype(int))


class EpochPlan:
    """The order of one training set.

    Args:
        shard_samples: Number of samples in each shard; samples are numbered consecutively across shards.
        global_batch_size: Number B of samples per optimizer step, over all ranks.
        seed: Seed of the order.
        lanes: Number L of lanes; None for one permutation up to a million samples, and gcd(64, B) lanes above.
        window_shards: Number of shards of a lane that are shuffled together.

    Raises:
        ValueError: fewer samples than one batch, or lanes that do not divide the batch.
    """

    def __init__(
        self,
        shard_samples: Sequence[int] | np.ndarray,
        global_batch_size: int,
        seed: int = 0,
        lanes: int | None = None,
        window_shards: int = 4,
    ) -> None:
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.first_of_shard = np.concatenate([[0], np.cumsum(self.shard_samples)])
        self.samples, self.global_batch_size, self.seed = int(self.first_of_shard[-1]), global_batch_size, seed
        if self.samples < global_batch_size:
            raise ValueError(
                f"data.global_batch_size: {global_batch_size} is more than the {self.samples} samples there are. "
                f"Set it to {self.samples} or less."
            )
        self.is_whole = lanes is None and self.samples <= FULL_PERMUTATION_SAMPLES
        self.lanes = 1 if self.is_whole else lanes or math.gcd(LANES, global_batch_size)
        if global_batch_size % self.lanes:
            divisors = [n for n in range(1, min(global_batch_size, 256) + 1) if global_batch_size % n == 0]
            raise ValueError(
                f"data.lanes: {lanes} does not divide data.global_batch_size ({global_batch_size}). Use {divisors}."
            )
        windowed = window_shards * math.ceil(self.samples / len(self.shard_samples))
        self.window = self.samples if self.is_whole else windowed
        self.per_lane = global_batch_size // self.lanes  # rows of a batch from each lane
        self.lane_length = self.steps_per_epoch * self.per_lane
        self._rings: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in one epoch."""
        return self.samples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        """Number of samples left over in each epoch; they differ from epoch to epoch."""
        return self.samples % self.global_batch_size

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return sample numbers and epochs of the given rows of a global batch."""
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        rows = np.arange(start, self.global_batch_size if stop is None else stop)
        lane_of_row, within = np.divmod(rows, self.per_lane)
        samples = np.empty(len(rows), np.int64)
        for lane in np.unique(lane_of_row):
            in_lane = lane_of_row == lane
            samples[in_lane] = self._samples_at(epoch, int(lane), epoch_step * self.per_lane + within[in_lane])
        return samples, np.full(len(rows), epoch)

    def shards_near(self, step: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Return the shards that these rows read at this step, then those of the next windows."""
        if self.is_whole:
            return np.flatnonzero(self.shard_samples).tolist()
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        first, last = self._lanes_of(start, stop)
        now: list[int] = []
        ahead: list[int] = []
        for lane in range(first, last + 1):
            window = int(self._window_of(lane, epoch_step * self.per_lane))
            now += self._shards_of(epoch, lane, window)
            if self._window_range(lane, window)[1] < self.lane_length:
                ahead += self._shards_of(epoch, lane, window + 1)
            else:
                ahead += self._shards_of(epoch + 1, lane, 0)
        return [shard for shard in dict.fromkeys(now + ahead) if self.shard_samples[shard]]

    def shards_at_once(self, start: int = 0, stop: int | None = None) -> int:
        """Return the number of shards that must be available at a time for these rows."""
        if self.is_whole:
            return int(np.count_nonzero(self.shard_samples))
        first, last = self._lanes_of(start, stop)
        smallest_first = np.cumsum(np.sort(self.shard_samples))
        window_shards = int(np.searchsorted(smallest_first, self.window)) + 2  # windows may begin and end inside shards
        return min(len(self.shard_samples), (last - first + 1) * 2 * window_shards)  # this window and the next

    def identity(self) -> dict[str, int | str]:
        """Return everything that determines the order."""
        return {
            "samples": self.samples, "global_batch_size": self.global_batch_size, "seed": self.seed,
            "lanes": self.lanes, "window": self.window,
        }  # fmt: skip

    def _samples_at(self, epoch: int, lane: int, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at the given positions of a lane."""
        samples = np.empty(len(positions), np.int64)
        windows = self._window_of(lane, positions)
        for window in np.unique(windows):
            in_window = windows == window
            begin, order = self._window_order(epoch, lane, int(window))
            samples[in_window] = order[positions[in_window] - begin]
        return samples

    def _window_order(self, epoch: int, lane: int, window: int) -> tuple[int, np.ndarray]:
        """First position of a window in its lane, and its shuffled samples; caches the latest window of each lane."""
        begin, stop = self._window_range(lane, window)
        cached = self._windows.get(lane)
        if cached is not None and cached[0] == (epoch, window):
            return begin, cached[1]
        if self.is_whole:
            order = rng.generator(self.seed, epoch, "order").permutation(self.samples)
        else:
            shuffled = rng.generator(self.seed, epoch, "order", lane, window).permutation(stop - begin)
            order = self._samples_on_ring(epoch, lane * self.lane_length + begin + shuffled)
        self._windows[lane] = (epoch, window), order
        return begin, order

    def _window_of(self, lane: int, position: int | np.ndarray) -> int | np.ndarray:
        return (position + self.window - self._first_window(lane)) // self.window

    def _window_range(self, lane: int, window: int) -> tuple[int, int]:
        """Start and stop of the positions that a window of a lane covers."""
        begin = window * self.window - (self.window - self._first_window(lane))
        return max(0, begin), min(begin + self.window, self.lane_length)

    def _first_window(self, lane: int) -> int:
        """Length of a lane's first window, which differs so that lanes do not all need new shards at the same time."""
        return max(1, self.window * (lane + 1) // self.lanes)

    def _lanes_of(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.global_batch_size if stop is None else stop
        return start // self.per_lane, (stop - 1) // self.per_lane

    def _ring_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The epoch's shards in order, the start of each on the ring, and the start of the first lane.

        The samples that the epoch drops lie between the last lane and the first. Their position is random, so that no
        sample is dropped more often than others.
        """
        if epoch not in self._rings:
            generator = rng.generator(self.seed, epoch, "shards")
            shards = generator.permutation(len(self.shard_samples))
            starts = np.concatenate([[0], np.cumsum(self.shard_samples[shards])])
            self._rings = {other: ring for other, ring in self._rings.items() if abs(other - epoch) == 1}
            self._rings[epoch] = shards, starts, int(generator.integers(self.samples))
        return self._rings[epoch]

    def _samples_on_ring(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        shards, starts, turn = self._ring_of(epoch)
        positions = (positions + turn) % self.samples
        ordinal = np.searchsorted(starts, positions, side="right") - 1
        return self.first_of_shard[shards[ordinal]] + positions - starts[ordinal]

    def _shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        shards, starts, turn = self._ring_of(epoch)
        begin, stop = self._window_range(lane, window)
        ends = (lane * self.lane_length + np.array([begin, stop - 1]) + turn) % self.samples
        first, last = np.searchsorted(starts, ends, side="right") - 1
        if ends[0] <= ends[1]:
            return shards[first : last + 1].tolist()
        return [*shards[first:].tolist(), *shards[: last + 1].tolist()]


class EvaluationBatches:
    """Every sample exactly once over all ranks, as batches (numbers, valid) of one size, equally many on each rank.

    Batch t of rank r starts at sample (t * ranks + r) * batch_size. Rows past the end repeat the last sample and are
    False in `valid`; so all batches have one size, and features do not depend on the size of the last batch. Batches
    are made on access.

    Args:
        samples: Number of samples.
        batch_size: Maximum batch size; it is reduced if the same number of batches still holds all samples.
        rank: Rank that gets these batches.
        ranks: Number of ranks.
    """

    def __init__(self, samples: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.samples, self.rank, self.ranks = samples, rank, ranks
        self.batch_size = math.ceil(samples / math.ceil(samples / batch_size)) if samples else batch_size

    def __len__(self) -> int:
        return math.ceil(self.samples / (self.batch_size * self.ranks))

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = (number * self.ranks + self.rank) * self.batch_size
        samples = np.arange(start, start + self.batch_size)
        return samples.clip(max=self.samples - 1), samples < self.samples
