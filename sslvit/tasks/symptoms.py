"""Ways in which training fails, as measured numbers show them; each names the setting to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sslvit.results import decimals
from sslvit.settings import OptimSettings

TRIVIAL_FRACTION = 0.98  # of the loss of a constant guess, from which on nothing else has been learned
STUCK_FRACTION = 0.002  # of ln K: a loss that close to it says the same of every class
MIN_FEATURE_STD = 0.01  # standard deviation over images, relative to the features' size
MIN_RANK = 1.5  # effective rank
MIN_LOSSES = 20  # of a part of the curve that is judged
MAX_UNSEEN_FALL = 0.02  # of the loss: where noise would hide more, nothing is said
SURE = 2.0  # standard errors
MIN_IMAGES = 16  # below which a batch says nothing about how images differ


@dataclass
class Symptom:
    """A way in which training fails.

    Attributes:
        name: Short, the same in health.json every time.
        seen: What was measured, in words.
        suggestion: Which setting to change.
    """

    name: str
    seen: str
    suggestion: str


def lr_in_words(optim: OptimSettings) -> str:
    """The learning rate's key and value."""
    return f"optim.base_lr ({optim.base_lr:g})"


def feature_symptoms(measures: dict[str, float], optim: OptimSettings) -> list[Symptom]:
    """Features that hardly differ from image to image (dimensional collapse)."""
    if measures["images"] < MIN_IMAGES:
        return []
    deviation, rank = measures["feature_std"], measures["rankme"]
    if deviation >= MIN_FEATURE_STD and rank >= MIN_RANK:
        return []
    seen = f"features hardly differ between images (deviation {deviation:.4f} of their size, RankMe {rank:.1f})"
    suggestion = f"Lower {lr_in_words(optim)}, or raise data.global_batch_size or optim.warmup_epochs."
    return [Symptom("features", seen, suggestion)]


def trivial_symptoms(measures: dict[str, float], reference: str, guess: str, optim: OptimSettings) -> list[Symptom]:
    """A loss no better than that of a constant guess, or features without rank.

    Args:
        measures: What was measured in one step.
        reference: Which of them is the loss of the guess.
        guess: The guess, in words.
        optim: Settings of the optimizer.
    """
    loss, trivial = measures["loss"], measures[reference]
    features = feature_symptoms(measures, optim)
    if loss < TRIVIAL_FRACTION * trivial:
        return features
    seen = f"the loss ({decimals(loss, 3)}) is no better than that of {guess} ({trivial:.3f})"
    suggestion = f"Change {lr_in_words(optim)}: lower it, or raise it if it is far below a recipe's."
    return [Symptom("trivial", seen, suggestion), *features]


def fall_of(losses: Sequence[float]) -> tuple[float, float]:
    """How far a loss has fallen along the line that fits it best, and the standard error of that.

    The noise is taken from differences of neighbors, which a trend hardly touches (von Neumann 1941). Neighbors that
    are alike by chance make it too small, so that a loss rather counts as one that falls.
    """
    values = np.asarray(losses, np.float64)
    count = len(values)
    noise = math.sqrt(np.square(np.diff(values)).mean() / 2)
    slope = float(np.polyfit(np.arange(count), values, 1)[0])
    return -slope * (count - 1), noise * math.sqrt(12 / count)


def not_learning(losses: Sequence[float], since: int, optim: OptimSettings) -> Symptom | None:
    """A loss that has not fallen by more than its noise, where a fall worth the name would stand out of it.

    Args:
        losses: Training losses, evenly spaced over the steps that are judged.
        since: Its first step.
        optim: Settings of the optimizer.
    """
    if len(losses) < MIN_LOSSES:
        return None
    fall, error = fall_of(losses)
    level = abs(float(np.mean(losses)))
    if fall > SURE * error or SURE * error > MAX_UNSEEN_FALL * level:
        return None
    moved = "has risen" if fall < -SURE * error else "has not fallen by more than its noise"
    seen = f"the loss ({decimals(losses[-1], 3)}) {moved} since step {since:,}"
    return Symptom(
        "not learning", seen, f"Change {lr_in_words(optim)}: raise it if it is below a recipe's, lower it otherwise; "
        "or the encoder may have learned what it can."
    )  # fmt: skip
