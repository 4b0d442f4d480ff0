"""Sample numbers -> batches: read, decode, view."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.data.decode import MAX_PIXELS, BadImage, Header, Scratch, decode, read_header, reduction_for
from sslvit.data.plan import EvaluationBatches, Plan
from sslvit.data.reader import ShardReader
from sslvit.data.resample import normalize
from sslvit.data.views import Views, change_views
from sslvit.files import printable
from sslvit.settings import EncoderSettings
from sslvit.settings.views import CenterSettings, ViewSettings
from sslvit.stopping import obey_parent_alone

MAX_KEY = 4096  # characters of a sample's key: cut ones would be counted as one sample
MOST_SPARES = 64  # tried in the place of an unreadable sample before it is shown black


def make_batch(
    reader: ShardReader | MemoryReader,
    views: Views,
    samples: np.ndarray,
    epochs: np.ndarray,
    valid: np.ndarray | None = None,
    first_row: int = 0,
    size: list[int] | None = None,
    spares: Callable[[int], Iterable[tuple[int, int]]] | None = None,
) -> Batch:
    """Read, decode and view the given samples.

    Args:
        reader: of the data set.
        views: what is seen of each image.
        samples: their numbers.
        epochs: the pass over the data set that each is in.
        valid: False for rows that only fill up; None for no such rows.
        first_row: place within the global batch.
        size: of the main views, if not the encoder's.
        spares: for a row, samples and their epochs of which the first readable one is shown in its place.
    """
    pictures, bad = view_samples(reader, views, samples, epochs, size)
    shown, shown_epochs = samples.copy(), epochs.copy()
    for row in bad if spares else ():
        for spare, epoch in spares(row):
            (instead, problem) = view_samples(reader, views, np.array([spare]), np.array([epoch]), size)
            if not problem:
                shown[row], shown_epochs[row] = spare, epoch
                for picture, view in zip(pictures, instead, strict=True):
                    picture[row] = view[0]
                break
    colors = views.sample_colors(shown, shown_epochs)
    if colors is not None and views.color_here:
        changed = change_views(pictures, colors)
        pictures, colors = [new.to(old.dtype) for new, old in zip(changed, pictures, strict=True)], None
    pictures = views.augment(pictures, shown, shown_epochs)
    valid = np.ones(len(samples), bool) if valid is None else valid.copy()
    valid[list(bad)] = False
    labels = reader.labels_of(shown)
    return Batch(
        views=pictures,
        labels=None if labels is None else torch.from_numpy(labels),
        samples=torch.from_numpy(samples),
        valid=torch.from_numpy(valid),
        epochs=torch.from_numpy(epochs),
        first_row=first_row,
        bad={printable(reader.key(int(samples[i])), MAX_KEY): reason for i, reason in bad.items()},
        colors=colors,
    )


def view_samples(
    reader: ShardReader | MemoryReader,
    views: Views,
    samples: np.ndarray,
    epochs: np.ndarray,
    size: list[int] | None = None,
) -> tuple[list[Tensor], dict[int, str]]:
    """Views 'b c h w' of the given samples, black for unreadable ones, and the reason for these by row."""
    if reader.decoded is not None:
        images, bad = reader.kept(samples)
        pictures = views.of_batch(images, samples, epochs, size)
    else:
        pictures, bad = _decode_and_view(reader, views, samples, epochs, size)
        for view in pictures:
            view[list(bad)] = 0
    return pictures, bad


def _decode_and_view(
    reader: ShardReader | MemoryReader, views: Views, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None
) -> tuple[list[Tensor], dict[int, str]]:
    """Each image is decoded once for all of its views, random ones at the resolution that they need."""
    bits = reader.bits
    bad: dict[int, str] = {}
    found = {}
    sides = np.ones((len(samples), 2), int)
    for i, sample in enumerate(samples):
        try:
            content = reader.read(int(sample))
            header = reader.header(content)
            found[i], sides[i] = (content, header), (header.height, header.width)
        except BadImage as error:
            bad[i] = str(error)
    drawn = views.draw(sides, samples, epochs, size)
    zoom = np.min([boxes.zoom(size_of_view) for size_of_view, boxes in drawn], axis=0)
    pixel = torch.uint8 if bits == 8 else torch.float32
    pictures = [torch.zeros(len(samples), reader.channels, *size_of_view, dtype=pixel) for size_of_view, _ in drawn]
    first: dict[tuple[int, int], int] = {}  # a last batch is filled up with one sample many times
    for i, (content, header) in found.items():
        same = first.setdefault((int(samples[i]), int(epochs[i])), i)
        if same != i:
            if same in bad:
                bad[i] = bad[same]
            for view in pictures:
                view[i] = view[same]
            continue
        try:
            reduction = 1 if views.is_exact else reduction_for(zoom[i], header)
            image = decode(content, reader.channels, bits, reduction, header, reader.scratch)
        except BadImage as error:
            bad[i] = str(error)
            continue
        reduction = reduction if image.shape[1] < header.height else 1  # not every format can
        for view, picture in zip(pictures, views.of_one(image, drawn, i, reduction), strict=True):
            view[i] = picture
    return pictures, bad


class MemoryReader:
    """Encoded images that are here already, in the place of a ShardReader.

    Args:
        contents: key and bytes by sample number.
        channels: of the images handed out.
        max_pixels: of the largest image that is accepted.
    """

    decoded = None
    bits = 8

    def __init__(self, contents: dict[int, tuple[str, bytes]], channels: int, max_pixels: int = MAX_PIXELS) -> None:
        self.contents, self.channels, self.max_pixels, self.scratch = contents, channels, max_pixels, Scratch()

    def header(self, content: bytes) -> Header:
        return read_header(content, self.max_pixels)

    def read(self, sample: int) -> bytes:
        return self.contents[sample][1]

    def key(self, sample: int) -> str:
        return self.contents[sample][0]

    def labels_of(self, samples: np.ndarray) -> None:
        return None


def view_of_image(content: bytes, encoder: EncoderSettings) -> Tensor:
    """What evaluation sees of one encoded image: pixels 'c h w' (0 to 255, uint8) before they are normalized.

    Args:
        content: bytes of an image file.
        encoder: channels, size, interpolation and crop of the encoder's input.

    Raises:
        BadImage: the bytes are no image, or cannot be given the encoder's channels.
    """
    reader = MemoryReader({0: ("image", content)}, encoder.channels)
    views = Views(center_view(encoder), encoder.image_size, encoder.interpolation)
    batch = make_batch(reader, views, np.zeros(1, int), np.zeros(1, int))
    if batch.bad:
        raise BadImage(batch.bad["image"])
    return batch.views[0][0]


class TrainingBatches(Dataset):
    """Micro-batch i of one rank, counted over the whole run. Each worker makes whole batches.

    Args:
        reader: of the data set.
        views: what is seen of each image.
        plan: the order.
        rank: of this process.
        micro: images per micro-batch.
        passes: micro-batches per optimizer step on one rank.
        resolutions: sides of the main views, one of which is drawn for each step; None for the encoder's size.
    """

    def __init__(
        self, reader: ShardReader, views: Views, plan: Plan, rank: int, micro: int, passes: int,
        resolutions: list[int] | None = None,
    ) -> None:  # fmt: skip
        self.reader, self.views, self.plan = reader, views, plan
        self.rank, self.micro, self.passes, self.resolutions = rank, micro, passes, resolutions
        self.is_remote = reader.index.is_remote

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.passes)
        first_row = (self.rank * self.passes + part) * self.micro
        samples, epochs = self.plan.batch(step, first_row, first_row + self.micro)
        if self.is_remote:
            first = self.rank * self.passes * self.micro
            self.reader.fetch_ahead(self.plan.shards_near(step, first, first + self.passes * self.micro))
        size = resolution_of(self.resolutions, self.plan.seed, step)

        def spares(row: int) -> Iterable[tuple[int, int]]:
            """The rows that follow in the global batch, whoever they belong to: the same for any number of ranks."""
            for further in range(1, min(MOST_SPARES, self.plan.global_batch_size)):
                place = (first_row + row + further) % self.plan.global_batch_size
                (sample,), (epoch,) = self.plan.batch(step, place, place + 1)
                yield int(sample), int(epoch)

        return make_batch(self.reader, self.views, samples, epochs, first_row=first_row, size=size, spares=spares)


def resolution_of(resolutions: list[int] | None, seed: int, step: int) -> list[int] | None:
    """Height and width of the main views at this step: the same on every rank."""
    if resolutions is None:
        return None
    return [resolutions[rng.generator(seed, step, "resolution").integers(len(resolutions))]] * 2


class _EvaluationBatches(Dataset):
    def __init__(
        self, reader: ShardReader, views: Views, batch: int, rank: int, ranks: int, epoch: int,
        chosen: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.reader, self.views, self.epoch = reader, views, epoch
        self.chosen = chosen
        self.batches = EvaluationBatches(len(reader.index) if chosen is None else len(chosen), batch, rank, ranks)

    def __getitem__(self, number: int) -> Batch:
        places, valid = self.batches[number]
        samples = places if self.chosen is None else self.chosen[places]
        return make_batch(self.reader, self.views, samples, np.full_like(samples, self.epoch), valid)

    def __len__(self) -> int:
        return len(self.batches)


def center_view(encoder: EncoderSettings, fraction: float | None = None) -> CenterSettings:
    """What evaluation sees of an image: the encoder's own crop, or its crop with another fraction."""
    return CenterSettings(fraction=fraction or encoder.crop_fraction, mode=encoder.crop_mode)


def evaluation_loader(
    reader: ShardReader, encoder: EncoderSettings, batch: int = 256, workers: int = 0, rank: int = 0, ranks: int = 1,
    view: ViewSettings | None = None, epoch: int = 0, seed: int = 0, chosen: np.ndarray | None = None,
) -> DataLoader:  # fmt: skip
    """Every sample once, in order, in batches of one size, seen through a center crop unless another view is given.

    Args:
        reader: of the data set.
        encoder: size and interpolation of its input.
        batch: images in each.
        workers: loader processes.
        rank: of this process.
        ranks: that share the data set.
        view: of each image; a random one draws from (seed, epoch, sample).
        epoch: of that chance.
        seed: of that chance.
        chosen: numbers of the samples that are seen; None for all.
    """
    views = Views(view or center_view(encoder), encoder.image_size, encoder.interpolation, seed)
    batches = _EvaluationBatches(reader, views, batch, rank, ranks, epoch, chosen)
    return DataLoader(batches, batch_size=None, num_workers=workers, worker_init_fn=obey_parent_alone)


def normalized_view(batch: Batch, encoder: EncoderSettings, device: torch.device) -> torch.Tensor:
    """The one view of an evaluation batch, on the device, as the encoder takes it."""
    return normalize(batch.views[0].to(device), encoder.mean, encoder.std)
