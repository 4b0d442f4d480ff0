"""Small data sets whose pixels say which image they are."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sslvit.data.array_images import array_samples
from sslvit.data.decode import decode
from sslvit.data.header import BadImage
from sslvit.data.pack import pack
from sslvit.data.reader import ShardReader
from sslvit.data.store import PackSettings


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    """PNG images in class folders; every pixel is (class, number, 0)."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.zeros((6, 8, 3), np.uint8)
            pixels[:] = (label, i, 0)
            Image.fromarray(pixels).save(root / name / f"im.{i:03d}.png")
    return root


def numbered_shards(folder: Path, count: int, shard_mb: float = 256, side: int = 8, first: int = 0):
    """Gray images, each pixel its number, in shards of about the given size; labels by number modulo 2."""
    images = np.repeat(np.arange(first, first + count, dtype=np.uint8), side * side).reshape(count, side, side)
    samples = array_samples(images, np.arange(count) % 2)
    for sample in samples:
        sample.bytes = len(sample.read())
    return pack(samples, folder, ["even", "odd"], PackSettings(shard_mb=shard_mb), workers=1)


def labeled_shards(folder: Path) -> Path:
    """Gray 8 x 8 images of three classes that differ in brightness: 30 in train/, 21 in val/."""
    source = np.random.default_rng(0)
    for name, count in (("train", 30), ("val", 21)):
        labels = np.arange(count) % 3
        images = source.integers(0, 90, (count, 8, 8)) + labels[:, None, None] * 80
        pack(array_samples(images.astype(np.uint8), labels), folder / name, ["a", "b", "c"])
    return folder


def numbers_of(index) -> list[int]:
    """The number in the pixels of each sample, in the index's order; -1 for one that cannot be read."""
    reader, numbers = ShardReader(index, 1, memory_limit_mb=0), []
    for sample in range(len(index)):
        try:
            numbers.append(int(decode(reader.read(sample), 1)[0, 0, 0]))
        except BadImage:
            numbers.append(-1)
    return numbers


def contents(index) -> dict[tuple[int, int], int]:
    """(class, number) in the pixels of image_folder's images -> label in the index, read by offset."""
    reader = ShardReader(index, memory_limit_mb=0)
    images = [decode(reader.read(sample)) for sample in range(len(index))]
    labels = index.labels_of(slice(None))
    return {tuple(int(v) for v in image[:2, 0, 0]): int(label) for image, label in zip(images, labels, strict=True)}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colors with some detail, as JPEG likes them."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)).resize((width, height), 3)
    noise = rng.normal(0, 4, (height, width, 1))
    return Image.fromarray((np.asarray(rough) + noise).clip(0, 255).astype(np.uint8))


def two_classes(folder: Path, **counts: int) -> Path:
    """Labeled shards of 8 x 8 noise below `folder`, by name; the second class is a little brighter."""
    source = np.random.default_rng(0)
    for name, count in counts.items():
        labels = source.integers(0, 2, count)
        images = source.integers(0, 200, (count, 8, 8, 3)) + labels[:, None, None, None] * 20
        pack(array_samples(images.astype(np.uint8), labels), folder / name, ["dark", "light"])
    return folder


def overwrite(index, contents: dict[int, bytes | None]) -> dict[int, bytes]:
    """Put other bytes in the place of some images by number, or zeros for None; gives what was there."""
    before = {}
    for sample, content in contents.items():
        shard, offset, size = index.locate(sample)
        with open(index.shard_path(shard), "r+b") as file:
            file.seek(offset)
            before[sample] = file.read(size)
            file.seek(offset)
            file.write(content or bytes(size))
    return before


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def png(value: int) -> bytes:
    return encoded(Image.new("L", (4, 4), value), "PNG")


def smooth_images(count: int = 6, height: int = 40, width: int = 56) -> torch.Tensor:
    rough = torch.rand(count, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(rough, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)
