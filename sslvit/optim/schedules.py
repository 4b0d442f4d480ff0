"""Curves over optimizer steps."""

from __future__ import annotations

import math


def cosine(step: float, start: float, final: float, total_steps: float) -> float:
    """Half a cosine from start to final, which would be reached at total_steps, one step after the last update."""
    progress = min(step / max(total_steps, 1e-12), 1.0)
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    step: float, peak: float, final: float, warmup_steps: float, total_steps: float, start: float = 0.0,
    twice_at_peak: bool = False,
) -> float:  # fmt: skip
    """Straight from the start to the peak, then along half a cosine to the final value.

    Args:
        step: counted from zero.
        peak: value after the warm-up.
        final: value at total_steps.
        warmup_steps: steps of the straight part; its first one has the start value.
        total_steps: Number of steps of both parts.
        start: value at step zero.
        twice_at_peak: the straight part reaches the peak in its last step, and the cosine starts there again (DINO's
            released code); otherwise the cosine's first step is the first at the peak (MAE's).
    """
    if step >= warmup_steps:
        return cosine(step - warmup_steps, peak, final, total_steps - warmup_steps)
    return start + (peak - start) * step / max(warmup_steps - twice_at_peak, 1)


def warmup_stable_decay(
    step: float, peak: float, final: float, warmup_steps: float, total_steps: float, cooldown_steps: float
) -> float:
    """Straight from zero to the peak, constant, and in the last steps down along one minus a square root.

    Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", section 3.

    Args:
        step: counted from zero.
        peak: value between the warm-up and the cooldown.
        final: value at total_steps.
        warmup_steps: steps of the straight part.
        total_steps: Number of steps of all parts.
        cooldown_steps: steps at the end in which the value falls; a warm-up that reaches into them goes first.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - (total_steps - cooldown_steps)) / max(cooldown_steps, 1e-12)
    return final + (peak - final) * (1 - math.sqrt(min(max(progress, 0.0), 1.0)))
