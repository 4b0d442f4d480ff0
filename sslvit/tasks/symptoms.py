"""Symptoms of failed training in measured numbers; each names the setting to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sslvit.results import decimals
from sslvit.settings import OptimSettings

TRIVIAL_FRACTION = 0.98  # fraction of a constant prediction's loss above which nothing else has been learned
STUCK_FRACTION = 0.002  # relative distance to ln K below which a loss means equal probabilities for all classes
MIN_FEATURE_STD = 0.01  # standard deviation over images, relative to the size of the features
MIN_RANK = 1.5  # effective rank
MIN_LOSSES = 20  # minimal length of a loss curve to judge it
MAX_UNSEEN_FALL = 0.02  # relative decrease of the loss; if noise could hide a larger one, there is no verdict
SURE = 2.0  # standard errors
MIN_IMAGES = 16  # smaller batches are not judged by the differences between images


@dataclass
class Symptom:
    """A way in which training fails.

    Attributes:
        name: Short identifier, as in health.json.
        seen: The measurement, in words.
        suggestion: The setting to change.
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
    """A loss no better than that of a constant prediction, or features of low rank.

    Args:
        measures: Measurements of one step.
        reference: Key of the measurement that is the loss of the constant prediction.
        guess: The constant prediction, in words.
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
    """Decrease of a loss along its least-squares line, and the standard error of the decrease.

    The noise is estimated from differences of neighbors, which a trend hardly affects (von Neumann 1941). Correlated
    neighbors make the estimate too small, which errs on the side of a falling loss.
    """
    values = np.asarray(losses, np.float64)
    count = len(values)
    noise = math.sqrt(np.square(np.diff(values)).mean() / 2)
    slope = float(np.polyfit(np.arange(count), values, 1)[0])
    return -slope * (count - 1), noise * math.sqrt(12 / count)


def not_learning(losses: Sequence[float], since: int, optim: OptimSettings) -> Symptom | None:
    """A loss that has not decreased by more than its noise, if the noise is small enough to show a relevant decrease.

    Args:
        losses: Training losses, evenly spaced over the judged steps.
        since: The first of these steps.
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
