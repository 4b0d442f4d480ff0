"""How well pixels are predicted, in nats: a model beside what counting alone gives."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sslvit.data.loader import evaluation_loader, normalized_view
from sslvit.evaluate.sources import LabeledSet
from sslvit.progress import track
from sslvit.tasks.igpt import IGPT, pixel_nll

HELD_OUT = 10  # every tenth training image tunes the table of neighbors
MOST_TUNED = 1_000  # of them
FEWEST = 10  # images to count on
DISCOUNTS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
LEFT_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass
class Counts:
    """How often each color followed each context.

    Args:
        keys: context x colors + color, sorted, those that occurred.
        counts: of each key.
        contexts: sorted, those that occurred.
        totals: of each context.
        distinct: different colors that followed each context.
        colors: of the palette.
    """

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray
    colors: int

    @classmethod
    def of(cls, context: np.ndarray, color: np.ndarray, colors: int) -> Counts:
        keys, counts = np.unique(context * colors + color, return_counts=True)
        contexts, first = np.unique(keys // colors, return_index=True)
        return cls(keys, counts, contexts, np.add.reduceat(counts, first), np.diff([*first, len(keys)]), colors)

    def look_up(self, context: np.ndarray, color: np.ndarray) -> Found:
        """What is known of each place's context and color."""
        at = _find(self.keys, context * self.colors + color)
        seen = np.where(at >= 0, self.counts[at], 0)
        at = _find(self.contexts, context)
        return Found(seen, np.where(at >= 0, self.totals[at], 0), np.where(at >= 0, self.distinct[at], 0))


@dataclass
class Found:
    """Counts at some places.

    Args:
        seen: how often the place's color followed its context.
        totals: how often any did.
        distinct: how many different ones did.
    """

    seen: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray

    def shares(self, discount: float, lower: np.ndarray) -> np.ndarray:
        """p(color | context) by absolute discounting (Ney et al. 1994).

        Args:
            discount: taken off each count; what is taken goes to the lower estimate.
            lower: p(color) with less context.
        """
        totals = np.maximum(self.totals, 1)
        known = np.maximum(self.seen - discount, 0) / totals + discount * self.distinct / totals * lower
        return np.where(self.totals > 0, known, lower)


class NeighborTable:
    """p(color | left neighbor, upper neighbor), counted on images.

    Backs off to a mixture of p(color | left) and p(color | upper), each of which backs off to p(color) with one
    added to each count. Beyond the edge lies a color of its own.

    Args:
        images: palette indices, 'b h w'.
        colors: of the palette.
    """

    def __init__(self, images: np.ndarray, colors: int) -> None:
        self.colors = colors
        left, upper, color = self.contexts_of(images)
        self.alone = (np.bincount(color, minlength=colors) + 1) / (len(color) + colors)
        self.by_left, self.by_upper = Counts.of(left, color, colors), Counts.of(upper, color, colors)
        self.by_both = Counts.of(left * (colors + 1) + upper, color, colors)

    def contexts_of(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left neighbor, upper neighbor and color of every pixel."""
        framed = np.pad(images.astype(np.int64), ((0, 0), (1, 0), (1, 0)), constant_values=self.colors)
        return framed[:, 1:, :-1].ravel(), framed[:, :-1, 1:].ravel(), images.astype(np.int64).ravel()

    def nats(self, images: np.ndarray, trials: list[tuple[float, float, float]]) -> list[float]:
        """Mean negative log-likelihood per pixel under each choice of smoothing.

        Args:
            images: palette indices, 'b h w'.
            trials: discount of the counts with one neighbor, of those with two, and the left neighbor's weight.
        """
        left, upper, color = self.contexts_of(images)
        alone = self.alone[color]
        by_left, by_upper = self.by_left.look_up(left, color), self.by_upper.look_up(upper, color)
        by_both = self.by_both.look_up(left * (self.colors + 1) + upper, color)
        nats = []
        for single, both, left_share in trials:
            mixed = left_share * by_left.shares(single, alone) + (1 - left_share) * by_upper.shares(single, alone)
            nats.append(float(-np.log(by_both.shares(both, mixed)).mean()))
        return nats


def neighbor_nats(train: np.ndarray, val: np.ndarray, colors: int) -> float:
    """Nats per pixel of `val` by a table counted on `train`, its smoothing chosen on some training images."""
    return NeighborTable(train, colors).nats(val, [tune_smoothing(train, colors)])[0]


def tune_smoothing(images: np.ndarray, colors: int) -> tuple[float, float, float]:
    """The smoothing that is best on every tenth image for a table counted on the others."""
    is_held = np.arange(len(images)) % HELD_OUT == 0
    trials = list(itertools.product(DISCOUNTS, DISCOUNTS, LEFT_SHARES))
    nats = NeighborTable(images[~is_held], colors).nats(images[is_held][:MOST_TUNED], trials)
    return trials[int(np.argmin(nats))]


def unigram_nats(train: np.ndarray, val: np.ndarray, colors: int) -> float:
    """Nats per pixel of `val` by how often each color is in `train`, one added to each count."""
    shares = (np.bincount(train.ravel(), minlength=colors) + 1) / (train.size + colors)
    return float(-np.log(shares[val.ravel()]).mean())


@torch.no_grad()
def likelihood(task: IGPT, train: LabeledSet, val: LabeledSet, batch: int = 16) -> dict[str, dict[str, float]]:
    """Nats and bits per pixel of `val`: all colors alike, by counting on `train`, and by the model.

    Args:
        task: trained, on the device that it shall run on.
        train: images that are counted; the model should have been trained on the same.
        val: images that are scored, each seen once, in the middle and at the encoder's size.
        batch: images per forward pass.

    Raises:
        ValueError: too few images to count on, too many that cannot be read, or predictions that are not finite.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}: must be 1 or more.")
    if len(train.samples) < FEWEST:
        raise ValueError(
            f"--train {train.index.location}: {len(train.samples)} images are too few to count on. Give {FEWEST} or "
            "more."
        )
    task.eval()
    colors = task.head.out_features
    counted, scored = palette_images(task, train), palette_images(task, val)
    nats = {
        f"{colors} colors alike": math.log(colors),
        "how often each color is": unigram_nats(counted, scored, colors),
        "left and upper neighbor, counted": neighbor_nats(counted, scored, colors),
        "iGPT": model_nats(task, torch.from_numpy(scored).flatten(1), batch),
    }
    if not all(math.isfinite(value) for value in nats.values()):
        raise ValueError("the model's predictions are not finite numbers: its training has probably failed.")
    return {name: {"nats per pixel": value, "bits per pixel": value / math.log(2)} for name, value in nats.items()}


def model_nats(task: IGPT, colors: Int[Tensor, "b n"], batch: int) -> float:
    """Mean nats per pixel of images given as palette indices."""
    encoder, total = task.encoder, 0.0
    device = encoder.patch_embed.palette.device
    for piece in track(colors.split(batch), "scoring", len(colors), each=batch):
        piece = piece.long().to(device)
        images = encoder.patch_embed.images_of(piece, encoder.settings.grid)
        total += float(pixel_nll(task.head(encoder(images)), piece)) * len(piece)
    return total / len(colors)


def palette_images(task: IGPT, data: LabeledSet) -> np.ndarray:
    """The encoder's view of every readable image as palette indices, 'b h w'."""
    encoder = task.encoder
    pixels = encoder.patch_embed
    loader = evaluation_loader(data.reader, encoder.settings, chosen=data.chosen)
    pieces, samples, bad = [], [], {}
    for batch in track(loader, "images into the palette", len(loader) * 256, each=256):
        indices = pixels.quantize(normalized_view(batch, encoder.settings, pixels.palette.device))[batch.valid]
        pieces.append(indices.cpu().numpy().astype(np.int32).reshape(-1, *encoder.settings.grid))
        samples.append(batch.samples[batch.valid])
        bad |= batch.bad
    data.account_for(torch.cat(samples), bad)
    return np.concatenate(pieces)


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted value, -1 where it is not there."""
    at = np.searchsorted(sorted_values, wanted)
    at = np.minimum(at, len(sorted_values) - 1)
    return np.where(sorted_values[at] == wanted, at, -1)
