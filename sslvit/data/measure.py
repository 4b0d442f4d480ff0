"""Properties of a shard's images: channels, sizes, modes and channel statistics."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.data.decode import check_whole, decode_pixels
from sslvit.data.header import MODES, BadImage, Content, Header, part_read, read_header
from sslvit.data.plan import evenly_spaced
from sslvit.settings.data import MAX_PIXELS

STATISTICS_SAMPLES = 10_000  # channel mean and std are measured on about this many images
ROWS_OF_PIXELS = 2**20  # pixels of an image that are converted to floats at a time


@dataclass
class Measured:
    """Properties of images, added up.

    `moments` holds two sums over `images` images of `channels` channels: of each channel's mean and of its mean square.
    The counters hold the number of images by (height, width), by mode, by (channels, bits), and by what is left out
    when they are read.
    """

    moments: list[list[float]] = field(default_factory=list)
    channels: int = 0
    images: int = 0
    sizes: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    parts: Counter = field(default_factory=Counter)

    def count(self, header: Header) -> None:
        """Count size, mode and kind of one image."""
        self.sizes[header.height, header.width] += 1
        self.modes[header.mode] += 1
        self.kinds[header.channels, header.bits] += 1

    def measure(self, content: Content, header: Header) -> None:
        """Add the moments of one image; one of other channels is skipped, but beside RGB images alpha is left out."""
        is_gray_or_rgb = header.mode != "array" and header.channels < 4
        channels = 3 if is_gray_or_rgb else header.channels  # gray images count as RGB
        if not self._takes(channels):
            return
        moments = moments_of(decode_pixels(content, channels, header.bits, header=header))
        self.add(Measured(moments.tolist(), channels, images=1))

    def add(self, other: Measured) -> None:
        """Add the properties of other images."""
        for name in ("sizes", "modes", "kinds", "parts"):
            getattr(self, name).update(getattr(other, name))
        if other.images and self._takes(other.channels):
            if self.images:
                self.channels = min(self.channels, other.channels)
                first, second = (np.array(one.moments)[:, : self.channels] for one in (self, other))
                self.moments = (first + second).tolist()
            else:
                self.moments, self.channels = other.moments, other.channels
            self.images += other.images

    def _takes(self, channels: int) -> bool:
        """Whether moments of this many channels can be added."""
        return not self.images or channels == self.channels or {channels, self.channels} == {3, 4}

    def describe(self, location: str) -> dict[str, Any]:
        """The fields of the index that depend on the images.

        Raises:
            ValueError: no image could be decoded.
        """
        if not self.images:
            raise ValueError(f"{location}: none of the images can be decoded.")
        kinds = {channels for channels, _ in self.kinds}
        only = next(iter(kinds)) if len(kinds) == 1 else 0
        channels = only or (3 if kinds <= set(MODES) and self.channels >= 3 else self.channels)
        mean, square = np.array(self.moments)[:, :channels] / self.images
        bits = 16 if {bits for _, bits in self.kinds} == {16} else 8
        decimals = 4 if bits == 8 else 7  # dim images of 16 bits use few of their values, 0.00002 apart
        return {
            "channels": channels,
            "bits": bits,
            "mean": mean.round(decimals).tolist(),
            "std": np.sqrt((square - mean**2).clip(min=0)).round(decimals).tolist(),
            "image_size": list(next(iter(self.sizes))) if len(self.sizes) == 1 else None,
        }


def moments_of(pixels: np.ndarray) -> np.ndarray:
    """Mean and mean square of each channel of an image 'h w c', for pixels in [0, 1]; computed in chunks of rows."""
    height, width, channels = pixels.shape
    sums = np.zeros((2, channels))
    for start in range(0, height, max(1, ROWS_OF_PIXELS // width)):
        rows = pixels[start : start + max(1, ROWS_OF_PIXELS // width)].reshape(-1, channels) / np.float64(255)
        sums += np.stack([rows.sum(0, dtype=np.float64), np.square(rows).sum(0, dtype=np.float64)])
    return sums / (height * width)  # every image has the same weight, whatever its size


def measure_shard(
    path: Path,
    records: np.ndarray,
    shards: int,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    is_checked: bool = False,
    done: Callable[[], None] = lambda: None,
) -> tuple[Measured, dict[int, str]]:
    """Measure sizes and modes of a shard's images, and moments on a sample of them; also returns unreadable rows.

    The sample is this shard's part of STATISTICS_SAMPLES, given the number of `shards`. With `is_checked`, the images
    are known to be intact. `done` is called after each image.
    """
    measured, unreadable = Measured(), {}
    count = min(len(records), max(50, STATISTICS_SAMPLES // shards))
    sampled = set(evenly_spaced(len(records), count).tolist())
    with open(path, "rb") as file:
        for row, record in enumerate(records):
            content = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
            try:
                header = read_header(content, max_pixels, upright)
                if not is_checked:
                    check_whole(content, header)
                if row in sampled:
                    measured.measure(content, header)
                measured.count(header)
                if part := part_read(content, header):
                    measured.parts[part] += 1
            except BadImage as error:
                unreadable[row] = str(error)
            done()
    return measured, unreadable
