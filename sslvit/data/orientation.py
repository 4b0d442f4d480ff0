"""Read the EXIF orientation of images, and rotate pixels accordingly.

Cameras store pixels in the order of the sensor and record how to rotate them (tag 0x0112, "Orientation", 1 to 8: EXIF
2.32, section 4.6.4). 1 is upright; 2 to 4 mirror or rotate by 180 degrees; 5 to 8 swap the sides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

TAG = 0x0112
MAX_TAGS = 1000  # a directory with more entries is damaged
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1  # markers of JPEG (ITU T.81, table B.1)


def swaps_sides(orientation: int) -> bool:
    """Whether an orientation swaps width and height."""
    return orientation >= 5


def inverse_orientation(orientation: int) -> int:
    """The orientation that undoes another."""
    return {6: 8, 8: 6}.get(orientation, orientation) if orientation in range(1, 9) else 1


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate pixels 'h w c' upright; returns a copy unless they already are."""
    if orientation not in range(2, 9):
        return pixels
    if swaps_sides(orientation):
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns].copy()  # also of a single row, whose negative stride torch rejects


def exif_orientation(content: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG or TIFF file; 1 if it is missing or invalid."""
    try:
        if content.startswith((b"II*\0", b"MM\0*")):
            exif = content  # EXIF is a TIFF structure
        else:
            exif = _jpeg_exif(content) if content.startswith(b"\xff\xd8") else _png_exif(content)
        orientation = _orientation_in(exif) if exif else 1
    except (struct.error, IndexError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start of content, length) for the segments of a JPEG up to its first scan."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # padding, or a marker without content
            position += 1 if marker == 0xFF else 2
            continue
        length = max(int.from_bytes(content[position + 2 : position + 4]), 2)
        yield marker, position + 4, length - 2
        if marker in (START_OF_SCAN, END_OF_IMAGE):
            return
        position += 2 + length


def _jpeg_exif(content: bytes) -> bytes:
    """The TIFF structure in the APP1 segment of a JPEG; empty if there is none before the pixels."""
    for marker, position, length in jpeg_segments(content):
        if marker == APP1 and content[position : position + 6] == b"Exif\0\0":
            return content[position + 6 : position + length]
    return b""


def _png_exif(content: bytes) -> bytes:
    """The content of the eXIf chunk of a PNG, at any position; empty if there is none."""
    position = 8
    while position + 8 <= len(content):
        length, kind = int.from_bytes(content[position : position + 4]), content[position + 4 : position + 8]
        if kind == b"eXIf":
            return content[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0")
        position += 12 + length
    return b""


def _orientation_in(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (tags,) = struct.unpack_from(f"{order}H", tiff, start)
    for number in range(min(tags, MAX_TAGS)):
        tag, kind, _ = struct.unpack_from(f"{order}HHI", tiff, start + 2 + 12 * number)
        if tag == TAG:
            value = order + {3: "H", 4: "I", 1: "B"}.get(kind, "H")
            return struct.unpack_from(value, tiff, start + 10 + 12 * number)[0]
    return 1
