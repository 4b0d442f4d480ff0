"""Reopened exports against the encoder they came from."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvit.data.preprocess import preprocess
from sslvit.exporters.cropping import resized_sides, whole_pixel_fraction
from sslvit.exporters.exported import Exported, Reopened
from sslvit.files import printable
from sslvit.settings import EncoderSettings

TOLERANCE = 1e-5  # of the largest output, or of one for tokens and features below that; float32 on both sides
RESIZE_TOLERANCE = 0.005  # of a channel's deviation, on average: libraries round differently when they resize
ROUNDING = 0.28  # of a level of 255, the same where deviations are small: rounded twice or once
IMAGE_CHANNELS = (1, 3)  # of images that other libraries read


def check_inputs(settings: EncoderSettings, is_fixed: bool) -> list[Tensor]:
    """Fixed images of the encoder's size, in two batches, and of another size where the export takes one."""
    source = torch.Generator().manual_seed(0)
    height, width = settings.size
    shapes = [(2, height, width), (3, height, width)]
    if not is_fixed:
        shapes.append((1, height + settings.patch, width + 2 * settings.patch))
    return [torch.randn(batch, settings.channels, *sides, generator=source, device="cpu") for batch, *sides in shapes]


@torch.no_grad()
def compare(exported: Exported, reopened: Reopened, images: list[Tensor]) -> dict[str, Any]:
    """The largest difference between the outputs of both on the same images, and whether that is small enough.

    Raises:
        ValueError: The outputs have other shapes.
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


def compare_weights(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Whether both hold the same numbers: a change in a block behind a faint LayerScale shows in no output."""
    differing = sorted(expected.keys() ^ found.keys())
    for key in sorted(expected.keys() & found.keys()):
        one, other = expected[key].detach().cpu(), found[key].detach().cpu()
        if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
            differing.append(key)
    return {"compared": len(expected), "differing": differing, "passed": not differing}


@torch.no_grad()
def with_unit_scale(exported: Exported) -> Exported:
    """A copy in which every LayerScale is one."""
    rescaled = copy.deepcopy(exported)
    for key, value in rescaled.named_parameters():
        if key.endswith(".gamma"):
            value.fill_(1.0)
    return rescaled


def compare_preprocessing(exported: Exported, prepare: Callable[[Image.Image], Tensor]) -> dict[str, Any]:
    """Prepared pixels against what evaluation shows, for an image that is only cropped and one that is resized too.

    The first must agree; for the second, which every library rounds in its own way, the mean difference is small.
    Libraries resize to whole pixels before they crop, so the crop is compared at the fraction that they can hold.
    Both images are of sizes for which that crop begins at a whole pixel of the resized image; libraries shift by half a
    pixel what would begin between two of them.
    """
    settings = dataclasses.replace(exported.settings, crop_fraction=whole_pixel_fraction(exported.settings))
    source = np.random.default_rng(0)
    height, width = settings.size
    rows, columns = resized_sides(exported.settings)
    is_squashed = settings.crop_mode == "squash"
    if not is_squashed:
        columns = width + 2 * math.ceil((width / settings.crop_fraction - width) / 2 - 1e-6)
    exact = Image.fromarray(to_image(source.integers(0, 256, (rows, columns, settings.channels))))
    sides = (2 * rows, 3 * columns if is_squashed else 2 * columns + 4 * max(width // 4, 1))
    down, right = np.mgrid[0 : sides[0], 0 : sides[1]] / max(height, width)
    waves = [127 + 90 * np.sin(3 * down + 2 * right * (1 + channel)) for channel in range(settings.channels)]
    noise = source.uniform(-30, 30, (*down.shape, settings.channels))  # tells bilinear from bicubic
    large = Image.fromarray(to_image(np.stack(waves, 2) + noise))
    found = {"largest_difference": 0.0, "mean_difference": 0.0}
    for image, measure in ((exact, "largest_difference"), (large, "mean_difference")):
        expected = preprocess(image, settings)[0]
        if settings.tokens == "pixel":  # colors of the palette on both sides
            tokens = exported.encoder.pixel_tokens
            expected = tokens.images_of(tokens.quantize(expected[None]), (height, width))[0]
        got = prepare(image)
        if got.shape != expected.shape:
            raise ValueError(f"its preprocessing gives {tuple(got.shape)}, not {tuple(expected.shape)}")
        difference = (got - expected).abs()
        found[measure] = float(difference.max() if image is exact else difference.mean())
    rounding = ROUNDING / 255 / min(settings.std)
    found |= {
        "tolerance": TOLERANCE,
        "mean_tolerance": max(RESIZE_TOLERANCE, rounding),
        "crop_fraction": settings.crop_fraction,
    }
    if settings.tokens == "pixel":
        found["mean_tolerance"] = math.inf  # a nearby color may be another one
    return found | {"passed": shortfall(found) == ""}


def shortfall(found: dict[str, Any]) -> str:
    """By how much a comparison fails, measure by measure with number and tolerance; empty if it passes."""
    if differing := found.get("differing"):
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        return f"{printable(', '.join(differing[:3]))}{more} differ"
    measures = (
        ("largest_difference", "tolerance", "differs by"),
        ("mean_difference", "mean_tolerance", "of an image that is cropped and resized differs on average by"),
    )
    return "; ".join(
        f"{words} {found[measure]:.1e} (allowed {found[allowed]:.0e})"
        for measure, allowed, words in measures
        if measure in found and not found[measure] <= found[allowed]
    )


def to_image(pixels: np.ndarray) -> np.ndarray:
    """Pixels 'h w c' as PIL takes them."""
    return pixels.astype(np.uint8) if pixels.shape[2] > 1 else pixels[:, :, 0].astype(np.uint8)
