"""Negative log-likelihood of pixels, in nats, under a model and under unigram and n-gram baselines."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sslvit.data.loader import evaluation_loader, normalized_view
from sslvit.evaluate.sources import LabeledSet, full_float32, in_pieces
from sslvit.models.igpt import IGPTModel, pixel_nll
from sslvit.progress import track

HELD_OUT_EVERY = 10  # one in this many training images is held out to tune the n-gram's smoothing
MAX_TUNING_IMAGES = 1_000
MIN_IMAGES = 10  # needed for the counts
MAX_COUNTED_PIXELS = 2**24  # counted at a time, in about 1 GB
MAX_SCORED = 256  # images scored at a time, or one batch if that is larger
DISCOUNTS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
LEFT_WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7)
Smoothing = tuple[float, float, float]  # discount with one neighbor, discount with two, weight of the left neighbor


class Counts:
    """How often each color followed each context.

    Attributes:
        keys: context x colors + color of the pairs that occurred, sorted.
        before: number of pairs with a smaller key than each of these; the last entry is the number of all pairs.
        colors: number of colors in the palette.
    """

    def __init__(self, keys: np.ndarray, counts: np.ndarray, colors: int) -> None:
        self.keys, self.before, self.colors = keys, np.append(0, np.cumsum(counts)), colors

    @classmethod
    def of(cls, context: np.ndarray, color: np.ndarray, colors: int) -> Counts:
        """Count how often each color follows each context."""
        return cls(*np.unique(context * colors + color, return_counts=True), colors)

    def __add__(self, other: Counts) -> Counts:
        """The counts of both together."""
        keys, places = np.unique(np.append(self.keys, other.keys), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, np.append(np.diff(self.before), np.diff(other.before)))
        return Counts(keys, counts, self.colors)

    def look_up(self, context: np.ndarray, color: np.ndarray) -> PixelCounts:
        """The counts of each pixel's context and color."""
        first = context * self.colors
        counts, _ = self._count(first + color, first + color + 1)
        return PixelCounts(counts, *self._count(first, first + self.colors))

    def _count(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of pairs, and of distinct pairs, with keys from `first` up to, but not including, `end`."""
        start, stop = np.searchsorted(self.keys, first), np.searchsorted(self.keys, end)
        return self.before[stop] - self.before[start], stop - start


@dataclass
class PixelCounts:
    """Counts for some pixels.

    Args:
        counts: how often the pixel's color followed its context.
        totals: how often any color did.
        distinct: how many different colors did.
    """

    counts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray

    def probs(self, discount: float, lower: np.ndarray) -> np.ndarray:
        """p(color | context) by absolute discounting (Ney et al. 1994).

        Args:
            discount: subtracted from each count, in favor of the lower-order estimate.
            lower: lower-order estimate, p(color) with less context.
        """
        totals = np.maximum(self.totals, 1)
        probs = np.maximum(self.counts - discount, 0) / totals + discount * self.distinct / totals * lower
        return np.where(self.totals > 0, probs, lower)


class NGramTable:
    """An n-gram model p(color | left neighbor, upper neighbor), counted on images.

    Backs off to a mixture of p(color | left) and p(color | upper), each of which backs off to the unigram p(color) with
    one added to each count. Neighbors beyond the edge have a color of their own.
    """

    def __init__(self, images: np.ndarray, colors: int) -> None:
        self.colors = colors
        left, upper, color = self.contexts_of(images)
        self.frequency = np.bincount(color, minlength=colors)
        self.by_left, self.by_upper = Counts.of(left, color, colors), Counts.of(upper, color, colors)
        self.by_both = Counts.of(left * (colors + 1) + upper, color, colors)

    def __add__(self, other: NGramTable) -> NGramTable:
        """The table of the images of both."""
        made = copy.copy(self)
        made.frequency = self.frequency + other.frequency
        made.by_left, made.by_upper = self.by_left + other.by_left, self.by_upper + other.by_upper
        made.by_both = self.by_both + other.by_both
        return made

    @property
    def unigram(self) -> np.ndarray:
        """p(color): the frequencies of colors, with one added to each count."""
        return (self.frequency + 1) / (self.frequency.sum() + self.colors)

    def contexts_of(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left neighbor, upper neighbor and color of every pixel."""
        framed = np.pad(images.astype(np.int64), ((0, 0), (1, 0), (1, 0)), constant_values=self.colors)
        return framed[:, 1:, :-1].ravel(), framed[:, :-1, 1:].ravel(), images.astype(np.int64).ravel()

    def nats(self, images: np.ndarray, trials: list[Smoothing]) -> list[float]:
        """Mean negative log-likelihood per pixel under each choice of smoothing.

        Args:
            images: palette indices, 'b h w'.
            trials: discount of counts with one neighbor, discount of counts with two, weight of the left neighbor.
        """
        left, upper, color = self.contexts_of(images)
        unigram = self.unigram[color]
        by_left, by_upper = self.by_left.look_up(left, color), self.by_upper.look_up(upper, color)
        by_both = self.by_both.look_up(left * (self.colors + 1) + upper, color)
        nats = []
        for single, both, left_weight in trials:
            mixed = left_weight * by_left.probs(single, unigram) + (1 - left_weight) * by_upper.probs(single, unigram)
            nats.append(float(-np.log(by_both.probs(both, mixed)).mean()))
        return nats


def count_ngrams(pieces: Iterable[np.ndarray], colors: int) -> tuple[NGramTable, Smoothing]:
    """An n-gram table of all images, and its smoothing, from images 'b h w' that come in pieces.

    The smoothing is the one that is best on every tenth image, at most 1,000 of them, for an n-gram of the others.
    """
    counted = held_out = NGramTable(np.empty((0, 1, 1), np.int64), colors)
    tuned_on: list[np.ndarray] = []
    number = 0
    for images in pieces:
        is_held_out = np.arange(number, number + len(images)) % HELD_OUT_EVERY == 0
        counted += NGramTable(images[~is_held_out], colors)
        held_out += NGramTable(images[is_held_out], colors)
        rows = np.flatnonzero(is_held_out)[: MAX_TUNING_IMAGES - sum(map(len, tuned_on))]
        tuned_on.append(images[rows])
        number += len(images)
    trials = list(itertools.product(DISCOUNTS, DISCOUNTS, LEFT_WEIGHTS))
    nats = counted.nats(np.concatenate(tuned_on), trials)
    return counted + held_out, trials[int(np.argmin(nats))]


@torch.no_grad()
@full_float32()
def likelihood(model: IGPTModel, train: LabeledSet, val: LabeledSet, batch: int = 16) -> dict[str, dict[str, float]]:
    """Nats and bits per pixel of `val` under a uniform distribution, unigram and n-gram of `train`, and the model.

    The model should have been trained on `train`, too; each image of `val` is scored in one center view.

    Raises:
        ValueError: there are too few images for the counts, too many cannot be read, or predictions are not finite.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}: must be 1 or more.")
    if len(train.samples) < MIN_IMAGES:
        raise ValueError(
            f"--train {train.index.location}: {len(train.samples)} images are too few for the counts. Give "
            f"{MIN_IMAGES} or more."
        )
    model.eval()
    colors, (rows, columns) = model.head.out_features, model.encoder.settings.grid
    at_once = max(1, MAX_COUNTED_PIXELS // (rows * columns))
    table, smoothing = count_ngrams(regroup(palette_images(model, train, "counting"), at_once), colors)
    unigram, sizes, found = table.unigram, [], []
    for images in regroup(palette_images(model, val, "scoring"), batch * max(1, MAX_SCORED // batch)):
        sizes.append(len(images))
        of_model = model_nats(model, torch.from_numpy(images).flatten(1), batch)
        found.append((float(-np.log(unigram[images.ravel()]).mean()), *table.nats(images, [smoothing]), of_model))
    means = np.array(sizes) / sum(sizes) @ np.array(found)
    names = "unigram", "n-gram of left and upper neighbor", "iGPT"
    nats = {f"uniform over {colors} colors": math.log(colors), **dict(zip(names, means.tolist(), strict=True))}
    if not all(math.isfinite(value) for value in nats.values()):
        raise ValueError("the model's predictions are not finite numbers: its training has probably failed.")
    return {name: {"nats per pixel": value, "bits per pixel": value / math.log(2)} for name, value in nats.items()}


def model_nats(model: IGPTModel, colors: Int[Tensor, "b n"], batch: int) -> float:
    """Mean nats per pixel of images given as palette indices."""
    encoder, total = model.encoder, 0.0
    pixels = encoder.pixel_tokens
    largest = colors.shape[1] * max(encoder.settings.mlp_width, model.head.out_features)
    for of_batch in colors.split(batch):
        for piece in in_pieces(of_batch.long().to(pixels.palette.device), largest):
            images = pixels.images_of(piece, encoder.settings.grid)
            total += float(pixel_nll(model.head(encoder(images)), piece)) * len(piece)
    return total / len(colors)


def palette_images(model: IGPTModel, data: LabeledSet, doing: str) -> Iterator[np.ndarray]:
    """The encoder's view of every readable image as palette indices, 'b h w', batch by batch.

    `doing` names the work in reports of progress.

    Raises:
        NoScore: too many images could not be read; raised after the last batch.
    """
    encoder = model.encoder
    pixels = encoder.pixel_tokens
    loader = evaluation_loader(data.reader, encoder.settings, subset=data.subset)
    samples: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for batch in track(loader, doing, len(data.samples), each=256):
        indices = pixels.quantize(normalized_view(batch, encoder.settings, pixels.palette.device))[batch.valid]
        samples.append(batch.samples[batch.valid])
        unreadable |= batch.unreadable
        yield indices.cpu().numpy().astype(np.int32).reshape(-1, *encoder.settings.grid)
    data.account_for(torch.cat(samples), unreadable)


def regroup(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in groups of one size; the last one may be smaller."""
    waiting: np.ndarray | None = None
    for piece in pieces:
        waiting = piece if waiting is None else np.concatenate([waiting, piece])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting is not None and len(waiting):
        yield waiting
