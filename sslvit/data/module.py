"""Training batches for Lightning, with the exact position saved in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sslvit.data.batch import Batch
from sslvit.data.index import ShardIndex
from sslvit.data.loader import Resolutions, TrainingBatches, encoder_views, evaluation_loader, make_batch
from sslvit.data.mixture import Index, Plan
from sslvit.data.on_device import DeviceBatches, DeviceLoader, Prefetcher
from sslvit.data.open import open_run_data, open_shards
from sslvit.data.reader import ShardReader, fits_in_memory
from sslvit.data.resample import SMALL_SIDE, normalize
from sslvit.data.stream import StreamBatches, StreamIndex
from sslvit.data.views import Views, jitter_views
from sslvit.environment import pick_workers
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings, EncoderSettings, RunSettings
from sslvit.stopping import obey_parent_alone

MAX_CACHED_FRACTION = 0.05  # of the GPU's memory, up to which a training set is kept there with cache_on_device auto


class ShardDataModule(pl.LightningDataModule):
    """Training batches in an order that depends only on the seed; checkpoints save the exact position.

    Args:
        index: Index of the training data.
        settings: View and loading; data.cache_on_device decides where the batches of a small data set are made.
        encoder: Size, channels and normalization of the input.
        plan: Order of the samples; its seed is also used for the views.
        run: Steps, batch sizes and ranks.
        val: Images for the validation loss; None for none.
        uses_labels: Whether the task trains with labels, so that a checkpoint is only restored where they are the same.
    """

    def __init__(
        self, index: Index | StreamIndex, settings: DataSettings, encoder: EncoderSettings, plan: Plan, run: RunPlan,
        val: Index | None = None, uses_labels: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.index, self.settings, self.encoder = index, settings, encoder
        self.plan, self.run, self.val, self.uses_labels = plan, run, val, uses_labels
        self.views = encoder_views(encoder, settings.view, plan.seed, fill=encoder.mean)
        self.start_step = 0
        self.reader: ShardReader | None = None
        if settings.cache_on_device not in ("auto", False) and (reason := self._cannot_cache()):
            raise ValueError(f"data.cache_on_device true: {reason}. Leave it at auto.")

    @classmethod
    def from_settings(cls, settings: RunSettings, val: str | None = None) -> ShardDataModule:
        """Open the data of a recipe, for your own Trainer.

        Args:
            settings: The recipe (`sslvit.load_recipe`).
            val: Shards or a folder of images for the validation loss; None for none.
        """
        train = settings.train
        index, plan = open_run_data(settings)
        train = train.fitted(settings.task.usual, len(index), plan.steps_per_epoch)
        run = RunPlan.make(train, plan.steps_per_epoch, plan.global_batch_size, settings.seed)
        held_out = None if val is None else open_shards(val)
        return cls(index, settings.data, settings.encoder, plan, run, held_out, settings.task.name == "supervised")

    def train_dataloader(self) -> DataLoader | Prefetcher | DeviceLoader:
        """The batches of the run, or of one epoch if the Trainer counts epochs, starting at the restored position."""
        trainer, run, device = self._attached_trainer, self.run, self._attached_trainer.strategy.root_device
        is_gpu = device.type == "cuda"
        color_on = self.settings.color_on
        self.views.color_here = color_on == "workers" or (color_on == "auto" and not is_gpu)
        batches: Dataset[Batch]
        order: _EpochOrder | None = None
        if isinstance(self.index, StreamIndex):
            batches = stream = StreamBatches(
                self.index, self.views, self.encoder.channels, trainer.global_rank, run.ranks, run.images_per_pass,
                run.accumulation_steps, self.start_step, self.settings.max_pixels,
            )  # fmt: skip
            workers = stream.workers(self._workers)
        else:
            reader = self.make_reader(self.index)
            batches = TrainingBatches(
                reader, self.views, self.plan, trainer.global_rank, run.images_per_pass, run.accumulation_steps,
                Resolutions.of(self.settings, run),
            )  # fmt: skip
            # a data set in memory needs no worker processes, unless images are augmented one by one
            is_light = reader.decoded is not None and not self.views.augments
            workers = 0 if is_light else self._workers
            is_one_pass = trainer.max_epochs == 1 and trainer.max_steps == run.total_steps
            steps = run.total_steps if is_one_pass else run.steps_per_epoch
            order = _EpochOrder(trainer, steps * run.accumulation_steps, self.start_step * run.accumulation_steps)
            if self._caches_on(device, reader):
                return DeviceLoader(DeviceBatches(batches, device), order)
        loader = DataLoader(
            batches, batch_size=None, sampler=order, pin_memory=is_gpu, num_workers=workers,
            worker_init_fn=obey_parent_alone,
        )  # fmt: skip
        return Prefetcher(loader, device) if is_gpu and torch.cuda.is_available() else loader

    def _caches_on(self, device: torch.device, reader: ShardReader) -> bool:
        """Whether to keep the training images on the device."""
        wanted = self.settings.cache_on_device
        if wanted != "auto":
            return bool(wanted)
        if self._cannot_cache() or self.settings.color_on == "workers" or device.type != "cuda":
            return False
        # total, not free memory, so that a resumed run decides the same
        memory = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
        return reader.decoded is not None and reader.decoded.nbytes <= MAX_CACHED_FRACTION * memory

    def _cannot_cache(self) -> str:
        """Reason why the training images cannot be kept on the device; empty if they can."""
        if isinstance(self.index, StreamIndex):
            return "a stream is read from end to end"
        if self.views.augments:
            return "RandAugment (data.view.operations) or a function of your own changes image by image, on the CPU"
        if not fits_in_memory(self.index, self.encoder.channels, self.settings.memory_limit_mb):
            return (
                f"its images are not all of one size up to {SMALL_SIDE} pixels, or take more than "
                f"data.memory_limit_mb ({self.settings.memory_limit_mb})"
            )
        return ""

    def val_dataloader(self) -> DataLoader | list:
        """Every image of `val` once, with the training view; the same batches every time."""
        if self.val is None:
            return []
        run, settings = self.run, self.settings
        reader = ShardReader(self.val, self.encoder.channels, settings.memory_limit_mb, settings.max_pixels)
        return evaluation_loader(
            reader, self.encoder, run.images_per_pass, self._workers, self._attached_trainer.global_rank, run.ranks,
            settings.view, 0, run.seed,
        )  # fmt: skip

    @property
    def _attached_trainer(self) -> pl.Trainer:
        assert self.trainer is not None  # Lightning sets it before it calls any hook
        return self.trainer

    @property
    def _workers(self) -> int:
        trainer = self._attached_trainer
        return pick_workers(self.settings.workers, trainer.strategy.root_device.type, trainer.num_devices)

    def make_reader(self, index: Index) -> ShardReader:
        """Return the reader of the training images, which is created on first use."""
        settings = self.settings
        self.reader = self.reader or ShardReader(
            index, self.encoder.channels, settings.memory_limit_mb, settings.max_pixels
        )
        return self.reader

    def examples(self, count: int, views: Views | None = None) -> Batch:
        """The first images of the data set as a batch on the CPU, with the training views or the given ones."""
        views = views or self.views
        if isinstance(self.index, StreamIndex):
            batch = next(iter(StreamBatches(self.index, views, self.encoder.channels, 0, 1, count, 1)))
        else:
            samples = np.arange(min(count, len(self.index)))
            batch = make_batch(self.make_reader(self.index), views, samples, np.zeros_like(samples))
        return self.prepare(batch)

    def whole_images(self, count: int, scale: int = 1) -> Tensor:
        """Evaluation views 'b c h w' of the first images, at a multiple of the encoder's size."""
        return self.examples(count, encoder_views(self.encoder, scale=scale)).views[0]

    def prepare(self, batch: Batch) -> Batch:
        """Apply the color changes and normalize the views, on the batch's device."""
        normalized = partial(normalize, mean=self.encoder.mean, std=self.encoder.std)
        batch.views, batch.colors = jitter_views(batch.views, batch.colors, normalized), None
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Prepare a batch on the device; called by Lightning."""
        batch = self.prepare(batch)
        dtype = self._attached_trainer.lightning_module.dtype  # float64 in some tests
        batch.views = [view.to(dtype) for view in batch.views]
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Return the position (completed optimizer steps) and the identity of data set and order."""
        return {"step": self._attached_trainer.global_step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Restore the position of a checkpoint.

        Raises:
            ValueError: the checkpoint was written with other data, another batch size or another seed.
        """
        current = self._identity()
        changed = [
            f"{key} {state.get(key)} then, {current[key]} now" for key in current if state.get(key) != current[key]
        ]
        if changed:
            raise ValueError(
                f"the checkpoint was written with other data ({'; '.join(changed)}), so its order cannot go on. "
                "Restore the setting, or start a new run from its encoder with --init."
            )
        self.start_step = int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        found = {**self.plan.identity(), "shards": self.index.fingerprint()}
        if self.uses_labels and isinstance(self.index, ShardIndex):
            found["labels"] = self.index.labels_fingerprint()
        return found


class _EpochOrder(Sampler[int]):
    """Numbers of the micro-batches of the current epoch; after a resume, from the restored position on.

    The length is that of the whole epoch, as Lightning expects it after a resume.
    """

    def __init__(self, trainer: pl.Trainer, per_epoch: int, start: int) -> None:
        self.trainer, self.per_epoch, self.start = trainer, per_epoch, start

    def __iter__(self) -> Iterator[int]:
        first = self.trainer.current_epoch * self.per_epoch
        return iter(range(max(first, self.start), first + self.per_epoch))

    def __len__(self) -> int:
        return self.per_epoch
