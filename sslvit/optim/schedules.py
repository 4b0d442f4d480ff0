"""Curves over optimiser steps."""

from __future__ import annotations

import math


def warmup_cosine(step: float, peak: float, final: float, warmup_steps: float, total_steps: float) -> float:
    """Straight from zero to the peak, then along half a cosine to the final value.

    MAE (He et al. 2022, appendix A.1): the first update has rate zero where there is a warm-up, and the final
    value would be reached at total_steps, one step after the last update.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1e-12), 1.0)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
