"""Decode images, at the resolution that their views need.

Pixels are uint8, or float32 in the same units (0 to 255) for data sets of 16-bit images, which lose no precision.
Images are rotated upright by their EXIF orientation, unless the index asks for the pixels as stored.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvit.data.header import (
    MODES,
    NPY,
    BadImage,
    Content,
    Header,
    has_end_marker,
    open_image,
    read_header,
    read_tiff,
    simplejpeg,
)
from sslvit.data.orientation import turn

MAX_UINT16 = 65_535  # largest value of a 16-bit pixel
REDUCTIONS = (8, 4, 2)  # factors by which a JPEG can be shrunk while it is decoded


class Scratch:
    """A buffer that is reused for decoded images; allocating one per image takes a seventh of the decoding time."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def buffer(self, size: int) -> np.ndarray:
        """Return a buffer of at least `size` bytes."""
        if len(self.memory) < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


def check_whole(content: bytes, header: Header, fully: bool = False) -> None:
    """Raise BadImage for an image with a valid header but damaged pixels.

    A file with an end marker counts as whole, which is fast to check. It is decoded if `fully` is set or the end marker
    is missing.
    """
    if fully or not has_end_marker(content):
        decode_pixels(content, header.channels, header.bits, header=header)


def decode(
    content: Content,
    channels: int = 3,
    bits: int = 8,
    reduction: int = 1,
    header: Header | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Call decode_pixels; returns a tensor 'c h w' that is channels-last in memory."""
    return torch.from_numpy(decode_pixels(content, channels, bits, reduction, header, scratch)).permute(2, 0, 1)


def decode_pixels(
    content: Content,
    channels: int = 3,
    bits: int = 8,
    reduction: int = 1,
    header: Header | None = None,
    scratch: Scratch | None = None,
) -> np.ndarray:
    """Decode to 'h w c'; other modes (palette, CMYK, ...) are converted.

    Args:
        content: Bytes of the file, or a decoded image.
        channels: Number of channels of the result.
        bits: 8 for uint8; 16 for float32 in the same units, with the precision of 16-bit images.
        reduction: 1, 2, 4 or 8: divides the sides of a JPEG, which saves much time; other formats ignore it.
        header: Header of the file, if it is known already.
        scratch: Buffer for the result, which is then valid only until the next image; None for new memory.

    Raises:
        BadImage: not an image, a damaged one, or one whose channels cannot be converted.
    """
    header = header or read_header(content)
    try:
        pixels = turn(_pixels(content, header, channels, bits, reduction, scratch), header.orientation)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # PIL raises whatever its format plugins raise
        raise BadImage(f"damaged image ({error})") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def reduction_for(min_zoom: float, header: Header) -> int:
    """The largest reduction that leaves every view at least its own resolution.

    Args:
        min_zoom: Image pixels per view pixel of the view that magnifies most.
        header: The image's header. A rotated image is only reduced by factors that divide its sides: otherwise the
            last row and column are incomplete, and the rotation may move them to the first.
    """
    return next(
        (
            reduction for reduction in REDUCTIONS
            if min_zoom >= reduction
            and (header.orientation == 1 or header.height % reduction == header.width % reduction == 0)
        ),
        1,
    )  # fmt: skip


def _pixels(
    content: Content, header: Header, channels: int, bits: int, reduction: int, scratch: Scratch | None
) -> np.ndarray:
    if header.mode == "array":
        return _array_pixels(content, header, channels, bits)
    if channels not in MODES:
        raise BadImage(f"{header.mode} image, but {channels} channels are expected")
    if isinstance(content, bytes) and simplejpeg is not None and header.is_jpeg and bits == 8:
        pixels = _jpeg_pixels(content, header, channels, reduction, scratch)
        if pixels is not None:
            return pixels
    assert not isinstance(content, np.ndarray)  # its mode is "array"
    if isinstance(content, Image.Image):
        image = content
    else:
        image = open_image(content)
        if reduction > 1 and image.mode == "RGB":
            image.draft("RGB", (max(image.width // reduction, 1), max(image.height // reduction, 1)))
    if header.bits == 16:
        wide = as_uint16(np.asarray(image))
        pixels = wide / np.float32(257) if bits == 16 else (wide >> 8).astype(np.uint8)
        layers = [pixels] * channels if channels < 4 else [pixels, pixels, pixels, np.full_like(pixels, 255)]
        return np.stack(layers, 2)
    pixels = np.array(image.convert(MODES[channels]))
    return pixels if bits == 8 else pixels.astype(np.float32)


def as_uint16(wide: np.ndarray) -> np.ndarray:
    """Convert integers to uint16.

    Raises:
        BadImage: some values are outside 0 to 65,535.
    """
    if wide.dtype.itemsize > 2 and not 0 <= wide.min() <= wide.max() <= MAX_UINT16:
        raise BadImage(
            f"32-bit integers from {wide.min()} to {wide.max()}; images have 8 or 16 bits: scale them to 0 to "
            f"{MAX_UINT16} and store them as 16 bits"
        )
    return wide.astype(np.uint16, copy=False)


def _jpeg_pixels(
    content: bytes, header: Header, channels: int, reduction: int, scratch: Scratch | None
) -> np.ndarray | None:
    """Decode with simplejpeg; None to leave it to PIL: other channels, or a file that libjpeg rejects."""
    if channels != 3 and header.channels != channels:
        return None
    height, width = header.stored_sides
    options: dict = {} if scratch is None else {"buffer": scratch.buffer(height * width * header.channels)}
    if reduction > 1:
        options |= {"min_height": math.ceil(height / reduction), "min_width": math.ceil(width / reduction)}
    try:
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if header.channels == 1 else "RGB", min_factor=2, **options)
    except ValueError:
        return None
    return pixels if header.channels == channels else np.repeat(pixels, channels, 2)


def _array_pixels(content: Content, header: Header, channels: int, bits: int) -> np.ndarray:
    if header.channels != channels:
        raise BadImage(f"an array of {header.channels} channels, but {channels} are expected")
    assert not isinstance(content, Image.Image)
    if isinstance(content, np.ndarray):
        pixels = content
    elif content.startswith(NPY):
        pixels = np.load(io.BytesIO(content), allow_pickle=False)
    else:
        pixels = read_tiff(content)
    if header.bits == 16:
        return (pixels / np.float32(257)) if bits == 16 else (pixels >> 8).astype(np.uint8)
    return pixels if bits == 8 else pixels.astype(np.float32)
