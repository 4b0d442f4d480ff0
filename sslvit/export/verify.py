"""Reopened exports against the encoder they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvit.export.exported import Exported
from sslvit.settings import EncoderSettings

TOLERANCE = 1e-5  # relative to the largest output; float32 on both sides


def check_inputs(settings: EncoderSettings, is_fixed: bool) -> list[Tensor]:
    """Fixed images of the encoder's size, in two batches, and of another size where the export takes one."""
    source = torch.Generator().manual_seed(0)
    height, width = settings.image_size
    shapes = [(2, height, width), (3, height, width)]
    if not is_fixed:
        shapes.append((1, height + settings.patch, width + 2 * settings.patch))
    return [torch.randn(batch, settings.channels, *sides, generator=source) for batch, *sides in shapes]


@torch.no_grad()
def compare(exported: Exported, reopened: Callable[[Tensor], Tensor], images: list[Tensor]) -> dict[str, Any]:
    """Largest difference between the outputs of both on the same images, and whether that is small enough."""
    worst, scale = 0.0, 0.0
    for batch in images:
        expected, got = exported(batch), reopened(batch)
        if got.shape != expected.shape:
            raise RuntimeError(
                f"the reopened encoder gives {exported.outputs} of shape {tuple(got.shape)}, not "
                f"{tuple(expected.shape)}."
            )
        difference = (got - expected).abs().max()
        worst = float("inf") if difference.isnan() else max(worst, float(difference))
        scale = max(scale, float(expected.abs().max()))
    return {
        "largest_difference": worst, "largest_output": scale, "tolerance": TOLERANCE * max(scale, 1.0),
        "shapes": [list(batch.shape) for batch in images], "passed": worst <= TOLERANCE * max(scale, 1.0),
    }  # fmt: skip


def compare_preprocessing(exported: Exported, prepare: Callable[[Image.Image], Tensor]) -> dict[str, Any]:
    """Largest difference between prepared pixels, on an image that needs no resizing."""
    settings = exported.settings
    shape = (*settings.image_size, settings.channels) if settings.channels > 1 else tuple(settings.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    expected = (torch.from_numpy(pixels).view(*settings.image_size, -1).permute(2, 0, 1) / 255 - mean) / std
    got = prepare(Image.fromarray(pixels))
    if got.shape != expected.shape:
        raise RuntimeError(f"the preprocessing gives {tuple(got.shape)}, not {tuple(expected.shape)}.")
    worst = float((got - expected).abs().max())
    return {"largest_difference": worst, "tolerance": TOLERANCE, "passed": worst <= TOLERANCE}
