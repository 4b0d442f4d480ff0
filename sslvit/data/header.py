"""Supported image formats, and what is known of a file before it is decoded: size, channels, damage."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import IO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLESPERPIXEL,
    TiffImageFile,
)

from sslvit.data.orientation import START_OF_SCAN, exif_orientation, inverse_orientation, jpeg_segments, swaps_sides
from sslvit.files import printable
from sslvit.settings.data import MAX_PIXELS

try:  # decodes JPEGs 1.4 times as fast as PIL, to the same pixels
    import simplejpeg
except ImportError:
    simplejpeg = None

SUSPICIOUS_PIXELS = 1_000_000  # above this size, a file of very few bytes counts as damaged
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")  # of a JPEG's segments, which tell their length
SCAN, END = b"\xda", b"\xd9"  # markers
MAX_SCANS = 100  # in a progressive JPEG with its thumbnails; encoders write about ten
MAX_AXIS_OF_CHANNELS = 4  # an axis up to this length, with the others longer, is the channel axis
MAX_PIXELS_PER_BYTE = 2000  # deflate reaches at most 1032 values per byte
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # other numbers of channels are stored as arrays
HAS_AVIF = find_spec("PIL._avif") is not None
HAS_HEIF = find_spec("pillow_heif") is not None
HAS_TIFFFILE = find_spec("tifffile") is not None
FORMATS = (  # PIL starts external programs for others, such as EPS
    "JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", *(["AVIF"] if HAS_AVIF else []),
)  # fmt: skip
MAX_REASON = 250  # characters
NPY = b"\x93NUMPY"
Content = bytes | Image.Image | np.ndarray  # bytes of a file, or a decoded image: PIL, or 'h w c' of 8 or 16 bits
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEIF = re.compile(rb".{4}ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", re.DOTALL)
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy",
    *([".avif"] if HAS_AVIF else []), *([".heic", ".heif"] if HAS_HEIF else []),
}  # fmt: skip
EXTRAS = {  # file ending -> what to install to read it
    ".avif": "a Pillow that was built with AVIF", ".heic": "pip install 'sslvit[heif]'",
    ".heif": "pip install 'sslvit[heif]'",
}  # fmt: skip

# BadImage reports what is wrong with an image; warnings of PIL and tifffile would only repeat it
warnings.filterwarnings("ignore", module="PIL")
for name in ("tifffile", "PIL.TiffImagePlugin"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, always one short printable line."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, MAX_REASON))


@dataclass
class Header:
    """Properties of an image that are known before its pixels are decoded.

    Height and width are those after rotation by `orientation` (the EXIF value, 1 for upright). The mode is PIL's name
    (RGB, L, I;16, CMYK ...), or "array".
    """

    height: int
    width: int
    mode: str
    channels: int
    bits: int = 8
    is_jpeg: bool = False
    orientation: int = 1

    def turned(self, orientation: int) -> Header:
        """Set the orientation, swapping height and width if needed; returns self."""
        if swaps_sides(orientation):
            self.height, self.width = self.width, self.height
        self.orientation = orientation
        return self

    @property
    def stored_sides(self) -> tuple[int, int]:
        """Height and width of the pixels in the file."""
        return (self.width, self.height) if swaps_sides(self.orientation) else (self.height, self.width)


def read_header(content: Content, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Header:
    """Read size and type of an image.

    Args:
        content: Bytes of the file, or a decoded image.
        max_pixels: Number of pixels of the largest image that is accepted.
        upright: Rotate it by its EXIF orientation; otherwise its pixels stay as stored.

    Raises:
        BadImage: the image is empty, damaged, of an unknown format or too large.
    """
    if not isinstance(content, bytes):
        return _check_pixels(_decoded_header(content, upright), max_pixels)
    if not content:
        raise BadImage("zero bytes")
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS:
        scans = _jpeg_scans(content)  # other data may follow the image, such as a phone's video
        if scans > MAX_SCANS:
            raise BadImage(f"damaged image (a JPEG of {scans} scans, each of which takes as long as the image)")
    header = None
    if content.startswith(NPY):
        header = _array_header(content)
    elif simplejpeg is not None and content.startswith(b"\xff\xd8"):
        header = _jpeg_header(content)
        if header is not None and upright:
            header.turned(exif_orientation(content))
    header = _check_pixels(header or _pil_header(content, max_pixels, upright), max_pixels)
    pixels = header.height * header.width
    if pixels > SUSPICIOUS_PIXELS and pixels > MAX_PIXELS_PER_BYTE * len(content):
        raise BadImage(f"damaged image ({header.width} x {header.height} pixels in {len(content)} bytes)")
    return header


def _jpeg_scans(content: bytes) -> int:
    """Number of scans of a JPEG, from its markers up to the end of the image."""
    scans, position = 0, 2
    while found := MARKER.search(content, position):
        marker, position = found[1], found.end()
        if marker == END:
            break
        scans += marker == SCAN
        position += int.from_bytes(content[position : position + 2], "big")
    return scans


def _check_pixels(header: Header, max_pixels: int) -> Header:
    """Return the header; raises BadImage if the image is too large."""
    if header.height * header.width > max_pixels:
        raise BadImage(f"{header.width} x {header.height} pixels, more than {max_pixels} (data.max_pixels)")
    return header


def suffix_of(content: bytes) -> str:
    """The usual suffix of an image file, from its first bytes; .png if they are unknown."""
    starts = {
        b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp", NPY: ".npy",
        **dict.fromkeys(TIFFS, ".tif"),
    }  # fmt: skip
    if HEIF.match(content[:12]):
        return ".heic"
    return next((suffix for start, suffix in starts.items() if content.startswith(start)), ".png")


def has_end_marker(content: bytes) -> bool:
    """Whether the file contains the end marker of its format; False for formats without one."""
    if content.startswith(b"\xff\xd8"):
        scans = [start for marker, start, _ in jpeg_segments(content) if marker == START_OF_SCAN]
        return bool(scans) and content.rfind(b"\xff\xd9") > scans[0]  # a thumbnail in a segment has its own end marker
    if content.startswith(b"\x89PNG"):
        return b"IEND" in content[-64:]
    if content.startswith(b"RIFF"):
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    if content.startswith(b"GIF8"):
        return content.rstrip(b"\0").endswith(b";")
    return content.startswith(NPY)  # its length was checked with the header


def open_image(content: bytes) -> Image.Image:
    """Open an image with PIL, in formats for which PIL starts no external programs."""
    if HAS_HEIF and HEIF.match(content[:12]):
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(content), formats=("HEIF",))
    return Image.open(io.BytesIO(content), formats=FORMATS)


def part_read(content: bytes, header: Header) -> str:
    """A sentence on what is left out when a file is read; empty if nothing is."""
    if header.is_jpeg or content.startswith(NPY):
        return ""
    try:
        image = open_image(content)
        coding = str([tile.args for tile in getattr(image, "tile", [])])
        # PIL's raw modes of 16 bits are called RGB;16B and so on; PPM states its largest value
        is_deep = ";16" in coding or (image.format == "PPM" and re.search(r"\d{4}", coding))
        image.seek(1)
    except EOFError:  # there is no second page
        return "only 8 of 16 bits of their colors are read (store all as .npy)" if is_deep and header.bits == 8 else ""
    except Exception:  # PIL raises whatever its format plugins raise
        return ""
    return "only the first of their pages or frames is read"


def _pil_header(content: bytes, max_pixels: int, upright: bool) -> Header:
    try:
        return _parse_header(open_image(content), content, max_pixels, upright)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise BadImage(
            f"{pixels[0] if pixels else 'too many'} pixels, more than {max_pixels} (data.max_pixels)"
        ) from error
    except Exception as error:  # PIL raises whatever its format plugins raise
        if content.startswith(TIFFS):
            return _tiff_header(content, upright)
        raise BadImage(f"not an image ({type(error).__name__})") from error


def _parse_header(image: Image.Image, content: bytes, max_pixels: int, upright: bool) -> Header:
    if isinstance(image, TiffImageFile) and _misread_by_pil(image):
        return _tiff_header(content, upright)
    header = _picture_header(image)
    header.is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if isinstance(image, TiffImageFile):
        tile = int(image.tag_v2.get(322, 1)) * int(image.tag_v2.get(323, 1))
        if tile > max_pixels:
            raise BadImage(f"damaged image (a tile of {tile} pixels)")
        # PIL already rotates TIFFs
        return header if upright else header.turned(inverse_orientation(image.tag_v2.get(274, 1)))
    if not upright:
        return header
    # PIL would decode a PNG to find an EXIF chunk behind its pixels
    is_known = content.startswith((b"\xff\xd8", b"\x89PNG"))
    orientation = exif_orientation(content) if is_known else image.getexif().get(274, 1)
    return header.turned(orientation if orientation in range(1, 9) else 1)


def _picture_header(image: Image.Image) -> Header:
    """Header of a PIL image, before rotation."""
    if image.mode == "F":
        raise BadImage("an image of floating-point numbers, which have no agreed range; store 8 or 16 bits")
    is_16_bit = image.mode.startswith("I")
    channels = 1 if is_16_bit or image.mode in ("1", "L") else 4 if image.mode in ("RGBA", "LA", "PA") else 3
    return Header(image.height, image.width, image.mode, channels, 16 if is_16_bit else 8)


def _decoded_header(image: Image.Image | np.ndarray, upright: bool) -> Header:
    """Header of a decoded image."""
    if isinstance(image, np.ndarray):
        height, width, channels = image.shape
        return Header(height, width, "array", channels, 8 * image.dtype.itemsize)
    header, orientation = _picture_header(image), image.getexif().get(274, 1) if upright else 1
    return header.turned(orientation if orientation in range(1, 9) else 1)


def _misread_by_pil(image: TiffImageFile) -> bool:
    """Whether PIL opens a TIFF of gray or RGB pixels, but leaves channels out or mixes them up.

    It reads the first of five and more planes, drops samples that are not declared as alpha (the near infrared of
    aerial images, the second stain of a microscope), and mixes up separate planes of 16 bits.
    """
    tags = image.tag_v2
    samples, bits, extra = tags.get(SAMPLESPERPIXEL, 1), tags.get(BITSPERSAMPLE, (1,)), tags.get(EXTRASAMPLES, ())
    is_gray_or_rgb = tags.get(PHOTOMETRIC_INTERPRETATION) in (0, 1, 2)
    is_deep_planes = samples > 1 and max(bits) > 8 and tags.get(PLANAR_CONFIGURATION) == 2
    is_undeclared = 0 in extra
    return samples > 4 or (is_gray_or_rgb and (is_undeclared or is_deep_planes))


def _tiff_header(content: bytes, upright: bool) -> Header:
    """Header of a TIFF that PIL cannot open or misreads, such as one of five or more channels."""
    array = read_tiff(content, shape_only=True)
    header = Header(array.shape[0], array.shape[1], "array", array.shape[2], 8 * array.dtype.itemsize)
    return header.turned(exif_orientation(content)) if upright else header


def read_tiff(content: bytes, shape_only: bool = False) -> np.ndarray:
    """Read a TIFF of any number of channels as 'h w c'; with `shape_only`, zeros of its shape and dtype."""
    if not HAS_TIFFFILE:
        raise BadImage("a TIFF that needs tifffile, as two, five and more channels do (pip install 'sslvit[tiff]')")
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages[0]
            shape, axes, dtype = page.shape, page.axes, np.dtype(page.dtype)
            if axes not in ("YXS", "SYX") or dtype not in (np.uint8, np.uint16) or 0 in shape:
                raise BadImage(
                    f"a TIFF of {dtype} and axes {axes} {shape}; images are 8 or 16 bits, channels in one page"
                )
            if math.prod(shape) > MAX_PIXELS * 4:
                raise BadImage(f"a TIFF of shape {shape}, more than {MAX_PIXELS} pixels")
            pixels = np.broadcast_to(np.zeros((), dtype), shape) if shape_only else page.asarray()
    except BadImage:
        raise
    except Exception as error:  # tifffile raises almost anything for damaged bytes
        if "imagecodecs" in str(error):
            raise BadImage("a TIFF whose compression needs imagecodecs (pip install imagecodecs)") from error
        raise BadImage(f"damaged image ({error})") from error
    return np.moveaxis(pixels, 0, 2) if axes == "SYX" else pixels


def _jpeg_header(content: bytes) -> Header | None:
    """Read the header with simplejpeg; None to leave it to PIL: a damaged header, or other color spaces."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colors not in ("YCbCr", "Gray"):
        return None
    return Header(height, width, *(("L", 1) if colors == "Gray" else ("RGB", 3)), is_jpeg=True)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether the shape of an image with three axes looks like 'c h w'."""
    return shape[0] <= MAX_AXIS_OF_CHANNELS < min(shape[1:])


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of an .npy file; leaves the file at the first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _array_header(content: bytes) -> Header:
    file = io.BytesIO(content)
    try:
        shape, dtype = read_npy_header(file)
    except Exception as error:
        raise BadImage(f"damaged array ({error})") from error
    if dtype not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"an array of {dtype} and shape {shape}; images are uint8 or uint16, 'h w' or 'h w c'")
    if len(shape) == 3 and is_channels_first(shape):
        raise BadImage(f"an array of shape {shape}: images are 'h w c', and this looks like 'c h w'")
    if math.prod(shape) * dtype.itemsize > len(content) - file.tell():
        raise BadImage(f"an array that ends early ({len(content)} bytes for the shape {shape})")
    return Header(shape[0], shape[1], "array", shape[2] if len(shape) == 3 else 1, 8 * dtype.itemsize)
