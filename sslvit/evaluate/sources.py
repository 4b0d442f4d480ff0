"""What is probed, on what, and the features that come out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
from sslvit.files import printable
from sslvit.models import ViTEncoder
from sslvit.ranks import is_first_rank, said_by_all
from sslvit.settings import EncoderSettings

logger = logging.getLogger(__name__)

MAX_UNREADABLE_FRACTION = 0.01  # of a data set's images, above which there is no score
PIXEL_SIDE = 32  # raw pixels are compared at no more than this size
Place = tuple[int, str]  # a block, counted from 1, and a pooling


class NoScore(ValueError):
    """Images that cannot be read, or numbers that are not finite: a score would not be of what it says."""


@dataclass
class Features:
    """Features of the readable images of a data set, on the CPU.

    Args:
        values: one row per image.
        labels: class numbers.
    """

    values: Float[Tensor, "n d"]
    labels: Int[Tensor, "n"]

    def __getitem__(self, chosen: Tensor) -> Features:
        return Features(self.values[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class FeatureTable:
    """What one pass gives.

    Args:
        columns: features 'n d' by place.
        labels: class numbers 'n'.
        samples: numbers of the images 'n'.
    """

    columns: dict[Place, Tensor]
    labels: Tensor
    samples: Tensor

    def at(self, places: Sequence[Place]) -> Features:
        """The features of several places side by side."""
        values = [self.columns[place] for place in places]
        return Features(values[0] if len(values) == 1 else torch.cat(values, 1), self.labels)

    def rows(self, chosen: Tensor, places: Sequence[Place]) -> Features:
        """`at` for some rows, without putting the whole columns side by side."""
        return Features(torch.cat([self.columns[place][chosen] for place in places], 1), self.labels[chosen])


class Source(ABC):
    """What is probed.

    Args:
        settings: how images reach it.
    """

    device = torch.device("cpu")

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings

    @abstractmethod
    def places(self, layer: int | None, blocks: int, pooling: str | None) -> list[Place]:
        """Where `blocks` blocks that end at a layer (None: its own choice) are pooled.

        Raises:
            ValueError: there are not so many, or there is no such pooling.
        """

    @abstractmethod
    def features_at(self, images: Tensor, places: Sequence[Place]) -> list[Tensor]:
        """One vector per image 'b d' at each place."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A name for exactly these features."""


class FrozenEncoder(Source):
    """An encoder as a source of features.

    Args:
        encoder: in evaluation mode from here on.
    """

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__(encoder.settings)
        self.encoder = encoder.eval()
        self.device = next(encoder.parameters()).device

    def places(self, layer: int | None, blocks: int, pooling: str | None) -> list[Place]:
        """ "class+mean" is each block's class token and the mean over the last one's patches (DINOv2)."""
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

    def features_at(self, images: Tensor, places: Sequence[Place]) -> list[Tensor]:
        dtype = next(self.encoder.parameters()).dtype  # float64, where a run trains in it
        found: dict[Place, Tensor] = {}
        for block in self.encoder.intermediates(images.to(dtype), {number for number, _ in places}, norm=True):
            for number, pooling in places:  # pooled at once, so that no more than one block's tokens are kept
                if number == block.number:
                    found[number, pooling] = self.encoder.pool(block.tokens, pooling).to(images.dtype)
        return [found[place] for place in places]

    def fingerprint(self) -> str:
        return fingerprint(self.encoder)


class RawPixels(Source):
    """The pixels themselves, at most 32 x 32: what a probe gets without learning.

    Args:
        settings: of the encoder that they stand beside, for the same view of the images.
    """

    def places(self, layer: int | None, blocks: int, pooling: str | None) -> list[Place]:
        return [(0, "pixels")]

    def features_at(self, images: Tensor, places: Sequence[Place]) -> list[Tensor]:
        height, width = (min(PIXEL_SIDE, side) for side in images.shape[2:])
        if (height, width) != images.shape[2:]:
            images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
        return [images.flatten(1)] * len(places)

    def fingerprint(self) -> str:
        return f"pixels {PIXEL_SIDE}"


@dataclass
class LabeledSet:
    """A data set to score on, opened when a pass first needs its images. All passes must see the same images of it.

    Args:
        index: of its shards.
        channels: that its images are read with.
        chosen: numbers of the samples that are scored; None for all.
        max_unreadable_fraction: share of them that may be unreadable, and is left out.
        memory_limit_mb: sets of small equal images are decoded once if they fit.
    """

    index: ShardIndex
    channels: int
    chosen: np.ndarray | None = None
    max_unreadable_fraction: float = MAX_UNREADABLE_FRACTION
    memory_limit_mb: int = 1024
    _used: np.ndarray | None = None

    @cached_property
    def reader(self) -> ShardReader:
        return ShardReader(self.index, self.channels, self.memory_limit_mb)

    @property
    def samples(self) -> np.ndarray:
        """Numbers of the images that are to be scored, readable or not."""
        return np.arange(len(self.index)) if self.chosen is None else self.chosen

    @property
    def images(self) -> int:
        """How many images scores are of: those that a pass could read, or all before the first one."""
        return len(self.samples if self._used is None else self._used)

    @property
    def unreadable(self) -> int:
        """How many images are left out of scores."""
        return len(self.samples) - self.images

    @property
    def count_in_words(self) -> str:
        """ "360 images", or "357 of 360 images (3 cannot be read)"."""
        if not self.unreadable:
            return f"{self.images:,} images"
        return f"{self.images:,} of {len(self.samples):,} images ({self.unreadable:,} cannot be read)"

    def account_for(self, used: Tensor | np.ndarray, bad: dict[str, Any]) -> None:
        """Take note of the images that a pass of all ranks has seen.

        Args:
            used: their sample numbers, of all ranks.
            bad: why others could not be read, by key, on this rank.

        Raises:
            NoScore: too many could not be read, or others than in an earlier pass.
        """
        used = np.sort(np.asarray(used))
        bad = {key: reason for one in said_by_all(bad) for key, reason in one.items()}
        example = "".join(f", e.g. {printable(key)}: {printable(reason)}" for key, reason in list(bad.items())[:1])
        if self._used is None:
            missing = len(self.samples) - len(used)
            said = f"{self.index.location}: {missing:,} of {len(self.samples):,} images cannot be read"
            if missing > self.max_unreadable_fraction * len(self.samples):
                raise NoScore(
                    f"{said}, more than the {self.max_unreadable_fraction:.1%} that a score may leave out{example}. "
                    "Repair or repack these shards, or raise the limit (--max-unreadable-fraction)."
                )
            if missing and is_first_rank():
                logger.warning(f"{said} and are left out of all scores{example}")
            self._used = used
        elif not np.array_equal(used, self._used):
            raise NoScore(
                f"{self.index.location}: {len(used):,} images could be read in this pass and {len(self._used):,} in an "
                f"earlier one{example}. Scores would be of different images: see whether its disk or network fails."
            )
