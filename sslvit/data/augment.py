"""RandAugment (Cubuk et al. 2020) in timm's form, which MAE's fine-tuning uses (rand-m9-mstd0.5-inc1).

Each image gets a few operations, sampled with replacement, and each of them is applied with some probability. The
magnitude is sampled from a normal distribution and clipped to 0..10; a larger magnitude means a stronger operation,
except for operations without a strength. Translations, rotations, shears and enhancements have a random sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sslvit import rng
from sslvit.settings.views import MAX_MAGNITUDE, AugmentSettings

UNIFORMS = 5  # uniform random numbers per operation
SHIFT_BELOW = 128  # solarize_add leaves values from here on unchanged
Fill = int | tuple[int, ...]


def _rotate(image: Image.Image, strength: float, sign: int, fill: Fill, resample: Image.Resampling) -> Image.Image:
    return image.rotate(sign * 30 * strength, resample, fillcolor=fill)


def _affine(
    image: Image.Image, strength: float, sign: int, fill: Fill, resample: Image.Resampling, *, row: int, column: int,
    limit: float,
) -> Image.Image:  # fmt: skip
    """Shear, or translate by a fraction of the side: set one coefficient of the map from output to input pixels."""
    matrix = np.eye(2, 3)
    matrix[row, column] = sign * limit * strength * (image.size[row] if column == 2 else 1)  # column 2: shift
    coefficients = tuple(matrix.ravel().tolist())
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=fill)


def _enhance(enhancer: type, image: Image.Image, strength: float, sign: int, *_: object) -> Image.Image:
    """Apply a PIL enhancer with a factor above or below 1 (1 changes nothing)."""
    return enhancer(image).enhance(1 + sign * 0.9 * strength)


def _posterize(image: Image.Image, strength: float, *_: object) -> Image.Image:
    """Keep 4 bits at strength 0, 1 bit at 0.9 and none (a black image) at 1."""
    bits = 4 - int(4 * strength)
    return ImageOps.posterize(image, bits) if bits else image.point(lambda value: 0)  # PIL rejects 0 bits


def _solarize_add(image: Image.Image, strength: float, *_: object) -> Image.Image:
    added = int(110 * strength)
    return image.point(lambda value: min(value + added, 255) if value < SHIFT_BELOW else value)


OPERATIONS: dict[str, Callable[..., Image.Image]] = {  # (image, strength 0..1, sign, fill, resample) -> image
    "auto_contrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda image, strength, *_: ImageOps.solarize(image, 256 - int(256 * strength)),
    "solarize_add": _solarize_add,
    "color": partial(_enhance, ImageEnhance.Color),
    "contrast": partial(_enhance, ImageEnhance.Contrast),
    "brightness": partial(_enhance, ImageEnhance.Brightness),
    "sharpness": partial(_enhance, ImageEnhance.Sharpness),
    "shear_x": partial(_affine, row=0, column=1, limit=0.3),
    "shear_y": partial(_affine, row=1, column=0, limit=0.3),
    "translate_x": partial(_affine, row=0, column=2, limit=0.45),
    "translate_y": partial(_affine, row=1, column=2, limit=0.45),
}
NAMES = list(OPERATIONS)


def sample_operations(settings: AugmentSettings, key: tuple[int, int], samples: np.ndarray) -> np.ndarray:
    """Sample operations, 'b operations 3': index into NAMES (-1: none), strength (0 to 1) and sign.

    Args:
        settings: Number of operations and their distribution.
        key: Seed and epoch.
        samples: Sample numbers.
    """
    uniform = rng.uniform((*key, "augment"), samples, UNIFORMS * settings.operations)
    uniform = uniform.reshape(len(samples), settings.operations, UNIFORMS)
    which, happens, radius, angle, sense = uniform.transpose(2, 0, 1)
    number = np.where(happens < settings.probability, np.floor(which * len(NAMES)), -1)
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller 1958
    magnitude = np.clip(settings.magnitude + settings.magnitude_std * normal, 0, MAX_MAGNITUDE)
    return np.stack([number, magnitude / MAX_MAGNITUDE, np.where(sense < 0.5, -1, 1)], 2)


def augment_image(image: Tensor, operations: np.ndarray, fill: list[float], interpolation: str) -> Tensor:
    """Apply the operations to an image, in order.

    Args:
        image: uint8 'c h w' of 1 or 3 channels.
        operations: Result of sample_operations for one sample, 'operations 3'.
        fill: Value of each channel, from 0 to 1, for pixels from outside the image.
        interpolation: bilinear or bicubic, for rotations, shears and translations.
    """
    steps = [(NAMES[int(number)], strength, int(sign)) for number, strength, sign in operations.tolist() if number >= 0]
    if not steps:
        return image
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    color = tuple(round(255 * value) for value in fill)
    resample = Image.Resampling[interpolation.upper()]
    for name, strength, sign in steps:
        picture = OPERATIONS[name](picture, strength, sign, color if len(color) > 1 else color[0], resample)
    return torch.from_numpy(np.array(picture)).view(*pixels.shape).permute(2, 0, 1)
