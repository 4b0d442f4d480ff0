"""Store images in a shard (unchanged, resized or re-encoded), and write the tar file."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from sslvit.data.decode import check_whole
from sslvit.data.header import IMAGE_SUFFIXES, MODES, BadImage, open_image, read_header, suffix_of
from sslvit.settings.pack import PackSettings

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBER_NAME = 100  # bytes of a name in a plain tar header
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
# format in which a changed image is saved by default; MPO is a JPEG followed by a second picture
FORMAT_OF_SOURCE = {"JPEG": "JPEG", "MPO": "JPEG", "HEIF": "JPEG", "AVIF": "JPEG", "PNG": "PNG", "WEBP": "WEBP"}
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def store(content: bytes, suffix: str, settings: PackSettings) -> tuple[bytes, str]:
    """The bytes to store in a shard, and their suffix, which is found from the bytes unless it is an image's.

    Raises:
        BadImage: the image is unreadable, truncated or, with settings.decode, damaged.
    """
    header = read_header(content, settings.max_pixels, settings.orientation == "upright")
    check_whole(content, header, settings.decode)
    shorter, limit = min(header.height, header.width), settings.resize
    scale = limit / shorter if limit is not None and shorter > limit else None
    if (settings.encode == "keep" and scale is None) or header.mode == "array":
        return content, suffix if suffix in IMAGE_SUFFIXES else suffix_of(content)
    try:
        image = open_image(content)
        # before transpose(), which drops image.format
        format_ = FORMATS.get(settings.encode) or FORMAT_OF_SOURCE.get(image.format or "", "PNG")
        if header.bits == 16:
            image = Image.fromarray(np.asarray(image).astype(np.float32))  # PIL cannot resize 16-bit images
        elif image.mode not in ("RGB", "L", "RGBA") or (format_ != "PNG" and image.mode == "RGBA"):
            image = image.convert(
                "RGBA" if header.channels == 4 and format_ == "PNG" else MODES[min(header.channels, 3)]
            )
        if header.orientation in TRANSPOSE:
            image = image.transpose(TRANSPOSE[header.orientation])
        if scale is not None:
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        if header.bits == 16:
            wide = np.asarray(image).round().clip(0, 65535).astype(np.uint16)
            image = Image.fromarray(wide if format_ == "PNG" else (wide >> 8).astype(np.uint8))
        buffer = io.BytesIO()
        image.info.pop("exif", None)  # its orientation would rotate the image again
        image.save(buffer, format_, **({} if format_ == "PNG" else {"quality": settings.quality}))
    except Exception as error:  # PIL raises whatever its format plugins raise
        raise BadImage(f"damaged image ({error})") from error
    return buffer.getvalue(), f".{next(name for name, value in FORMATS.items() if value == format_)}"


class TarWriter:
    """Writes a plain tar file and computes its checksum; syncs the file to disk when it closes.

    The headers equal tarfile's default USTAR headers, and are made 20 times as fast.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 closed in __exit__
        self.digest = hashlib.sha256()
        self.offset = 0

    def add(self, name: str, content: bytes) -> int:
        """Write a member; returns the offset of its content."""
        self._write(tar_header(name, len(content)))
        start = self.offset
        self._write(content + bytes(-len(content) % BLOCK))
        return start

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            end = 2 * BLOCK
            self._write(bytes(end + -(self.offset + end) % tarfile.RECORDSIZE))
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()


_PLAIN_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # no owner, no time, mode 644


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file: a header from tarfile, with name, size and checksum filled in."""
    header, encoded = bytearray(_PLAIN_HEADER), name.encode()
    assert len(encoded) <= MAX_MEMBER_NAME, name
    header[: len(encoded)] = encoded
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
