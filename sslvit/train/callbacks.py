"""What happens around the steps: records become lines, bad samples become a ledger."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed
from tqdm import tqdm

from sslvit.data.batch import Batch
from sslvit.data.index import Index
from sslvit.data.plan import Plan
from sslvit.files import to_json, write_atomically
from sslvit.train.folder import RunFolder, append_lines
from sslvit.train.logs import log_line
from sslvit.train.timing import Clock

logger = logging.getLogger(__name__)

ROWS_THAT_SAY_MUCH = 100  # unreadable ones from which on their share of what was read counts
FAR_OFF = 1e6  # a loss from which on its decimals say nothing
MUCH_WAITING = 0.1  # of a step
STEPS_BETWEEN_COUNTS = 50  # with several ranks: how often they add up their unreadable samples


class StepCallback(pl.Callback):
    """A callback that acts once per optimizer step, not per micro-batch."""

    step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch: Batch, batch_idx: int) -> None:
        self.on_micro_batch(trainer, batch)
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.on_step(trainer, module)

    def on_micro_batch(self, trainer: pl.Trainer, batch: Batch) -> None:
        pass

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        pass


class RunLog(StepCallback):
    """Appends a line to metrics.jsonl when it is due, and shows how far the run is.

    Args:
        folder: of the run.
        plan: turns steps into epochs.
        total_steps: of the run.
        every: steps between two lines.
        clock: knows where the time went.
        mfu_per_throughput: share of the devices' peak that one image a second takes (MFU); None where that is not
            known.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, total_steps: int, every: int, clock: Clock,
        mfu_per_throughput: float | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.plan, self.total_steps, self.every = folder, plan, total_steps, every
        self.clock, self.mfu_per_throughput = clock, mfu_per_throughput
        self.bar: tqdm | None = None
        self.earlier_seconds = 0.0  # that training took up to the checkpoint that this process goes on from

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.start = self.last = time.monotonic()
        self.first_step = self.last_step = self.step
        if trainer.is_global_zero:
            self.folder.cut_metrics(self.step)
            if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
                self.bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit=" steps")

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(1)
        if self.step % self.every and self.step != self.total_steps:
            module.records.clear()
            return
        line = {name: float(mean_over_ranks(trainer, values)) for name, values in module.records.items()}
        module.records.clear()
        done, self.last_step = self.step - self.last_step, self.step  # on every rank
        seconds = self.clock.take()
        times = torch.tensor([value / done for value in seconds.values()], dtype=torch.float64)
        times = mean_over_ranks(trainer, [times]).tolist()
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        line = {"step": self.step, "epoch": self.step / self.plan.steps_per_epoch, **line}
        line["images_per_second"] = done * self.plan.global_batch_size / (now - self.last)
        if self.mfu_per_throughput is not None:
            line["mfu"] = line["images_per_second"] * self.mfu_per_throughput
        line |= {f"{part}_seconds": value for part, value in zip(seconds, times, strict=True)}
        line["elapsed_seconds"] = self.elapsed(now)
        append_lines(self.folder.metrics, [line])
        log_line(trainer, line)
        self.last = now
        self._show(line)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()

    def elapsed(self, now: float) -> float:
        """Seconds of training up to a moment, over all processes that went on with the run."""
        return self.earlier_seconds + now - self.start

    def state_dict(self) -> dict[str, float]:
        return {"elapsed_seconds": self.elapsed(time.monotonic())}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.earlier_seconds = state["elapsed_seconds"]

    def _show(self, line: dict[str, float]) -> None:
        loss, speed = line.get("loss", float("nan")), line["images_per_second"]
        bits = f" ({_short(line['bits'])} bits)" if "bits" in line else ""
        waiting = line["data_seconds"] * speed / self.plan.global_batch_size
        mfu = f", MFU {line['mfu']:.0%}" if "mfu" in line else ""
        pace = f"{speed:,.0f} images/s{mfu}" + (f", {waiting:.0%} waiting for data" if waiting > MUCH_WAITING else "")
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {_short(loss)}{bits}, {pace}")
            return
        left = (self.total_steps - self.step) * (self.last - self.start) / max(self.step - self.first_step, 1)
        logger.info(
            f"step {self.step}/{self.total_steps}  epoch {line['epoch']:.1f}  loss {_short(loss)}{bits}  "
            f"{pace}  {_duration(left)} left")  # fmt: skip


def _short(value: float) -> str:
    """Four decimals, or two digits of a number that has gone far off."""
    return f"{value:.4f}" if abs(value) < FAR_OFF or value != value else f"{value:.2g}"


def mean_over_ranks(trainer: pl.Trainer, values: list[torch.Tensor]) -> torch.Tensor:
    """The mean over micro-batches and ranks; every rank must ask for it."""
    mean = torch.stack([value.cpu().double() for value in values]).mean(0)
    if trainer.world_size > 1:
        mean = trainer.strategy.reduce(mean.to(trainer.strategy.root_device), reduce_op="mean").cpu()
    return mean


class Ledger(StepCallback):
    """Counts what was read, names what could not be, and stops the run when that is too much.

    Args:
        folder: of the run.
        index: turns sample numbers into names.
        plan: of the run.
        limit: largest share of unreadable samples.
        writes_keys: also write down the name of every sample that this rank reads.
    """

    def __init__(self, folder: RunFolder, index: Index, plan: Plan, limit: float, writes_keys: bool = False) -> None:
        self.folder, self.index, self.plan, self.limit, self.writes_keys = folder, index, plan, limit, writes_keys
        self.earlier: dict[str, dict[str, Any]] = {}  # from the checkpoint: the same on every rank
        self.own: dict[str, dict[str, Any]] = {}  # met by this rank since

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            self.folder.cut_samples_read(self.step)
        trainer.strategy.barrier()  # no rank writes before all files are cut

    def on_micro_batch(self, trainer: pl.Trainer, batch: Batch) -> None:
        for key, reason in batch.bad.items():
            entry = self.own.setdefault(key, {"key": key, "reason": reason, "times": 0})
            entry["times"] += 1
        if self.writes_keys:
            rows = zip(batch.samples.tolist(), batch.epochs.tolist(), strict=True)
            lines = [{"step": self.step, "epoch": epoch, "key": self.index.key(sample)} for sample, epoch in rows]
            append_lines(self.folder.samples_read(trainer.global_rank), lines)

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size > 1 and self.step % STEPS_BETWEEN_COUNTS:
            return  # ranks decide together, and counting together is not free
        self.check(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.check(trainer)
        self.save(trainer, self.of_all_ranks())

    def check(self, trainer: pl.Trainer) -> None:
        """End the run if too much is unreadable, of the data set or of what was read so far."""
        bad = self.of_all_ranks()
        rows = sum(entry["times"] for entry in bad.values())
        is_much = rows >= ROWS_THAT_SAY_MUCH and rows > self.limit * self.step * self.plan.global_batch_size
        if is_much or len(bad) > (max(1, self.limit * len(self.index)) if self.limit else 0):
            self.save(trainer, bad)
            first = next(iter(bad.values()))
            raise RuntimeError(
                f"{len(bad)} unreadable samples are more than data.max_unreadable_fraction ({self.limit:.1%} "
                f"of {len(self.index)} in all, or of the {self.step * self.plan.global_batch_size} read so far); "
                f"the first: {first['key']}: {first['reason']}. All are in {self.folder.ledger}."
            )

    def of_all_ranks(self) -> dict[str, dict[str, Any]]:
        """Bad samples of the whole run, by key."""
        shares = [self.own]
        if distributed.is_available() and distributed.is_initialized():
            shares = [{} for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(shares, self.own)
        merged = {key: dict(entry) for key, entry in self.earlier.items()}
        for share in shares:
            for key, entry in share.items():
                before = merged.get(key, {"times": 0})["times"]
                merged[key] = entry | {"times": entry["times"] + before}
        return merged

    def save(self, trainer: pl.Trainer, bad: dict[str, dict[str, Any]]) -> None:
        if trainer.is_global_zero:
            epochs = trainer.global_step // self.plan.steps_per_epoch
            content = {
                "samples_read": trainer.global_step * self.plan.global_batch_size,
                "dropped_per_epoch": self.plan.dropped_per_epoch, "epochs_finished": epochs,
                "bad_by_reason": dict(Counter(entry["reason"] for entry in bad.values())), "bad": list(bad.values()),
            }  # fmt: skip
            write_atomically(self.folder.ledger, to_json(content, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return self.of_all_ranks()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.earlier = state


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
