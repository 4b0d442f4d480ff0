"""Training batches for Lightning: the exact position saved and restored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvit.data.batch import Batch
from sslvit.data.index import Index
from sslvit.data.loader import TrainingBatches, encoder_views, make_batch, normalize_view
from sslvit.data.plan import Plan, split_batch
from sslvit.data.reader import ShardReader
from sslvit.data.stream import StreamBatches, StreamIndex
from sslvit.data.views import Views, jitter_views
from sslvit.settings import DataSettings, EncoderSettings
from sslvit.settings.views import AugmentSettings, CenterSettings
from sslvit.stopping import obey_parent_alone


class ShardDataModule(pl.LightningDataModule):
    """Training batches in an order that only the seed decides, and the exact position saved and restored.

    Args:
        index: of the shards.
        settings: batch, view and loading.
        encoder: size, channels and normalization of its input.
        plan: the order; its seed is also that of the views.
        total_steps: optimizer steps of the run.
        micro_batch_size: images per forward pass on one rank, or None for all images of the rank.
    """

    def __init__(
        self,
        index: Index | StreamIndex,
        settings: DataSettings,
        encoder: EncoderSettings,
        plan: Plan,
        total_steps: int,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.index, self.settings, self.encoder = index, settings, encoder
        self.plan, self.total_steps, self.micro_batch_size = plan, total_steps, micro_batch_size
        self.views = encoder_views(encoder, settings.view, plan.seed, fill=encoder.mean)
        self.start_step = 0
        self.reader: ShardReader | None = None

    def train_dataloader(self) -> DataLoader:
        """Return the micro-batches of this rank, from the restored position on."""
        trainer = self._attached_trainer
        is_gpu = trainer.strategy.root_device.type == "cuda"
        micro, accumulation_steps = split_batch(self.plan.global_batch_size, trainer.world_size, self.micro_batch_size)
        color_on = self.settings.color_on
        self.views.color_here = color_on == "workers" or (color_on == "auto" and not is_gpu)
        batches: Dataset[Batch]
        order: _PositionSampler | None = None
        if isinstance(self.index, StreamIndex):
            batches = stream = StreamBatches(
                self.index, self.views, self.encoder.channels, trainer.global_rank, trainer.world_size, micro,
                accumulation_steps, self.start_step, self.settings.max_pixels,
            )  # fmt: skip
            workers = stream.workers(self.settings.workers)
        else:
            reader = self.make_reader(self.index)
            batches = TrainingBatches(
                reader, self.views, self.plan, trainer.global_rank, micro, accumulation_steps, self.settings.resolutions
            )
            # a data set in memory has no decoding to spread over processes, but changing image by image is work
            is_light = reader.decoded is not None and not isinstance(self.settings.view, AugmentSettings)
            workers = 0 if is_light else self.settings.workers
            order = _PositionSampler(self.start_step * accumulation_steps, self.total_steps * accumulation_steps)
        return DataLoader(
            batches, batch_size=None, sampler=order, pin_memory=is_gpu, num_workers=workers,
            worker_init_fn=obey_parent_alone,
        )  # fmt: skip

    @property
    def _attached_trainer(self) -> pl.Trainer:
        assert self.trainer is not None  # Lightning sets it before it asks for anything
        return self.trainer

    def make_reader(self, index: Index) -> ShardReader:
        """Return the reader of the training images, which is made once."""
        settings = self.settings
        self.reader = self.reader or ShardReader(
            index, self.encoder.channels, settings.memory_limit_mb, settings.max_pixels
        )
        return self.reader

    def examples(self, count: int, views: Views | None = None) -> Batch:
        """The first images of the data set as a batch on the CPU, seen as in training or through other views."""
        views = views or self.views
        if isinstance(self.index, StreamIndex):
            batch = next(iter(StreamBatches(self.index, views, self.encoder.channels, 0, 1, count, 1)))
        else:
            samples = np.arange(min(count, len(self.index)))
            batch = make_batch(self.make_reader(self.index), views, samples, np.zeros_like(samples))
        return self.prepare(batch)

    def whole_images(self, count: int, scale: int = 1) -> Tensor:
        """The middle of the first images, 'b c h w', at a multiple of the encoder's size."""
        return self.examples(count, encoder_views(self.encoder, CenterSettings(), scale=scale)).views[0]

    def prepare(self, batch: Batch) -> Batch:
        """Colors and units as the encoder takes them, on the batch's device."""
        if batch.colors is not None:
            batch.views, batch.colors = jitter_views(batch.views, batch.colors), None
        batch.views = [normalize_view(view, self.encoder) for view in batch.views]
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Prepare a batch on the device; called by Lightning."""
        batch = self.prepare(batch)
        dtype = self._attached_trainer.lightning_module.dtype  # float64 when a test asks for it
        batch.views = [view.to(dtype) for view in batch.views]
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Return the position (optimizer steps done), and what guards against another data set or order."""
        return {"step": self._attached_trainer.global_step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: it was written with other data, another batch or another seed.
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
        return {**self.plan.identity(), "shards": self.index.fingerprint()}


class _PositionSampler:
    """Numbers from the position on; its length is that of the whole run, as Lightning counts it on a resume."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop
