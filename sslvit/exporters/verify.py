"""Compare reopened exports with the original encoder."""

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

TOLERANCE = 1e-5  # relative to the largest output, or to 1 for smaller tokens and features; float32 on both sides
RESIZE_TOLERANCE = 0.005  # mean, relative to a channel's std: libraries round differently when they resize
ROUNDING = 0.28  # mean, in levels of 255, which matters for small stds: pixels are rounded once or twice


def check_inputs(settings: EncoderSettings, is_fixed: bool) -> list[Tensor]:
    """Fixed images of the encoder's size, in two batches, and of another size if the export supports it."""
    source = torch.Generator().manual_seed(0)
    height, width = settings.size
    shapes = [(2, height, width), (3, height, width)]
    if not is_fixed:
        shapes.append((1, height + settings.patch, width + 2 * settings.patch))
    return [torch.randn(batch, settings.channels, *sides, generator=source, device="cpu") for batch, *sides in shapes]


@torch.no_grad()
def compare(exported: Exported, reopened: Reopened, images: list[Tensor]) -> dict[str, Any]:
    """The largest difference between both outputs on the same images, and whether it is small enough.

    Raises:
        ValueError: The outputs have different shapes.
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
    """Whether weights are equal: outputs do not reveal a change in a block with a very small LayerScale."""
    differing = sorted(expected.keys() ^ found.keys())
    for key in sorted(expected.keys() & found.keys()):
        one, other = expected[key].detach().cpu(), found[key].detach().cpu()
        if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
            differing.append(key)
    return {"compared": len(expected), "differing": differing, "passed": not differing}


@torch.no_grad()
def with_unit_scale(exported: Exported) -> Exported:
    """A copy with every LayerScale set to one."""
    rescaled = copy.deepcopy(exported)
    for key, value in rescaled.named_parameters():
        if key.endswith(".gamma"):
            value.fill_(1.0)
    return rescaled


def compare_preprocessing(exported: Exported, prepare: Callable[[Image.Image], Tensor]) -> dict[str, Any]:
    """Compare a library's preprocessing with ours, for an image that is only cropped and one that is also resized.

    The first must agree; for the second, which every library rounds differently, the mean difference must be small.
    Libraries resize to whole pixels before they crop, so the comparison uses a crop fraction that they can represent.
    Both images have sizes for which the crop begins at a whole pixel of the resized image, as libraries would shift
    other crops by half a pixel.
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
    noise = source.uniform(-30, 30, (*down.shape, settings.channels))  # distinguishes bilinear from bicubic
    large = Image.fromarray(to_image(np.stack(waves, 2) + noise))
    found = {"largest_difference": 0.0, "mean_difference": 0.0}
    for image, measure in ((exact, "largest_difference"), (large, "mean_difference")):
        expected = preprocess(image, settings)[0]
        if settings.tokens == "pixel":  # compare palette colors
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
        found["mean_tolerance"] = math.inf  # a small difference may change the nearest color
    return found | {"passed": shortfall(found) == ""}


def shortfall(found: dict[str, Any]) -> str:
    """The failed measures of a comparison, with differences and tolerances; empty if it passes."""
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
    """Pixels 'h w c' in the form that PIL expects."""
    return pixels.astype(np.uint8) if pixels.shape[2] > 1 else pixels[:, :, 0].astype(np.uint8)
