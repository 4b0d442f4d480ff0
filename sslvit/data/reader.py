"""Read images by sample number; small data sets are decoded once and kept in memory."""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from sslvit.data.decode import Scratch, decode_pixels
from sslvit.data.header import BadImage, Content, Header, read_header
from sslvit.data.mixture import Index
from sslvit.data.parallel import in_parallel
from sslvit.data.python_data import PythonIndex
from sslvit.data.resample import SMALL_SIDE
from sslvit.files import REMEDIES, WriteError, printable
from sslvit.settings.data import MAX_PIXELS

MAX_OPEN_SHARDS = 64  # files kept open per process
CHUNK_IMAGES = 1024  # images per piece of work when a small data set is decoded in processes
OTHER_SIZE = "pixels, the index says"  # part of the message for an image of another size
PREFETCH_THREADS = 2  # shards that a process fetches from the network in parallel


class ReadError(OSError):
    """A shard exists but cannot be read; the message gives its path, the reason and the remedy."""


class ShardReader:
    """Reads the images of a data set by sample number. Its files are closed when it is garbage-collected.

    A data set of small images of one size that fits `memory_limit_mb` is decoded once.
    """

    def __init__(
        self, index: Index, channels: int = 3, memory_limit_mb: int = 1024, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.index, self.max_pixels = index, max_pixels
        self.channels, self.bits = channels, index.bits
        self.files = _new_files(self)
        self.scratch = Scratch()
        self.unreadable_shards: dict[int, str] = {}
        self.decoded: Tensor | None = None
        self.unreadable: dict[int, str] = {}
        self.prefetcher: _Prefetcher | None = None
        if fits_in_memory(index, channels, memory_limit_mb):
            assert index.image_size is not None
            decoded = self._decode_all(index.image_size, torch.uint8 if index.bits == 8 else torch.float32)
            if isinstance(index, PythonIndex) and any(OTHER_SIZE in reason for reason in self.unreadable.values()):
                self.unreadable = {}  # only some images were known, and not all have the same size
            else:
                self.decoded = decoded

    def read(self, sample: int) -> Content:
        """Return the image's bytes, or the decoded image for a data set from Python.

        Raises:
            BadImage: the shard is missing, does not match the index, or is truncated.
            ReadError: the shard cannot be read because of a problem of this machine.
            WriteError: the shard has to be fetched, and the cache's disk is full.
        """
        if isinstance(self.index, PythonIndex):
            return self.index.read(sample)
        shard, offset, size = self.index.locate(sample)
        try:
            content = os.pread(self._open(shard), size, offset)
        except WriteError:
            raise  # the cache's disk is full, which is not the shard's fault
        except OSError:
            # Retry with new file handles. Too many files may be open, a network file system may have lost a handle, or
            # the cache may have just evicted the file.
            self.close()
            content = self._read_again(shard, offset, size)
        if len(content) < size:
            raise BadImage("truncated shard")
        return content

    def _read_again(self, shard: int, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._open(shard), size, offset)
        except WriteError:
            raise
        except FileNotFoundError:
            self.unreadable_shards[shard] = "missing shard"
            raise BadImage(self.unreadable_shards[shard]) from None
        except OSError as error:
            path, reason = self.index.shard_path(shard), error.strerror or str(error)
            remedy = REMEDIES.get(error.errno or 0, "Check the disk and its permissions.")
            raise ReadError(f"{printable(path)}: could not be read ({reason}). {remedy}") from error

    def close(self) -> None:
        """Close all files; they are reopened when needed."""
        _close_files(self.files)

    def header(self, content: Content) -> Header:
        """Return size and type of an image, upright or as stored depending on the index."""
        return read_header(content, self.max_pixels, self.index.orientation == "upright")

    def key(self, sample: int) -> str:
        """Return a sample's readable name."""
        return self.index.key(sample)

    def labels_of(self, samples: np.ndarray) -> np.ndarray | None:
        """Return class numbers, or None for unlabeled data."""
        return None if self.index.classes is None else self.index.labels_of(samples).astype(np.int64)

    def decoded_images(self, samples: np.ndarray) -> tuple[Tensor, dict[int, str]] | None:
        """Return images 'b c h w' and reasons for unreadable rows; None if the data set is not in memory."""
        if self.decoded is None:
            return None
        images = self.decoded.index_select(0, torch.from_numpy(samples))  # 15 times as fast as indexing
        return images, self.unreadable_rows(samples)

    def unreadable_rows(self, samples: np.ndarray) -> dict[int, str]:
        """Return row -> reason for unreadable samples of a data set in memory."""
        if not self.unreadable:
            return {}
        return {i: self.unreadable[int(s)] for i, s in enumerate(samples) if int(s) in self.unreadable}

    def prefetch(self, shards: list[int]) -> None:
        """Fetch shards from the network in the background, in this order; shards already here cost nothing."""
        if self.prefetcher is None or self.prefetcher.process != os.getpid():  # threads do not survive a fork
            self.prefetcher = _Prefetcher(self.index)
            weakref.finalize(self, self.prefetcher.stopped.set)
        self.prefetcher.wanted = shards

    def _open(self, shard: int) -> int:
        """The shard's file descriptor; if too many are open, the least recently used one is closed."""
        file = self.files.pop(shard, None)
        if file is None:
            if shard in self.unreadable_shards:
                raise BadImage(self.unreadable_shards[shard])
            if len(self.files) >= MAX_OPEN_SHARDS:
                os.close(self.files.popitem(last=False)[1])
            try:
                file = os.open(self.index.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except BadImage as error:
                self.unreadable_shards[shard] = str(error)
                raise
        self.files[shard] = file
        return file

    def _decode_all(self, size: list[int], pixel: torch.dtype) -> Tensor:
        """Decode all images in processes that write into shared memory."""
        shape = (len(self.index), self.channels, *size)
        shared = mmap.mmap(-1, math.prod(shape) * pixel.itemsize)  # not in /dev/shm, which may be small
        decoded = torch.frombuffer(shared, dtype=pixel).view(shape)
        pixels = decoded.numpy()

        def decode_chunk(chunk: int, tick: Callable[[int], None]) -> dict[int, str]:
            unreadable = {}
            samples = range(chunk * CHUNK_IMAGES, min((chunk + 1) * CHUNK_IMAGES, len(self.index)))
            for sample in samples:
                try:
                    content = self.read(sample)
                    image = decode_pixels(content, self.channels, self.bits, header=self.header(content))
                    if list(image.shape[:2]) != size:
                        raise BadImage(f"{list(image.shape[:2])} {OTHER_SIZE} {size}")
                    pixels[sample] = image.transpose(2, 0, 1)
                except BadImage as error:
                    unreadable[sample] = str(error)
            tick(len(samples))
            return unreadable

        chunks = math.ceil(len(self.index) / CHUNK_IMAGES)
        workers = None if len(self.index) >= 4 * CHUNK_IMAGES else 1  # starting processes takes longer
        for unreadable in in_parallel(decode_chunk, chunks, workers, "decoding", len(self.index)):
            self.unreadable |= unreadable
        self.close()  # everything is in memory
        return decoded

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("files", "prefetcher")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state  # a worker opens its own files
        self.files, self.prefetcher = _new_files(self), None


def fits_in_memory(index: Index, channels: int, memory_limit_mb: int) -> bool:
    """Whether a data set has small images of one size that fit the limit, so that they are decoded once."""
    size, itemsize = index.image_size, 1 if index.bits == 8 else 4
    if size is None or max(size) > SMALL_SIDE:
        return False
    return len(index) * channels * size[0] * size[1] * itemsize <= memory_limit_mb * 2**20


def _new_files(reader: ShardReader) -> OrderedDict[int, int]:
    """File descriptors by shard, least recently used first; closed when the reader is garbage-collected."""
    files: OrderedDict[int, int] = OrderedDict()
    weakref.finalize(reader, _close_files, files)
    return files


def _close_files(files: OrderedDict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


class _Prefetcher:
    """Threads that fetch wanted shards in order; errors are ignored here and raised again when a shard is read.

    Each loader worker has its own threads. Shards that another worker is fetching are skipped.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.wanted: list[int] = []
        self.done: set[int] = set()  # or being fetched
        self.lock, self.process, self.stopped = threading.Lock(), os.getpid(), threading.Event()
        for _ in range(PREFETCH_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while not self.stopped.wait(0.05):
            left_to_others: set[int] = set()
            while (shard := self._next(left_to_others)) is not None:
                with suppress(Exception):
                    if not self.index.fetch_if_free(shard):
                        left_to_others.add(shard)
                        self.done.discard(shard)  # tried again in the next round

    def _next(self, left_to_others: set[int]) -> int | None:
        with self.lock:
            wanted = self.wanted
            self.done &= set(wanted)  # other shards may be evicted before they are wanted again
            passed_over = self.done | left_to_others
            shard = next((shard for shard in wanted if shard not in passed_over), None)
            if shard is not None:
                self.done.add(shard)
        return shard


class MemoryReader:
    """Reads images that are already in memory (sample number -> key and content); replaces a ShardReader."""

    bits = 8  # may be set to 16 for 16-bit images

    def __init__(
        self, contents: Mapping[int, tuple[str, Content]], channels: int, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.contents, self.channels, self.max_pixels, self.scratch = contents, channels, max_pixels, Scratch()
        self.decoded: Tensor | None = None  # all images 'n c h w', if they were decoded

    def header(self, content: Content) -> Header:
        """Return size and type of an image."""
        return read_header(content, self.max_pixels)

    def read(self, sample: int) -> Content:
        """Return the image."""
        return self.contents[sample][1]

    def key(self, sample: int) -> str:
        """Return a sample's readable name."""
        return self.contents[sample][0]

    def labels_of(self, samples: np.ndarray) -> None:
        """Return None, since there are no labels."""

    def decoded_images(self, samples: np.ndarray) -> tuple[Tensor, dict[int, str]] | None:
        """Return images 'b c h w' and no unreadable rows; None if the images are not decoded."""
        return None if self.decoded is None else (self.decoded[torch.from_numpy(samples)], {})


ImageReader = ShardReader | MemoryReader
