"""Bytes -> image."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 100_000_000  # a header that promises more is a decompression bomb, not a training image
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def open_image(content: bytes) -> Image.Image:
    """The image with its header read and its pixels not yet.

    Raises:
        BadImage: empty, of unknown format, or too large.
    """
    if not content:
        raise BadImage("zero bytes")
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:
        raise BadImage(f"not an image ({type(error).__name__})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def decode(content: bytes, channels: int = 3) -> Tensor:
    """Decode to uint8 'c h w'; other modes (palette, CMYK, 16 bit, ...) are converted.

    Raises:
        BadImage: the bytes are no image, or a damaged one.
    """
    if channels not in MODES:
        raise ValueError(f"encoder.channels: images decode to 1, 3 or 4 channels, not {channels}.")
    image = open_image(content)
    try:
        if image.mode.startswith("I"):  # 16 bits: PIL would clip instead of scaling
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        pixels = np.array(image.convert(MODES[channels]))
    except Exception as error:  # PIL raises whatever its format plugins raise
        raise BadImage(f"damaged image ({error})") from error
    return torch.from_numpy(pixels).reshape(image.height, image.width, channels).permute(2, 0, 1)
