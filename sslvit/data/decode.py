"""Bytes -> image, at the resolution that its views need.

Pixels are uint8, or float32 in the same units (0 to 255) for sets of 16-bit images, which lose nothing so.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

try:  # 1.4 times as many JPEGs per second as PIL, with the same pixels
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 100_000_000  # a header that promises more is a decompression bomb, not a training image
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # other numbers of channels are stored as arrays
REDUCTIONS = (8, 4, 2)  # at which a JPEG can be decoded without computing all of its pixels
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # others, such as EPS, would start programs
NPY = b"\x93NUMPY"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy"}


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


@dataclass
class Header:
    """What an image says of itself before its pixels are computed.

    Args:
        height: in pixels.
        width: in pixels.
        mode: PIL's name (RGB, L, I;16, CMYK ...), or "array".
        channels: 1, 3 or 4, or those of an array.
        bits: 8 or 16 per channel.
        is_jpeg: it can be decoded at a reduced scale.
    """

    height: int
    width: int
    mode: str
    channels: int
    bits: int = 8
    is_jpeg: bool = False


class Scratch:
    """Memory for one decoded image after the other: fresh memory for each would take a seventh of the time."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def of(self, size: int) -> np.ndarray:
        if len(self.memory) < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


def read_header(content: bytes) -> Header:
    """Size and kind of an image.

    Raises:
        BadImage: empty, of unknown format, or too large.
    """
    if not content:
        raise BadImage("zero bytes")
    header = None
    if content.startswith(NPY):
        header = _array_header(content)
    elif simplejpeg is not None and content.startswith(b"\xff\xd8"):
        header = _jpeg_header(content)
    header = header or _pil_header(content)
    if header.height * header.width > MAX_PIXELS:
        raise BadImage(f"{header.width} x {header.height} pixels, more than {MAX_PIXELS}")
    return header


def decode(
    content: bytes,
    channels: int = 3,
    bits: int = 8,
    reduction: int = 1,
    header: Header | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """decode_pixels as a tensor 'c h w', channels last in memory."""
    return torch.from_numpy(decode_pixels(content, channels, bits, reduction, header, scratch)).permute(2, 0, 1)


def decode_pixels(
    content: bytes,
    channels: int = 3,
    bits: int = 8,
    reduction: int = 1,
    header: Header | None = None,
    scratch: Scratch | None = None,
) -> np.ndarray:
    """Decode to 'h w c'; other modes (palette, CMYK, ...) are converted.

    Args:
        content: of the file.
        channels: of the result.
        bits: 8 for uint8; 16 for float32 in the same units, with what 16-bit images know beyond them.
        reduction: 1, 2, 4 or 8: a JPEG's sides are divided by it, in much less time; others ignore it.
        header: if it was read before.
        scratch: memory for the result, which then lasts until the next image; None for memory of its own.

    Raises:
        BadImage: the bytes are no image, a damaged one, or one with other channels that cannot be converted.
    """
    header = header or read_header(content)
    try:
        pixels = _pixels(content, header, channels, bits, reduction, scratch)
    except BadImage:
        raise
    except Exception as error:  # PIL raises whatever its format plugins raise
        raise BadImage(f"damaged image ({error})") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def reduction_for(least_zoom: float) -> int:
    """The strongest reduction that leaves every view at least as many pixels as it shows.

    Args:
        least_zoom: image pixels per view pixel, of the view that magnifies most.
    """
    return next((reduction for reduction in REDUCTIONS if least_zoom >= reduction), 1)


def _pixels(
    content: bytes, header: Header, channels: int, bits: int, reduction: int, scratch: Scratch | None
) -> np.ndarray:
    if header.mode == "array":
        return _array_pixels(content, header, channels, bits)
    if channels not in MODES:
        raise BadImage(f"{header.mode} image, but {channels} channels are wanted")
    if simplejpeg is not None and header.is_jpeg and bits == 8:
        pixels = _jpeg_pixels(content, header, channels, reduction, scratch)
        if pixels is not None:
            return pixels
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if reduction > 1 and image.mode == "RGB":
        image.draft("RGB", (image.width // reduction, image.height // reduction))
    if header.bits == 16:
        deep = np.asarray(image).astype(np.float32).clip(0, 65535)
        pixels = deep / np.float32(257) if bits == 16 else (deep.astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(pixels[..., None], channels, 2) if channels < 4 else _with_alpha(pixels)
    pixels = np.array(image.convert(MODES[channels]))
    return pixels if bits == 8 else pixels.astype(np.float32)


def _with_alpha(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], 2)


def _pil_header(content: bytes) -> Header:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:
        raise BadImage(f"not an image ({type(error).__name__})") from error
    if image.mode == "F":
        raise BadImage("an image of floating-point numbers, which have no agreed range; store 8 or 16 bits")
    is_deep, is_jpeg = image.mode.startswith("I"), image.format == "JPEG" and image.mode in ("RGB", "L")
    channels = 1 if is_deep or image.mode in ("1", "L") else 4 if image.mode in ("RGBA", "LA", "PA") else 3
    return Header(image.height, image.width, image.mode, channels, 16 if is_deep else 8, is_jpeg)


def _jpeg_header(content: bytes) -> Header | None:
    """None where PIL should look: a damaged header, or colours that only PIL converts."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours not in ("YCbCr", "Gray"):
        return None
    return Header(height, width, *(("L", 1) if colours == "Gray" else ("RGB", 3)), is_jpeg=True)


def _jpeg_pixels(
    content: bytes, header: Header, channels: int, reduction: int, scratch: Scratch | None
) -> np.ndarray | None:
    """None where PIL should decide: other channels, or a file that libjpeg complains of."""
    if channels != 3 and header.channels != channels:
        return None
    options: dict = {} if scratch is None else {"buffer": scratch.of(header.height * header.width * header.channels)}
    if reduction > 1:
        options |= {
            "min_height": math.ceil(header.height / reduction),
            "min_width": math.ceil(header.width / reduction),
        }
    try:
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if header.channels == 1 else "RGB", min_factor=2, **options)
    except ValueError:
        return None
    return pixels if header.channels == channels else np.repeat(pixels, channels, 2)


def _array_header(content: bytes) -> Header:
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    except Exception as error:
        raise BadImage(f"damaged array ({error})") from error
    if kind not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"an array of {kind} and shape {shape}; images are uint8 or uint16, 'h w' or 'h w c'")
    if math.prod(shape) * kind.itemsize > len(content) - file.tell():
        raise BadImage(f"an array that ends early ({len(content)} bytes for the shape {shape})")
    return Header(shape[0], shape[1], "array", shape[2] if len(shape) == 3 else 1, 8 * kind.itemsize)


def _array_pixels(content: bytes, header: Header, channels: int, bits: int) -> np.ndarray:
    if header.channels != channels:
        raise BadImage(f"an array of {header.channels} channels, but {channels} are wanted")
    pixels = np.load(io.BytesIO(content), allow_pickle=False)
    if header.bits == 16:
        return (pixels / np.float32(257)) if bits == 16 else (pixels >> 8).astype(np.uint8)
    return pixels if bits == 8 else pixels.astype(np.float32)
