"""Reopened exports against the encoder they came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

TOLERANCE = 1e-5  # relative to the largest feature; float32 on both sides


def check_inputs(settings: EncoderSettings) -> list[Tensor]:
    """Fixed images of the encoder's size, and of another size and batch where the encoder takes one."""
    source = torch.Generator().manual_seed(0)
    height, width = settings.image_size
    shapes = [(2, settings.channels, height, width)]
    if settings.tokens != "pixel":
        shapes.append((3, settings.channels, height + settings.patch, width + 2 * settings.patch))
    return [torch.randn(shape, generator=source) for shape in shapes]


@torch.no_grad()
def compare(encoder: ViTEncoder, reopened: Callable[[Tensor], Tensor], images: list[Tensor]) -> dict:
    """Largest difference between the features of both on the same images, and whether that is small enough."""
    worst, scale = 0.0, 0.0
    for batch in images:
        expected, got = encoder.features(batch), reopened(batch)
        if got.shape != expected.shape:
            raise RuntimeError(
                f"the reopened encoder gives features of shape {tuple(got.shape)}, not {tuple(expected.shape)}."
            )
        difference = (got - expected).abs().max()
        worst = float("inf") if difference.isnan() else max(worst, float(difference))
        scale = max(scale, float(expected.abs().max()))
    return {
        "largest_difference": worst, "largest_feature": scale, "tolerance": TOLERANCE * max(scale, 1.0),
        "shapes": [list(batch.shape) for batch in images], "passed": worst <= TOLERANCE * max(scale, 1.0),
    }  # fmt: skip
