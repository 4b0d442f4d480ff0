"""The number of samples read, and the samples that could not be: ledger.json."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytorch_lightning as pl

from sslvit.data.batch import Batch
from sslvit.data.mixture import Index, Plan
from sslvit.data.stream import StreamIndex
from sslvit.files import to_json, write_atomically
from sslvit.ranks import all_gather_objects
from sslvit.train.callbacks.base import StepCallback
from sslvit.train.folder import RunFolder, append_lines

ROWS_THAT_SAY_MUCH = 100  # unreadable rows, from which on their fraction of the rows read is meaningful
STEPS_BETWEEN_COUNTS = 50  # with several ranks: steps between two exchanges of their unreadable samples


class Ledger(StepCallback):
    """Counts the samples read, names the unreadable ones, and stops the run if there are too many of them.

    Args:
        folder: The run's folder.
        index: Turns sample numbers into names.
        plan: The order of the data.
        limit: Largest fraction of unreadable samples.
        writes_keys: Also write down the name of every sample that this rank reads.
    """

    def __init__(
        self, folder: RunFolder, index: Index | StreamIndex, plan: Plan, limit: float, writes_keys: bool = False
    ) -> None:
        self.folder, self.index, self.plan, self.limit, self.writes_keys = folder, index, plan, limit, writes_keys
        self.earlier: dict[str, dict[str, Any]] = {}  # from the checkpoint: the same on every rank
        self.of_rank: dict[str, dict[str, Any]] = {}  # found by this rank since then
        self.merged: dict[str, dict[str, Any]] = {}  # of all ranks, at their last exchange

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Drop the names of samples read after the checkpoint, which will be read again."""
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            self.folder.cut_samples_read(self.step)
        trainer.strategy.barrier()  # no rank writes before all files are cut

    def on_micro_batch(self, trainer: pl.Trainer, batch: Batch) -> None:
        """Note the samples that could not be read, and, if requested, the names of all samples."""
        for key, reason in batch.unreadable.items():
            entry = self.of_rank.setdefault(key, {"key": key, "reason": reason, "times": 0})
            entry["times"] += 1
        if self.writes_keys and not isinstance(self.index, StreamIndex):  # for which check_data refuses a ledger
            rows = zip(batch.samples.tolist(), batch.epochs.tolist(), strict=True)
            lines = [{"step": self.step, "epoch": epoch, "key": self.index.key(sample)} for sample, epoch in rows]
            append_lines(self.folder.samples_read(trainer.global_rank), lines)

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check whether too many samples are unreadable."""
        if trainer.world_size > 1 and self.step % STEPS_BETWEEN_COUNTS:
            return  # ranks decide together, and the exchange is not free
        self.check(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check once more, and write ledger.json."""
        self.check(trainer)
        self.save(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """End the run if too many samples are unreadable, of the data set or of those read so far."""
        unreadable = self.exchange()
        rows = sum(entry["times"] for entry in unreadable.values())
        is_much = rows >= ROWS_THAT_SAY_MUCH and rows > self.limit * self.step * self.plan.global_batch_size
        if is_much or len(unreadable) > (max(1, self.limit * len(self.index)) if self.limit else 0):
            self.save(trainer)
            first = next(iter(unreadable.values()))
            raise RuntimeError(
                f"{len(unreadable)} unreadable samples are more than data.max_unreadable_fraction ({self.limit:.1%} "
                f"of {len(self.index)} in all, or of the {self.step * self.plan.global_batch_size} read so far); "
                f"the first: {first['key']}: {first['reason']}. All are in {self.folder.ledger}."
            )

    def exchange(self) -> dict[str, dict[str, Any]]:
        """Unreadable samples of the whole run, by key; all ranks call it."""
        merged = {key: dict(entry) for key, entry in self.earlier.items()}
        for entries in all_gather_objects(self.of_rank):
            for key, entry in entries.items():
                before = merged.get(key, {"times": 0})["times"]
                merged[key] = entry | {"times": entry["times"] + before}
        self.merged = merged
        return merged

    def before_checkpoint(self, trainer: pl.Trainer) -> None:
        """Exchange the counts that the checkpoint will hold."""
        self.exchange()

    def save(self, trainer: pl.Trainer) -> None:
        """Write ledger.json."""
        unreadable = self.merged
        if trainer.is_global_zero:
            epochs = trainer.global_step // self.plan.steps_per_epoch
            content = {
                "samples_read": trainer.global_step * self.plan.global_batch_size,
                "dropped_per_epoch": self.plan.dropped_per_epoch, "epochs_finished": epochs,
                "unreadable_by_reason": dict(Counter(entry["reason"] for entry in unreadable.values())),
                "unreadable": list(unreadable.values()),
            }  # fmt: skip
            write_atomically(self.folder.ledger, to_json(content, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The result of the last exchange."""
        return self.merged

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts of the checkpoint."""
        self.earlier = self.merged = state
