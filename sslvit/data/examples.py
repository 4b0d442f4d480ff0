"""Example images of a data set, packed or not: their sizes, and how fast one core decodes them."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from sslvit.data.decode import decode_pixels
from sslvit.data.folders import folder_source
from sslvit.data.header import BadImage, Content, read_header
from sslvit.data.loader import make_batch
from sslvit.data.mixture import Index
from sslvit.data.open import is_image_folder, open_shards
from sslvit.data.plan import evenly_spaced
from sslvit.data.reader import MemoryReader, ReadError, ShardReader
from sslvit.data.remote import ShardCache
from sslvit.data.resample import SMALL_SIDE
from sslvit.data.stream import StreamIndex
from sslvit.data.views import Views
from sslvit.files import expand_path

EXAMPLES = 32  # images to read
DECODED_SECONDS = 1.0  # maximum time for measuring the decoding speed
FILES_AT_ONCE, DECODED_AT_ONCE = 4, 128  # images per timed batch


@dataclass
class Examples:
    """Evenly spaced images of a data set.

    Args:
        location: Folder or address of the data set.
        images: Number of its images.
        classes: Number of its classes; None for images without labels.
        contents: The example images, as files or decoded; empty for remote data, which is not fetched.
    """

    location: str
    images: int
    classes: int | None
    contents: list[Content]

    @classmethod
    def of(cls, index: Index | StreamIndex, count: int = EXAMPLES) -> Examples:
        """Examples of an indexed data set."""
        classes = len(index.classes) if index.classes else None
        contents: list[Content] = []
        if not isinstance(index, StreamIndex) and not index.is_remote:
            reader = ShardReader(index, index.channels, 0)
            for sample in evenly_spaced(len(index), count):
                with suppress(BadImage, ReadError):  # a run reports unreadable images
                    contents.append(reader.read(int(sample)))
        return cls(index.location, len(index), classes, contents)

    @classmethod
    def open(cls, source: str | Path, cache: ShardCache | None = None, count: int = EXAMPLES) -> Examples:
        """Examples of any data that a user can name; a folder of images is read without packing it.

        Raises:
            FileNotFoundError: no data is given, or it does not exist.
            ValueError: there are no images, or the index is damaged.
        """
        if not is_image_folder(source):
            return cls.of(open_shards(source, cache), count)
        found = folder_source(Path(expand_path(source)))
        numbers = evenly_spaced(len(found.samples), count)
        contents: list[Content] = []
        for number in numbers:
            with suppress(OSError, BadImage):  # packing skips it by name
                contents.append(found.samples[number].read())
        return cls(str(source), len(found.samples), len(found.classes) if found.classes else None, contents)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths in pixels of the readable images."""
        sizes = []
        for content in self.contents:
            with suppress(BadImage):
                header = read_header(content)
                sizes.append((header.height, header.width))
        return sizes

    @property
    def size(self) -> tuple[int, int] | None:
        """Median height and width of the images in pixels; None if none is readable."""
        if not self.sizes:
            return None
        height, width = np.median(self.sizes, axis=0).astype(int).tolist()
        return height, width

    def fits_in_memory(self, channels: int, memory_limit_mb: int) -> bool:
        """Whether a run would decode the data set once; `reader.fits_in_memory`, estimated from the examples."""
        sizes = self.sizes
        if len(set(sizes)) != 1 or max(sizes[0]) > SMALL_SIDE or len(sizes) < len(self.contents):
            return False
        itemsize = 1 if all(read_header(content).bits == 8 for content in self.contents) else 4
        return self.images * channels * sizes[0][0] * sizes[0][1] * itemsize <= memory_limit_mb * 2**20

    def images_per_second(self, views: Views, channels: int, memory_limit_mb: int = 0) -> float | None:
        """Images that one core decodes and crops per second; None if none is readable.

        A small data set, which a run decodes only once, is decoded beforehand and cropped in large batches.
        """
        named = {number: (str(number), content) for number, content in enumerate(self.contents)}
        reader, samples = MemoryReader(named, channels), np.arange(len(named))
        batches = [samples[start : start + FILES_AT_ONCE] for start in range(0, len(samples), FILES_AT_ONCE)]
        if self.fits_in_memory(channels, memory_limit_mb):
            with suppress(BadImage):  # otherwise decode one by one and count the readable ones
                decoded = np.stack([decode_pixels(one, channels) for one in self.contents])
                reader.decoded = rearrange(torch.from_numpy(decoded), "n h w c -> n c h w").contiguous()
                batches = [np.resize(samples, DECODED_AT_ONCE)] * 8
                make_batch(reader, views, batches[0], np.zeros_like(batches[0]))  # warm-up: allocates memory
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # measure a single core
        try:
            done, start = 0, time.perf_counter()
            for batch in batches:
                done += int(make_batch(reader, views, batch, np.zeros_like(batch)).valid.sum())
                if time.perf_counter() - start > DECODED_SECONDS:
                    break
            return done / (time.perf_counter() - start) if done else None
        finally:
            torch.set_num_threads(threads)
