"""Which samples make up each batch: a pure function of (seed, step). No I/O, and no state but the step.

Every epoch is one permutation of all samples, keyed by seed and epoch. Global batch t is its next B samples; rank
r takes the contiguous slice r of it, and micro-batch m the contiguous slice m of that. So the batch at step t is
the same for any number of ranks, workers and micro-batches, and a resume needs the step and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sslvit.chance import generator


@dataclass
class EpochPlan:
    """The order of a training set.

    Args:
        samples: N, how many there are.
        global_batch: B, samples per optimiser step over all ranks.
        seed: another seed is another order.

    Raises:
        ValueError: fewer samples than one batch.
    """

    samples: int
    global_batch: int
    seed: int = 0
    _epoch: int = field(default=-1, repr=False)
    _order: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(
                f"data.global_batch: {self.global_batch} is more than the {self.samples} samples there are. "
                f"Set it to {self.samples} or less."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left over at the end of each epoch; others in each."""
        return self.samples % self.global_batch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Sample numbers of global batch `step`, counted from zero over the whole run."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, generator(self.seed, epoch, "order").permutation(self.samples)
        return self._order[place * self.global_batch :][: self.global_batch]


def slices(global_batch: int, ranks: int, micro_batch: int | None) -> tuple[int, int]:
    """Images per forward pass on one rank, and forward passes per optimiser step.

    Raises:
        ValueError: the ranks or the micro-batch do not divide the batch; the message names what would.
    """
    if global_batch % ranks:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % n == 0 and n <= max(2 * ranks, 8)]
        near = round(global_batch / ranks) * ranks or ranks
        raise ValueError(
            f"data.global_batch: {global_batch} images cannot be shared equally by {ranks} ranks. "
            f"Use {near} images, or one of {fitting} ranks."
        )
    share = global_batch // ranks
    micro = micro_batch or share
    if share % micro:
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ValueError(
            f"train.micro_batch: {micro} does not divide a rank's share of {share} images "
            f"(global batch {global_batch} over {ranks} ranks). Use one of {fitting[-8:]}."
        )
    return micro, share // micro


def evaluation_batches(samples: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every sample exactly once, in order, in batches of one size: (sample numbers, valid).

    The last batch is filled up by repeating its last sample, marked False in `valid`, so that features do not
    depend on how many samples happen to be left.
    """
    plan = []
    for start in range(0, samples, batch):
        places = np.arange(start, start + batch)
        plan.append((places.clip(max=samples - 1), places < samples))
    return plan
