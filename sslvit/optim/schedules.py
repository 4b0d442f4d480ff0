"""Schedules over optimizer steps."""

from __future__ import annotations

import math


def cosine(step: float, start: float, final: float, total_steps: float) -> float:
    """Half a cosine from start to final; it reaches final at total_steps, one step after the last update."""
    progress = min(step / max(total_steps, 1e-12), 1.0)
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    step: float, peak: float, final: float, warmup_steps: float, total_steps: float, start: float = 0.0,
    twice_at_peak: bool = False,
) -> float:  # fmt: skip
    """Linear warm-up from the start to the peak, then half a cosine to the final value.

    Args:
        step: counted from zero.
        peak: value after the warm-up.
        final: value at total_steps.
        warmup_steps: steps of the warm-up; the first one has the start value.
        total_steps: Number of steps of both parts.
        start: value at step zero.
        twice_at_peak: the last step of the warm-up and the first step of the cosine both have the peak value (DINO's
            released code); otherwise, only the cosine's first step has it (MAE's).
    """
    if step >= warmup_steps:
        return cosine(step - warmup_steps, peak, final, total_steps - warmup_steps)
    return start + (peak - start) * step / max(warmup_steps - twice_at_peak, 1)


def warmup_stable_decay(
    step: float, peak: float, final: float, warmup_steps: float, total_steps: float, cooldown_steps: float
) -> float:
    """Linear warm-up from zero to the peak, a constant part, and a cooldown by one minus the square root of progress.

    Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", section 3.

    Args:
        step: counted from zero.
        peak: value between the warm-up and the cooldown.
        final: value at total_steps.
        warmup_steps: steps of the warm-up.
        total_steps: Number of steps of all parts.
        cooldown_steps: steps of the cooldown at the end; if the warm-up overlaps with it, the warm-up has precedence.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - (total_steps - cooldown_steps)) / max(cooldown_steps, 1e-12)
    return final + (peak - final) * (1 - math.sqrt(min(max(progress, 0.0), 1.0)))
