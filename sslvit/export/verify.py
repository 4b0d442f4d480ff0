"""Reopened exports against the encoder they came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sslvit.export.exported import Exported
from sslvit.settings import EncoderSettings

TOLERANCE = 1e-5  # of the largest output, or of one for tokens and features below that; float32 on both sides
RESIZING = 0.005  # of a channel's deviation, on average: libraries round differently when they resize
SHOWN = (1, 3)  # channels of images that other libraries read


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
    """Largest difference between the outputs of both on the same images, and whether that is small enough.

    Raises:
        ValueError: the outputs have other shapes.
    """
    worst, scale = 0.0, 0.0
    for batch in images:
        expected, got = exported(batch), reopened(batch)
        if got.shape != expected.shape:
            raise ValueError(f"{exported.outputs} of shape {tuple(got.shape)}, not {tuple(expected.shape)}")
        is_sound = bool(expected.isfinite().all()) and bool(got.isfinite().all())
        worst = max(worst, float((got - expected).abs().max()) if is_sound else math.inf)
        scale = max(scale, float(expected.abs().max()) if is_sound else 0.0)
    tolerance = TOLERANCE * (scale if exported.outputs == "logits" else max(scale, 1.0))
    return {
        "largest_difference": worst, "largest_output": scale, "tolerance": tolerance,
        "shapes": [list(batch.shape) for batch in images], "passed": worst <= tolerance,
    }  # fmt: skip


def compare_preprocessing(exported: Exported, prepare: Callable[[Image.Image], Tensor]) -> dict[str, Any]:
    """Prepared pixels against the card's words: on an image of the right size, and on one that is cropped and resized.

    The first must agree; of the second, which every library rounds in its own way, the mean difference is small. The
    second is wider by a whole number of the resized image's pixels on either side: libraries crop after they resize,
    and shift by half a pixel what would begin between two of them.
    """
    settings = exported.settings
    height, width = settings.image_size
    source = np.random.default_rng(0)
    exact = Image.fromarray(as_image(source.integers(0, 256, (height, width, settings.channels))))
    rows, columns = np.mgrid[0 : 2 * height, 0 : 2 * width + 4 * max(width // 4, 1)] / max(height, width)
    waves = [127 + 90 * np.sin(3 * rows + 2 * columns * (1 + channel)) for channel in range(settings.channels)]
    noise = source.uniform(-30, 30, (*rows.shape, settings.channels))  # tells bilinear from bicubic
    large = Image.fromarray(as_image(np.stack(waves, 2) + noise))
    resampling = Image.Resampling[settings.interpolation.upper()]
    found = {"largest_difference": 0.0, "mean_difference": 0.0}
    for image, measure in ((exact, "largest_difference"), (large, "mean_difference")):
        expected = normalised(ImageOps.fit(image, (width, height), resampling), settings)
        if settings.tokens == "pixel":  # colours of the palette on both sides
            tokens = exported.encoder.patch_embed
            expected = tokens.images_of(tokens.indices(expected[None]), (height, width))[0]
        got = prepare(image)
        if got.shape != expected.shape:
            raise ValueError(f"its preprocessing gives {tuple(got.shape)}, not {tuple(expected.shape)}")
        difference = (got - expected).abs()
        found[measure] = float(difference.max() if image is exact else difference.mean())
    found |= {"tolerance": TOLERANCE, "mean_tolerance": RESIZING}
    if settings.tokens == "pixel":
        found["mean_tolerance"] = math.inf  # a nearby color may be another one
    return found | {"passed": shortfall(found) == ""}


def shortfall(found: dict[str, Any]) -> str:
    """What a comparison fails by, measure by measure, each with its number and tolerance; empty where it passes."""
    measures = (
        ("largest_difference", "tolerance", "differs by"),
        ("mean_difference", "mean_tolerance", "of an image that is cropped and resized differs on average by"),
    )
    return "; ".join(
        f"{words} {found[measure]:.1e} (allowed {found[allowed]:.0e})"
        for measure, allowed, words in measures
        if measure in found and not found[measure] <= found[allowed]
    )


def as_image(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint8) if pixels.shape[2] > 1 else pixels[:, :, 0].astype(np.uint8)


def normalised(image: Image.Image, settings: EncoderSettings) -> Tensor:
    """'c h w', as the card says."""
    pixels = torch.from_numpy(np.array(image, np.float32) / 255).view(image.height, image.width, -1).permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    return (pixels - mean) / std
