"""Make batches from sample numbers: read and decode images and make their views."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.data.decode import decode, reduction_for
from sslvit.data.header import BadImage
from sslvit.data.mixture import Plan
from sslvit.data.plan import EvaluationBatches
from sslvit.data.reader import ImageReader, MemoryReader, ShardReader
from sslvit.data.resample import normalize
from sslvit.data.transform import TransformViews
from sslvit.data.views import Views, jitter_views
from sslvit.files import printable
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings, EncoderSettings
from sslvit.settings.views import CenterSettings, TransformSettings, ViewSettings
from sslvit.stopping import obey_parent_alone

MAX_KEY = 4096  # characters of a sample's key; shorter limits could make two keys equal
MAX_SUBSTITUTES = 64  # candidates to replace an unreadable sample before its row stays black


def make_batch(
    reader: ImageReader,
    views: Views,
    samples: np.ndarray,
    epochs: np.ndarray,
    valid: np.ndarray | None = None,
    first_row: int = 0,
    size: list[int] | None = None,
    substitutes: Callable[[int], Iterable[tuple[int, int]]] | None = None,
) -> Batch:
    """Read and decode the given samples and make their views.

    Args:
        reader: Reader of the data set.
        views: Views to make of each image.
        samples: Sample numbers.
        epochs: Epoch of each sample.
        valid: False for filler rows; None if there are none.
        first_row: Index of the first row in the global batch.
        size: Height and width of the main views; None for the encoder's.
        substitutes: Candidates (sample, epoch) for an unreadable row; the first readable one replaces it.
    """
    images, unreadable = view_samples(reader, views, samples, epochs, size)
    used, used_epochs = samples.copy(), epochs.copy()
    for row in unreadable:
        for substitute, epoch in substitutes(row) if substitutes else ():
            replacement, problem = view_samples(reader, views, np.array([substitute]), np.array([epoch]), size)
            if not problem:
                used[row], used_epochs[row] = substitute, epoch
                for image, view in zip(images, replacement, strict=True):
                    image[row] = view[0]
                break
    colors = views.sample_colors(used, used_epochs)
    if colors is not None and views.color_here:
        jittered = jitter_views(images, colors)
        images, colors = [new.to(old.dtype) for new, old in zip(jittered, images, strict=True)], None
    images = views.augment(images, used, used_epochs)
    return replace(
        describe_rows(reader, samples, epochs, used, unreadable, valid, first_row), views=images, colors=colors
    )


def describe_rows(
    reader: ImageReader, samples: np.ndarray, epochs: np.ndarray, used: np.ndarray, unreadable: dict[int, str],
    valid: np.ndarray | None = None, first_row: int = 0,
) -> Batch:  # fmt: skip
    """Make a batch without views and colors.

    Args:
        reader: Reader of the data set.
        samples: Sample numbers.
        epochs: Epoch of each sample.
        used: Samples shown in the rows, including substitutes for unreadable ones.
        unreadable: Row -> reason why its sample could not be read.
        valid: False for filler rows; None if there are none.
        first_row: Index of the first row in the global batch.
    """
    valid = np.ones(len(samples), bool) if valid is None else valid.copy()
    valid[list(unreadable)] = False
    labels = reader.labels_of(used)
    return Batch(
        views=[],
        labels=None if labels is None else torch.from_numpy(labels),
        samples=torch.from_numpy(samples),
        valid=torch.from_numpy(valid),
        epochs=torch.from_numpy(epochs),
        first_row=first_row,
        unreadable={printable(reader.key(int(samples[i])), MAX_KEY): reason for i, reason in unreadable.items()},
    )


def view_samples(
    reader: ImageReader, views: Views, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None = None
) -> tuple[list[Tensor], dict[int, str]]:
    """Views 'b c h w' of the given samples, black where unreadable, and the reasons for those by row."""
    if (found := reader.decoded_images(samples)) is not None:
        decoded, unreadable = found
        return views.crop_batch(decoded, samples, epochs, size), unreadable
    images, unreadable = _decode_and_view(reader, views, samples, epochs, size)
    for view in images:
        view[list(unreadable)] = 0
    return images, unreadable


def _decode_and_view(
    reader: ImageReader, views: Views, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None
) -> tuple[list[Tensor], dict[int, str]]:
    """Decode each image once for all its views; random views are decoded at the resolution that they need."""
    bits = reader.bits
    unreadable: dict[int, str] = {}
    found = {}
    sides = np.ones((len(samples), 2), int)
    for i, sample in enumerate(samples):
        try:
            content = reader.read(int(sample))
            header = reader.header(content)
            found[i], sides[i] = (content, header), (header.height, header.width)
        except BadImage as error:
            unreadable[i] = str(error)
    crops = views.sample_boxes(sides, samples, epochs, size)
    zoom = np.min([boxes.zoom(size_of_view) for size_of_view, boxes in crops], axis=0)
    pixel = torch.uint8 if bits == 8 else torch.float32
    images = [torch.zeros(len(samples), reader.channels, *size_of_view, dtype=pixel) for size_of_view, _ in crops]
    first: dict[tuple[int, int], int] = {}  # the last batch may be padded by repeating one sample
    for i, (content, header) in found.items():
        same = first.setdefault((int(samples[i]), int(epochs[i])), i)
        if same != i:
            if same in unreadable:
                unreadable[i] = unreadable[same]
            for view in images:
                view[i] = view[same]
            continue
        try:
            reduction = 1 if views.is_exact else reduction_for(zoom[i], header)
            image = decode(content, reader.channels, bits, reduction, header, reader.scratch)
        except BadImage as error:
            unreadable[i] = str(error)
            continue
        reduction = reduction if image.shape[1] < header.height else 1  # not every format supports it
        for view, crop in zip(images, views.crop_image(image, crops, i, reduction), strict=True):
            view[i] = crop
    return images, unreadable


def view_of_image(content: bytes, encoder: EncoderSettings) -> Tensor:
    """The evaluation view of one encoded image: pixels 'c h w' (0 to 255) before normalization.

    The pixels are uint8, or float32 for a 16-bit image.

    Raises:
        BadImage: not a readable image, or it cannot be converted to the encoder's channels.
    """
    reader = MemoryReader({0: ("image", content)}, encoder.channels)
    reader.bits = reader.header(content).bits
    views = encoder_views(encoder)
    batch = make_batch(reader, views, np.zeros(1, int), np.zeros(1, int))
    if batch.unreadable:
        raise BadImage(batch.unreadable["image"])
    return batch.views[0][0]


class TrainingBatches(Dataset[Batch]):
    """The micro-batches of one rank, numbered over the whole run. Each worker makes whole batches.

    A step takes `accumulation_steps` micro-batches of `micro` images on each rank. If `resolutions` are given, they
    decide the side of the main views at each step.
    """

    def __init__(
        self, reader: ShardReader, views: Views, plan: Plan, rank: int, micro: int, accumulation_steps: int,
        resolutions: Resolutions | None = None,
    ) -> None:  # fmt: skip
        self.reader, self.views, self.plan = reader, views, plan
        self.rank, self.micro, self.accumulation_steps, self.resolutions = rank, micro, accumulation_steps, resolutions
        self.is_remote = reader.index.is_remote

    def __getitem__(self, number: int) -> Batch:
        samples, epochs, first_row, size = self.rows(number)
        substitutes = partial(self.substitutes, number)
        return make_batch(
            self.reader, self.views, samples, epochs, first_row=first_row, size=size, substitutes=substitutes
        )

    def rows(self, number: int) -> tuple[np.ndarray, np.ndarray, int, list[int] | None]:
        """Samples and epochs of a micro-batch, its first row in the global batch, and the size of its main views."""
        step, first_row = self._step_and_row(number)
        samples, epochs = self.plan.batch(step, first_row, first_row + self.micro)
        if self.is_remote:
            first = self.rank * self.accumulation_steps * self.micro
            self.reader.prefetch(self.plan.shards_near(step, first, first + self.accumulation_steps * self.micro))
        return samples, epochs, first_row, None if self.resolutions is None else self.resolutions.size_at(step)

    def substitutes(self, number: int, row: int) -> Iterator[tuple[int, int]]:
        """Yield candidates (sample, epoch) to replace a row of a micro-batch, in order of preference.

        They are the following rows of the global batch, on any rank, and so do not depend on the number of ranks.
        """
        step, first_row = self._step_and_row(number)
        for distance in range(1, min(MAX_SUBSTITUTES, self.plan.global_batch_size)):
            candidate = (first_row + row + distance) % self.plan.global_batch_size
            (sample,), (epoch,) = self.plan.batch(step, candidate, candidate + 1)
            yield int(sample), int(epoch)

    def _step_and_row(self, number: int) -> tuple[int, int]:
        step, micro_step = divmod(number, self.accumulation_steps)
        first_row = (self.rank * self.accumulation_steps + micro_step) * self.micro
        return step, first_row


@dataclass(frozen=True)
class Resolutions:
    """Sides of the main views over a run: sampled for each step, or one after the other.

    Args:
        sides: Sides in pixels.
        ends: Step at which each side ends, if they come one after the other; None to sample a side for each step.
        seed: Seed of the samples.
    """

    sides: list[int]
    ends: list[int] | None
    seed: int

    @classmethod
    def of(cls, settings: DataSettings, run: RunPlan) -> Resolutions | None:
        """Resolutions of a run; None if the main views always have the encoder's size."""
        if settings.resolutions is None:
            return None
        ends = None
        if settings.resolution_fractions is not None:
            ends = [round(done * run.total_steps) for done in itertools.accumulate(settings.resolution_fractions)]
        return cls(settings.resolutions, ends, run.seed)

    def size_at(self, step: int) -> list[int]:
        """Height and width of the main views at a step, the same on every rank."""
        if self.ends is None:
            return [self.sides[rng.generator(self.seed, step, "resolution").integers(len(self.sides))]] * 2
        return [self.sides[min(bisect.bisect_right(self.ends, step), len(self.sides) - 1)]] * 2


class _EvaluationBatches(Dataset[Batch]):
    def __init__(
        self, reader: ShardReader, views: Views, batch: int, rank: int, ranks: int, epoch: int,
        subset: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.reader, self.views, self.epoch = reader, views, epoch
        self.subset = subset
        self.batches = EvaluationBatches(len(reader.index) if subset is None else len(subset), batch, rank, ranks)

    def __getitem__(self, number: int) -> Batch:
        rows, valid = self.batches[number]
        samples = rows if self.subset is None else self.subset[rows]
        return make_batch(self.reader, self.views, samples, np.full_like(samples, self.epoch), valid)

    def __len__(self) -> int:
        return len(self.batches)


def encoder_views(
    encoder: EncoderSettings, view: ViewSettings | None = None, seed: int = 0, scale: int = 1,
    fill: list[float] | None = None,
) -> Views:  # fmt: skip
    """Views at the encoder's input size, or a multiple of it; the evaluation view if none is given."""
    view = view or center_view(encoder)
    size = [scale * side for side in encoder.image_size]
    kind = TransformViews if isinstance(view, TransformSettings) else Views
    return kind(view, size, encoder.interpolation, seed, fill=fill)


def center_view(encoder: EncoderSettings, fraction: float | None = None) -> CenterSettings:
    """The evaluation view: the encoder's own crop, or the same crop with another fraction."""
    return CenterSettings(fraction=fraction or encoder.crop_fraction, mode=encoder.crop_mode)


def evaluation_loader(
    reader: ShardReader, encoder: EncoderSettings, batch: int = 256, workers: int = 0, rank: int = 0, ranks: int = 1,
    view: ViewSettings | None = None, epoch: int = 0, seed: int = 0, subset: np.ndarray | None = None,
    for_gpu: bool = False,
) -> DataLoader:  # fmt: skip
    """Every sample once, in order, in batches of one size; a center crop unless another view is given.

    A random view is sampled from (seed, epoch, sample). `subset` holds the numbers of the samples to use, None for all.
    With `for_gpu`, batches are in page-locked memory, so that copies to the GPU do not block.
    """
    views = encoder_views(encoder, view, seed)
    batches = _EvaluationBatches(reader, views, batch, rank, ranks, epoch, subset)
    return DataLoader(
        batches, batch_size=None, num_workers=workers, worker_init_fn=obey_parent_alone,
        pin_memory=for_gpu and torch.cuda.is_available(),
    )  # fmt: skip


def normalized_view(batch: Batch, encoder: EncoderSettings, device: torch.device) -> Tensor:
    """Return the view of an evaluation batch on the device, normalized for the encoder."""
    return normalize_view(batch.views[0].to(device, non_blocking=True), encoder)


def normalize_view(view: Tensor, encoder: EncoderSettings) -> Tensor:
    """Normalize pixels (0 to 255) with the encoder's mean and standard deviation."""
    return normalize(view, encoder.mean, encoder.std)
