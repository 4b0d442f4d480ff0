"""Damaged images, in every format that is read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from mutations import damage_bytes
from PIL import Image
from shard_fixtures import encoded, photograph
from targets import Payload, Reader, Target, npy

from sslvit.data.decode import decode
from sslvit.data.header import read_header
from sslvit.data.store import PackSettings, store


def images(kind: str) -> Target:
    def open_images(folder: Path) -> Reader:
        samples = IMAGES[kind]()

        def damaged(rng: random.Random) -> Payload:
            content = damage_bytes(rng.choice(samples), rng)
            return (
                content,
                rng.choice((1, 3, 3, 4)),
                rng.choice((8, 8, 16)),
                rng.choice((1, 1, 2, 8)),
                rng.random() < 0.2,
            )

        return Reader(read_image, damaged, lambda: (samples[0], 3, 8, 1, True))

    return Target(f"{kind} images", open_images)


def read_image(content: bytes, channels: int, bits: int, reduction: int, is_stored: bool) -> None:
    header = read_header(content)
    decode(content, channels, bits, reduction, header=header)
    if is_stored:
        store(content, ".png", PackSettings(resize=8))


def jpegs() -> list[bytes]:
    photo = photograph(40, 56)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(photo, "JPEG"), encoded(photo, "JPEG", progressive=True), encoded(photo.convert("L"), "JPEG"),
        encoded(photo.convert("CMYK"), "JPEG"), encoded(photo, "JPEG", exif=exif, subsampling=0),
    ]  # fmt: skip


def pngs() -> list[bytes]:
    photo = photograph(24, 30)
    deep = Image.fromarray(np.arange(24 * 30, dtype=np.uint16).reshape(24, 30) * 91)
    moves = [photograph(24, 30, seed) for seed in (1, 2)]
    kinds = [photo, photo.convert("P"), photo.convert("L"), photo.convert("1"), photo.convert("RGBA"), deep]
    return [*(encoded(image, "PNG") for image in kinds), encoded(photo, "PNG", save_all=True, append_images=moves)]


def gifs() -> list[bytes]:
    moves = [photograph(20, 24, seed).convert("P") for seed in (1, 2)]
    return [encoded(moves[0], "GIF"), encoded(moves[0], "GIF", save_all=True, append_images=moves[1:], transparency=3)]


def tiffs() -> list[bytes]:
    photo = photograph(24, 30)
    deep = Image.fromarray(np.arange(24 * 30, dtype=np.uint16).reshape(24, 30) * 91)
    packed = [
        encoded(photo, "TIFF", compression=name) for name in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")
    ]
    return [*packed, encoded(deep, "TIFF"), encoded(photo, "TIFF", save_all=True, append_images=[photo]),
            encoded(photo.convert("1"), "TIFF", compression="group4")]  # fmt: skip


def webps() -> list[bytes]:
    photo, other = photograph(24, 30), photograph(24, 30, 1)
    return [encoded(photo, "WEBP"), encoded(photo, "WEBP", lossless=True), encoded(photo.convert("RGBA"), "WEBP"),
            encoded(photo, "WEBP", save_all=True, append_images=[other])]  # fmt: skip


def plain_images() -> list[bytes]:
    photo = photograph(20, 24)
    return [encoded(photo, "BMP"), encoded(photo.convert("P"), "BMP"), encoded(photo, "PPM"),
            encoded(photo.convert("L"), "PPM")]  # fmt: skip


def arrays() -> list[bytes]:
    shapes = [((12, 14, 3), np.uint8), ((12, 14), np.uint8), ((12, 14, 4), np.uint16), ((12, 14, 1), np.uint8)]
    return [npy(np.ones(shape, kind)) for shape, kind in shapes]


IMAGES = {
    "JPEG": jpegs, "PNG": pngs, "GIF": gifs, "TIFF": tiffs, "WebP": webps, "BMP and PPM": plain_images, "array": arrays,
}  # fmt: skip

TARGETS = {kind.split()[0].lower(): images(kind) for kind in IMAGES}
