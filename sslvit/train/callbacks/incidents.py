"""Steps whose loss or gradient is not finite are skipped; too many in a row end the run.

Such a run leaves in incident/ everything needed to repeat the step elsewhere (`sslvit replay`):

config.yaml     settings of the run
incident.json   step (the first is 1), seed, and which weights had gradients that are not finite
state.ckpt      the state before the step; skipping it has changed nothing
batch-rank-00000-0.safetensors and so on: what each rank saw, micro-batch by micro-batch
"""

from __future__ import annotations

import logging
import shlex
import shutil
from dataclasses import asdict

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from sslvit.data.batch import Batch
from sslvit.data.loader import TrainingBatches
from sslvit.data.mixture import Index
from sslvit.data.module import ShardDataModule
from sslvit.data.stream import StreamIndex
from sslvit.files import new_file, to_json, write_atomically
from sslvit.tasks.base import Task
from sslvit.train.callbacks.base import StepCallback, save_checkpoint, wait_for_checkpoint
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)


class Incidents(StepCallback):
    """Counts skipped steps, and ends a run that skips too many in a row.

    Args:
        folder: The run's folder.
        index: Names the samples.
        limit: Number of steps skipped in a row that ends the run.
    """

    def __init__(self, folder: RunFolder, index: Index | StreamIndex, limit: int) -> None:
        self.folder, self.index, self.limit = folder, index, limit
        self.skipped = self.in_a_row = 0
        self.not_finite: list[str] = []  # parameters, in the last skipped step

    def on_step(self, trainer: pl.Trainer, module: Task) -> None:
        """Count skipped steps; end the run after too many in a row.

        A step that logs nothing does not wait: it counts the steps that the device has finished. The host waits for the
        device only if a line is due or the unknown outcomes could reach the limit, so a run ends at the same step on
        every device.
        """
        guard = module.guard
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # which Lightning sets without a type
        is_line_due = self.step % every == 0 or self.step == module.run.total_steps
        self.count(trainer, module, wait=is_line_due or self.in_a_row + guard.pending >= self.limit)
        if self.in_a_row >= self.limit:
            self.save(trainer, module)
            trainer.strategy.barrier()
            resume_hint = "start anew with --overwrite: there is no checkpoint from before"
            if self.folder.goes_on:
                resume_hint = f"go on from the last checkpoint: {self.folder.resume_command}"
            precise = "" if str(trainer.precision).startswith(("32", "64")) else " or train.precision float32"
            raise RuntimeError(
                f"step {self.step}: {self.in_a_row} steps in a row were not finite (train.skip_limit). Look at the "
                f"last: sslvit replay {shlex.quote(str(self.folder.incident))}. Then lower optim.base_lr, set "
                f"optim.clip_grad{precise}, and {resume_hint}."
            )

    def count(self, trainer: pl.Trainer, module: Task, wait: bool) -> None:
        """Count the outcomes of the last steps.

        Args:
            trainer: The run's Trainer.
            module: The task, whose guard knows the outcomes.
            wait: Whether to wait for the device.
        """
        for outcome in module.guard.outcomes(wait):
            self.in_a_row = self.in_a_row + 1 if outcome.skipped else 0
            if not outcome.skipped:
                continue
            self.skipped += 1
            self.not_finite = outcome.not_finite
            where = ", ".join(outcome.not_finite[:3]) or "the loss"
            if trainer.is_global_zero:
                logger.info(f"step {outcome.step}: skipped, not finite ({where}; {self.skipped} so far)")
        if self.skipped:
            module.record("train/skipped_steps", torch.tensor(float(self.skipped), dtype=torch.float64))

    def before_checkpoint(self, trainer: pl.Trainer) -> None:
        """Count all steps that the checkpoint holds."""
        module = trainer.lightning_module
        assert isinstance(module, Task)
        self.count(trainer, module, wait=True)

    def save(self, trainer: pl.Trainer, module: Task) -> None:
        """Save the step that was just skipped, with everything that determines it."""
        if trainer.is_global_zero:
            shutil.rmtree(self.folder.incident, ignore_errors=True)  # of an earlier incident
            self.folder.incident.mkdir()
        trainer.strategy.barrier()
        before = self.step - 1  # steps that came before this one
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        data: ShardDataModule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit
        names = []
        # a stream cannot give the same images again
        if isinstance(dataset, TrainingBatches) and not isinstance(self.index, StreamIndex):
            for number in range(data.run.accumulation_steps):
                batch = data.prepare(dataset[before * data.run.accumulation_steps + number])
                name = f"batch-rank-{trainer.global_rank:05d}-{number}.safetensors"
                with new_file(self.folder.incident / name) as temporary:
                    save_file(as_tensors(batch), temporary, {"first_row": str(batch.first_row)})
                names.append([self.index.key(sample) for sample in batch.samples.tolist()])
        save_checkpoint(trainer, self.folder.incident / "state.ckpt")
        wait_for_checkpoint(trainer)
        if trainer.is_global_zero:
            about = {
                "step": self.step, "seed": module.run.seed, "rank": trainer.global_rank, "ranks": trainer.world_size,
                "precision": str(trainer.precision), "run": asdict(module.run),
                "not_finite": self.not_finite, "samples": names,
            }  # fmt: skip
            shutil.copy(self.folder.config, self.folder.incident / "config.yaml")
            write_atomically(self.folder.incident / "incident.json", to_json(about, indent=1) + "\n")

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts of the checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def as_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A prepared batch as named tensors."""
    named = {f"view_{number:02d}": view.contiguous() for number, view in enumerate(batch.views)}
    named |= {"samples": batch.samples, "valid": batch.valid, "epochs": torch.as_tensor(batch.epochs)}
    return named | ({} if batch.labels is None else {"labels": batch.labels})


def from_tensors(named: dict[str, torch.Tensor], first_row: int) -> Batch:
    """The batch of `as_tensors`."""
    views = [named[name] for name in sorted(named) if name.startswith("view_")]
    return Batch(views, named.get("labels"), named["samples"], named["valid"], named["epochs"], first_row)
