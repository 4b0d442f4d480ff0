"""The basic numbers of a run, computed once from its settings and its data set."""

from __future__ import annotations

from dataclasses import dataclass

from sslvit.settings.run import TrainSettings


@dataclass(frozen=True)
class RunPlan:
    """Number of steps, batch sizes and ranks of a run; all parts of the run use this record.

    Args:
        total_steps: Number of optimizer steps in the run.
        steps_per_epoch: Number of optimizer steps in one pass over the data.
        global_batch_size: Images per optimizer step, over all ranks and micro-batches.
        micro_batch_size: Images per forward pass on one rank; None for the rank's whole share of the global batch.
        ranks: Number of processes.
        seed: Seed of all random numbers.

    Raises:
        ValueError: The global batch is not a multiple of the ranks, or a rank's share not one of the micro-batch.
    """

    total_steps: int
    steps_per_epoch: int
    global_batch_size: int
    micro_batch_size: int | None = None
    ranks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        split_batch(self.global_batch_size, self.ranks, self.micro_batch_size)

    @classmethod
    def make(cls, train: TrainSettings, steps_per_epoch: int, global_batch_size: int, seed: int) -> RunPlan:
        """Make the plan of a run; the micro-batch size "auto" counts as the rank's whole share here.

        Raises:
            ValueError: The length of the run is not chosen yet, or the batch cannot be split.
        """
        micro = None if train.micro_batch_size == "auto" else train.micro_batch_size
        if train.steps is None and train.epochs is None:
            raise ValueError("train.epochs: still null. Call TrainSettings.fitted first.")
        steps = train.steps or max(1, round((train.epochs or 0) * steps_per_epoch))
        return cls(steps, steps_per_epoch, global_batch_size, micro, train.ranks, seed)

    @property
    def images_per_rank(self) -> int:
        """Images of one rank per optimizer step."""
        return self.global_batch_size // self.ranks

    @property
    def images_per_pass(self) -> int:
        """Images per forward pass on one rank."""
        return split_batch(self.global_batch_size, self.ranks, self.micro_batch_size)[0]

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of each rank per optimizer step."""
        return split_batch(self.global_batch_size, self.ranks, self.micro_batch_size)[1]

    @property
    def images_per_epoch(self) -> int:
        """Images used in one pass over the data; an incomplete last batch is dropped."""
        return self.steps_per_epoch * self.global_batch_size


def split_batch(global_batch_size: int, ranks: int, micro_batch_size: int | None) -> tuple[int, int]:
    """Images per forward pass on one rank, and forward passes per optimizer step.

    Raises:
        ValueError: The batch cannot be split evenly; the message suggests sizes that can.
    """
    if global_batch_size % ranks:
        near = round(global_batch_size / ranks) * ranks or ranks
        raise ValueError(
            f"data.global_batch_size: {global_batch_size} must be a multiple of the number of ranks ({ranks}). "
            f"Use {near} images, or one of {fitting_ranks(global_batch_size, max(2 * ranks, 8))} ranks."
        )
    per_rank = global_batch_size // ranks
    micro = micro_batch_size or per_rank
    if per_rank % micro:
        fitting = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise ValueError(
            f"train.micro_batch_size: {micro} must divide the {per_rank} images of each rank "
            f"(global batch {global_batch_size} over {ranks} ranks). Use one of {fitting[-8:]}."
        )
    return micro, per_rank // micro


def fitting_ranks(global_batch_size: int, most: int) -> list[int]:
    """Numbers of ranks up to `most` that divide a batch evenly."""
    return [n for n in range(1, min(global_batch_size, most) + 1) if global_batch_size % n == 0]
