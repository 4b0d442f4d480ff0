"""Sources of features, labeled data sets, and the features computed from them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslvit.checkpoint import fingerprint
from sslvit.data.index import ShardIndex
from sslvit.data.reader import ShardReader
from sslvit.environment import keep_freed_memory
from sslvit.files import printable
from sslvit.models import Backbone, Encoder, ViTEncoder, device_and_dtype
from sslvit.ranks import all_gather_objects, is_first_rank
from sslvit.settings import EncoderSettings
from sslvit.settings.probe import Precision

logger = logging.getLogger(__name__)

MAX_UNREADABLE_FRACTION = 0.01  # of a data set's images; above it there is no score
MAX_PIXEL_SIDE = 32  # raw pixels of larger images are shrunk to this side
Readout = tuple[int, str]  # a block, counted from 1, and a pooling
OUTPUT = "output"  # in place of a pooling: the network's own output vector
# Numbers in the largest activation of a forward pass on a CPU (32 MB): 256 images at once would be no faster, and take
# 4 GB for 32 x 32 pixels and a width of 192, instead of 0.2.
CPU_ACTIVATION = 2**23


class NoScore(ValueError):
    """Images cannot be read or numbers are not finite, so a score would be misleading."""


def in_pieces(images: Tensor, largest_activation: int) -> tuple[Tensor, ...]:
    """A batch 'b ...' in pieces for forward passes: as a whole, or on a CPU as few images at a time as suit it.

    There, memory that a pass frees is also kept for the next one.

    Args:
        images: The batch.
        largest_activation: Numbers in the largest activation of one image.
    """
    if images.device.type != "cpu":
        return (images,)
    keep_freed_memory()
    return images.split(max(1, CPU_ACTIVATION // largest_activation))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in full precision, also on a GPU, where convolutions and a run in bf16 would use TF32."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def forward_precision(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Run forward passes in a precision; bf16 uses autocast as training does, and leaves the weights in float32."""
    with full_float32(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def view_in_words(settings: EncoderSettings, precision: Precision) -> str:
    """The view of each image in words, and the precision of the features unless it is float32."""
    return settings.crop_in_words + in_precision(precision)


def in_precision(precision: Precision) -> str:
    """The precision of the features, to follow the view of an image; nothing for float32."""
    return "" if precision == "float32" else f"; features computed in {precision}"


def describe_views(settings: Mapping[str, EncoderSettings]) -> dict[str, Any]:
    """The view and the image size of each row of a table, and those that all rows have in common, else None."""
    views = {row: {"view": of.crop_in_words, "image_size": of.image_size} for row, of in settings.items()}
    first, *others = views.values()
    common = {key: value if all(other[key] == value for other in others) else None for key, value in first.items()}
    return common | {"views": views}


def heading_of_views(what: str, views: Mapping[str, Mapping[str, Any]], precision: Precision) -> list[str]:
    """The views of `describe_views` in words: one line if all rows have the same, else one for the rows of each."""
    found = rows_by_value({row: of["view"] for row, of in views.items()})
    return [
        f"{what}{'' if len(found) == 1 else ', for ' + ', '.join(rows)}: {view}{in_precision(precision)}"
        for view, rows in found.items()
    ]


def rows_by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Each value with the rows of a table that have it."""
    found: dict[str, list[str]] = {}
    for row, value in values.items():
        found.setdefault(value, []).append(row)
    return found


@dataclass
class Features:
    """Features of the readable images of a data set, on the CPU."""

    values: Float[Tensor, "n d"]
    labels: Int[Tensor, "n"]

    def __getitem__(self, rows: Tensor) -> Features:
        return Features(self.values[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class FeatureTable:
    """Features of a data set at several readouts, computed in one pass over it."""

    columns: dict[Readout, Tensor]
    labels: Tensor
    samples: Tensor

    def at(self, readouts: Sequence[Readout]) -> Features:
        """The features of several readouts, concatenated."""
        values = [self.columns[readout] for readout in readouts]
        return Features(values[0] if len(values) == 1 else torch.cat(values, 1), self.labels)

    def rows(self, rows: Tensor, readouts: Sequence[Readout]) -> Features:
        """`at` for some rows, without concatenating the whole columns."""
        return Features(torch.cat([self.columns[readout][rows] for readout in readouts], 1), self.labels[rows])


class Source(ABC):
    """A source of features: an encoder, or the raw pixels.

    Attributes:
        settings: Settings of the view of each image.
        device: Device on which features are computed and measured.
        precision: Precision of the forward passes.
    """

    precision: Precision = "float32"

    def __init__(self, settings: EncoderSettings, device: torch.device | str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.settings.depth

    @abstractmethod
    def readouts(self, layer: int | None, blocks: int, pooling: str | None) -> list[Readout]:
        """The readouts of the `blocks` blocks that end at a layer.

        Args:
            layer: last block, counted from 1; None for the source's default.
            blocks: number of blocks.
            pooling: pooling of their tokens; None for the source's default.

        Raises:
            ValueError: the source has fewer blocks, or no such pooling.
        """

    def largest_activation(self, height: int, width: int) -> int:
        """About how many numbers the largest activation of an image has: 64 channels at half its sides, as of CNNs."""
        return 16 * height * width

    @abstractmethod
    def features_at(self, images: Tensor, readouts: Sequence[Readout]) -> list[Tensor]:
        """One vector per image 'b d' at each readout, in one pass."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that identifies exactly these features."""


class FrozenEncoder(Source):
    """An encoder, put into evaluation mode, as a source of features."""

    def __init__(self, encoder: ViTEncoder, precision: Precision = "float32") -> None:
        super().__init__(encoder.settings, device_and_dtype(encoder)[0])
        self.encoder, self.precision = encoder.eval(), precision

    def readouts(self, layer: int | None, blocks: int, pooling: str | None) -> list[Readout]:
        """See `Source.readouts`.

        The pooling "class+mean" is each block's class token and the mean over the last block's patches (DINOv2).
        """
        settings = self.settings
        layer = layer or settings.probed_layer
        pooling = pooling or settings.pooling
        if not 1 <= layer <= settings.depth:
            raise ValueError(f"--layer {layer}: this encoder has blocks 1 to {settings.depth}.")
        if blocks > layer:
            raise ValueError(f"--blocks {blocks}: there are only {layer} blocks up to layer {layer}.")
        if "class" in pooling and not settings.class_token:
            raise ValueError(f"--pooling {pooling}: this encoder has no class token. Use mean.")
        if pooling == "attention" and settings.pooling != "attention":
            raise ValueError("--pooling attention: this encoder has no attention pool. Use mean or class.")
        numbers = range(layer - blocks + 1, layer + 1)
        if pooling == "class+mean":
            return [*((number, "class") for number in numbers), (layer, "mean")]
        return [(number, pooling) for number in numbers]

    def largest_activation(self, height: int, width: int) -> int:
        """See `EncoderSettings.largest_activation`."""
        return self.settings.largest_activation(height, width)

    def features_at(self, images: Tensor, readouts: Sequence[Readout]) -> list[Tensor]:
        """See `Source.features_at`."""
        _, dtype = device_and_dtype(self.encoder)  # float64 if the run trains in it
        found: dict[Readout, Tensor] = {}
        numbers = {number for number, _ in readouts}
        with forward_precision(self.precision, self.device):
            for block in self.encoder.intermediates(images.to(dtype), numbers, norm=True):
                for number, pooling in readouts:  # pooled now, so that only one block's tokens are kept
                    if number == block.number:
                        found[number, pooling] = self.encoder.pool(block.tokens, pooling).to(images.dtype)
        return [found[readout] for readout in readouts]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return fingerprint(self.encoder)


class FrozenBackbone(Source):
    """Another network, such as a CNN: its output vector, or the mean over the feature map of one of its stages."""

    def __init__(self, backbone: Backbone, precision: Precision = "float32") -> None:
        super().__init__(backbone.settings, device_and_dtype(backbone)[0])
        self.backbone, self.precision = backbone.eval(), precision

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.backbone.stages)

    def readouts(self, layer: int | None, blocks: int, pooling: str | None) -> list[Readout]:
        """See `Source.readouts`; the network's output vector if no layer is given."""
        name = self.settings.backbone
        if blocks != 1:
            raise ValueError(f"--blocks {blocks}: {name} has stages of different widths. Give one with --layer.")
        if pooling not in (None, "mean"):
            raise ValueError(f"--pooling {pooling}: {name} has no tokens. Leave it out.")
        if layer is None:
            return [(self.depth, OUTPUT)]
        if not 1 <= layer <= self.depth:
            stages = f"has stages 1 to {self.depth}" if self.depth else "tells no stages"
            raise ValueError(f"--layer {layer}: {name} {stages}.")
        return [(layer, "mean")]

    def features_at(self, images: Tensor, readouts: Sequence[Readout]) -> list[Tensor]:
        """See `Source.features_at`."""
        _, dtype = device_and_dtype(self.backbone)
        numbers = [number for number, pooling in readouts if pooling != OUTPUT]
        with forward_precision(self.precision, self.device):
            vectors, maps = self.backbone.maps(images.to(dtype), numbers)
        found = [vectors if pooling == OUTPUT else maps[number].mean((2, 3)) for number, pooling in readouts]
        return [values.to(images.dtype) for values in found]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return fingerprint(self.backbone)


def frozen(encoder: Encoder, precision: Precision = "float32") -> Source:
    """An encoder as a source of features."""
    if isinstance(encoder, Backbone):
        return FrozenBackbone(encoder, precision)
    return FrozenEncoder(encoder, precision)


class RawPixels(Source):
    """The pixels in an encoder's view, at most 32 x 32: a baseline without any learning."""

    def readouts(self, layer: int | None, blocks: int, pooling: str | None) -> list[Readout]:
        """The only readout: the pixels."""
        return [(0, "pixels")]

    def features_at(self, images: Tensor, readouts: Sequence[Readout]) -> list[Tensor]:
        """See `Source.features_at`."""
        height, width = (min(MAX_PIXEL_SIDE, side) for side in images.shape[2:])
        if (height, width) != images.shape[2:]:
            images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
        return [images.flatten(1)] * len(readouts)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return f"pixels {MAX_PIXEL_SIDE}"


@dataclass
class LabeledSet:
    """A data set to score on, opened when its images are first needed. All passes must see the same images.

    Args:
        index: index of its shards.
        channels: number of channels that its images are read with.
        subset: sample numbers of the images that are scored; None for all.
        max_unreadable_fraction: largest fraction of them that may be unreadable; unreadable images are left out.
        memory_limit_mb: memory in MB; a set of small images of one size is decoded only once if it fits.
    """

    index: ShardIndex
    channels: int
    subset: np.ndarray | None = None
    max_unreadable_fraction: float = MAX_UNREADABLE_FRACTION
    memory_limit_mb: int = 1024
    _used: np.ndarray | None = None

    @cached_property
    def reader(self) -> ShardReader:
        """The reader of its shards, opened when it is first needed."""
        return ShardReader(self.index, self.channels, self.memory_limit_mb)

    @property
    def samples(self) -> np.ndarray:
        """Sample numbers of the images that are to be scored, readable or not."""
        return np.arange(len(self.index)) if self.subset is None else self.subset

    def workers(self, workers: int) -> int:
        """Number of loader processes for a pass: as requested, or 0 if the images are decoded already."""
        return workers if self.reader.decoded is None else 0

    @property
    def classes(self) -> list[str]:
        """Names of the classes; none for unlabeled data."""
        return self.index.classes or []

    @property
    def labels(self) -> Int[Tensor, "n"]:
        """Class number of each of `samples`; -1 for unlabeled data."""
        if self.index.classes is None:
            return torch.full((len(self.samples),), -1)
        return torch.from_numpy(self.index.labels_of(self.samples).astype(np.int64))

    @property
    def images(self) -> int:
        """Number of scored images: those that a pass could read, or all images before the first pass."""
        return len(self.samples if self._used is None else self._used)

    @property
    def unreadable(self) -> int:
        """Number of images that are left out of scores."""
        return len(self.samples) - self.images

    @property
    def count_text(self) -> str:
        """How many images there are: "360 images", or "357 of 360 images (3 cannot be read)"."""
        if not self.unreadable:
            return f"{self.images:,} images"
        return f"{self.images:,} of {len(self.samples):,} images ({self.unreadable:,} cannot be read)"

    def account_for(self, used: Tensor | np.ndarray, bad: dict[str, str]) -> None:
        """Register the images that a pass over all ranks has seen.

        Args:
            used: sample numbers of these images, from all ranks.
            bad: why other images could not be read on this rank, by key.

        Raises:
            NoScore: too many images could not be read, or not the same ones as in an earlier pass.
        """
        used = np.sort(np.asarray(used))
        bad = {key: reason for one in all_gather_objects(bad) for key, reason in one.items()}
        example = "".join(f", e.g. {printable(key)}: {printable(reason)}" for key, reason in list(bad.items())[:1])
        if self._used is None:
            missing = len(self.samples) - len(used)
            message = f"{self.index.location}: {missing:,} of {len(self.samples):,} images cannot be read"
            if missing > self.max_unreadable_fraction * len(self.samples):
                raise NoScore(
                    f"{message}, more than the {self.max_unreadable_fraction:.1%} that a score may leave out{example}. "
                    "Repair or repack these shards, or raise the limit (--max-unreadable-fraction)."
                )
            if missing and is_first_rank():
                logger.warning(f"{message} and are left out of all scores{example}")
            self._used = used
        elif not np.array_equal(used, self._used):
            raise NoScore(
                f"{self.index.location}: {len(used):,} images could be read in this pass and {len(self._used):,} in an "
                f"earlier one{example}. Scores would be of different images: see whether its disk or network fails."
            )
