"""Ways in which training fails, as measured numbers show them; each names the setting to change."""

from __future__ import annotations

from dataclasses import dataclass

from sslvit.settings import OptimSettings

TRIVIAL_FRACTION = 0.98  # of the loss of a constant guess, from which on nothing else has been learned
STUCK_FRACTION = 0.002  # of ln K: a loss that close to it says the same of every class
MIN_FEATURE_STD = 0.01  # standard deviation over images, relative to the features' size
MIN_RANK = 1.5  # effective rank
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


def trivial_loss(loss: float, reference: float, what: str, optim: OptimSettings) -> list[Symptom]:
    """A loss no better than that of a constant guess.

    Args:
        loss: Of the step.
        reference: Of the guess.
        what: The guess, in words.
        optim: Settings of the optimizer.
    """
    if loss < TRIVIAL_FRACTION * reference:
        return []
    seen = f"the loss ({loss:.3f}) is that of {what} ({reference:.3f})"
    return [
        Symptom("trivial", seen, f"Change {lr_in_words(optim)}: lower it, or raise it if it is far below a recipe's.")
    ]
