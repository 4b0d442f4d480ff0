"""Shards -> batches of views, for training (Lightning) and for evaluation (a plain loop)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from sslvit.data.batch import Batch
from sslvit.data.index import ShardIndex
from sslvit.data.plan import EpochPlan, evaluation_batches, slices
from sslvit.data.reader import ShardReader
from sslvit.data.views import View, normalise
from sslvit.settings import DataSettings, EncoderSettings, ViewSettings


def make_batch(
    reader: ShardReader, view: View, samples: np.ndarray, epoch: int, valid: np.ndarray, first_row: int = 0
) -> Batch:
    """Read, decode and view the given samples."""
    images, bad = reader.images(samples)
    valid = valid.copy()
    valid[list(bad)] = False
    labels = None
    if reader.index.classes is not None:
        labels = torch.from_numpy(reader.index.labels[samples].astype(np.int64))
    return Batch(
        [view(images, samples, epoch)], labels, torch.from_numpy(samples), torch.from_numpy(valid), first_row,
        {int(samples[i]): reason for i, reason in bad.items()},
    )  # fmt: skip


class TrainingBatches(Dataset):
    """Micro-batch i of one rank, counted over the whole run. Each worker makes whole batches."""

    def __init__(self, reader: ShardReader, view: View, plan: EpochPlan, rank: int, micro: int, passes: int) -> None:
        self.reader, self.view, self.plan = reader, view, plan
        self.rank, self.micro, self.passes = rank, micro, passes

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.passes)
        first_row = (self.rank * self.passes + part) * self.micro
        samples = self.plan.batch(step)[first_row : first_row + self.micro]
        everyone = np.ones(len(samples), bool)
        return make_batch(self.reader, self.view, samples, self.plan.epoch_of(step), everyone, first_row)


class ShardDataModule(pl.LightningDataModule):
    """Training batches in an order that only the seed decides, and the exact position saved and restored.

    Args:
        index: of the shards.
        settings: batch, view and loading.
        encoder: size, channels and normalisation of its input.
        plan: the order; its seed is also that of the views.
        total_steps: optimiser steps of the run.
        micro_batch: images per forward pass on one rank, or None for the rank's share.
    """

    def __init__(
        self,
        index: ShardIndex,
        settings: DataSettings,
        encoder: EncoderSettings,
        plan: EpochPlan,
        total_steps: int,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.index, self.settings, self.encoder = index, settings, encoder
        self.plan, self.total_steps, self.micro_batch = plan, total_steps, micro_batch
        self.view = View(settings.view, encoder.image_size, encoder.interpolation, plan.seed)
        self.start_step = 0
        self.reader: ShardReader | None = None

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        micro, passes = slices(self.plan.global_batch, trainer.world_size, self.micro_batch)
        if self.reader is None:
            self.reader = ShardReader(self.index, self.encoder.channels, self.settings.memory_limit_mb)
        batches = TrainingBatches(self.reader, self.view, self.plan, trainer.global_rank, micro, passes)
        workers = 0 if self.reader.decoded is not None else self.settings.workers  # no decoding, nothing to spread
        return DataLoader(
            batches, batch_size=None, sampler=_From(self.start_step * passes, self.total_steps * passes),
            num_workers=workers, pin_memory=trainer.strategy.root_device.type == "cuda",
        )  # fmt: skip

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        dtype = self.trainer.lightning_module.dtype  # float64 when a test asks for it
        batch.views = [normalise(view, self.encoder.mean, self.encoder.std).to(dtype) for view in batch.views]
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """The position: optimiser steps done. All else only guards against another data set or batch."""
        return {"step": self.trainer.global_step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: it was written with other data, another batch or another seed.
        """
        own = self._identity()
        changed = [f"{key} {state.get(key)} then, {own[key]} now" for key in own if state.get(key) != own[key]]
        if changed:
            raise ValueError(
                f"the checkpoint was written with other data ({'; '.join(changed)}), so its order cannot go on. "
                "Restore the setting, or start a new run from its encoder with --init."
            )
        self.start_step = int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        return {
            "samples": len(self.index), "global_batch": self.plan.global_batch, "seed": self.plan.seed,
            "shards": self.index.fingerprint(),
        }  # fmt: skip


class _From:
    """Numbers from the position on; its length is that of the whole run, as Lightning counts it on a resume."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class _EvaluationBatches(Dataset):
    def __init__(self, reader: ShardReader, view: View, batch: int) -> None:
        self.reader, self.view = reader, view
        self.batches = evaluation_batches(len(reader.index), batch)

    def __getitem__(self, number: int) -> Batch:
        samples, valid = self.batches[number]
        return make_batch(self.reader, self.view, samples, 0, valid)

    def __len__(self) -> int:
        return len(self.batches)


def evaluation_loader(reader: ShardReader, encoder: EncoderSettings, batch: int = 256, workers: int = 0) -> DataLoader:
    """Every sample once, in order, seen through a centre crop, in uint8 batches of one size."""
    view = View(ViewSettings(kind="centre"), encoder.image_size, encoder.interpolation)
    return DataLoader(_EvaluationBatches(reader, view, batch), batch_size=None, num_workers=workers)


def normalised_view(batch: Batch, encoder: EncoderSettings, device: torch.device) -> torch.Tensor:
    """The one view of an evaluation batch, on the device, as the encoder takes it."""
    return normalise(batch.views[0].to(device), encoder.mean, encoder.std)
