"""The basic numbers of a run, computed once from its settings and its data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sslvit.files import counted
from sslvit.settings.run import TrainSettings

if TYPE_CHECKING:
    import pytorch_lightning as pl


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

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse a Trainer that would take other steps than this plan, or change what a task decides in each step.

        Raises:
            ValueError: Its accumulation, number of processes, gradient clipping, precision, learning rate or length
                differ.
        """
        from pytorch_lightning.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

        passes = counted(self.accumulation_steps, "pass")
        if trainer.accumulate_grad_batches != self.accumulation_steps:
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): the run plan says {passes} of "
                f"{counted(self.images_per_pass, 'image')} for a global batch of {self.global_batch_size} on "
                f"{counted(self.ranks, 'rank')}. Set accumulate_grad_batches={self.accumulation_steps}."
            )
        if trainer.world_size != self.ranks:
            raise ValueError(
                f"Trainer: {counted(trainer.world_size, 'process')}, but the run plan says {self.ranks}. Make "
                f"RunPlan with ranks={trainer.world_size}."
            )
        if trainer.gradient_clip_val is not None:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): the task clips by its own settings. Set "
                "OptimSettings.clip_grad instead."
            )
        if trainer.precision in ("16-mixed", "16-true"):  # gradients would be clipped at the scale of the loss
            raise ValueError(
                f'Trainer(precision="{trainer.precision}"): tasks do not scale their loss. Set precision="bf16-mixed" '
                'or "32-true".'
            )
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, StochasticWeightAveraging):
                raise ValueError(
                    "StochasticWeightAveraging: the task sets the learning rate of every step, so swa_lrs would have "
                    "no effect. Use WeightAveraging, which averages weights alone."
                )
            scheduled = callback.scheduling if isinstance(callback, GradientAccumulationScheduler) else {}
            if set(scheduled.values()) - {self.accumulation_steps}:
                raise ValueError(
                    f"GradientAccumulationScheduler({scheduled}): the run plan has one global batch for all epochs, in "
                    f"{passes}. Leave the callback out."
                )
        epochs = trainer.max_epochs or -1
        steps = trainer.max_steps if trainer.max_steps > 0 else epochs * self.steps_per_epoch
        if steps > self.total_steps or steps < 0:
            raise ValueError(
                f"Trainer: {steps if steps > 0 else 'no limit of'} steps, but the schedules end after "
                f"{self.total_steps} (RunPlan.total_steps). Set max_steps={self.total_steps}, or plan for more."
            )

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
