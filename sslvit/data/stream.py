"""Sources that cannot be indexed (gzipped tars, pipes), streamed with the webdataset library.

This module makes streaming deterministic: the order of the shards and the shuffle buffer depend on (seed, epoch, rank,
worker), and rank and world size come from the trainer. No member is unpickled, and the run has a fixed number of steps.
A stream has no exact position, so a resumed run continues in a new order.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.data.header import IMAGE_SUFFIXES, BadImage
from sslvit.data.index import Shard, common_prefix_length
from sslvit.data.loader import MAX_KEY, make_batch
from sslvit.data.reader import MemoryReader
from sslvit.data.records import is_url
from sslvit.data.remote import ShardCache
from sslvit.data.tars import FRAME_NUMBER
from sslvit.data.views import Views
from sslvit.files import printable
from sslvit.settings.data import MAX_PIXELS, PIPE

logger = logging.getLogger(__name__)

BUFFER = 2_000  # images in the shuffle buffer
SAMPLE_NUMBER_BITS = 43  # of the number derived from a sample's key
MAX_REASONS = 5  # problems that a message lists


class StreamIndex:
    """The properties of a stream that are known before it is read.

    Raises:
        ValueError: the number of images is missing, or a command is not allowed.
        FileNotFoundError: a file does not exist.
    """

    def __init__(self, urls: list[str], samples: int | None, allow_pipe: bool, cache: ShardCache) -> None:
        pipes = [url for url in urls if url.startswith(PIPE)]
        if pipes and not allow_pipe:
            raise ValueError(
                f"data.shards: {printable(pipes[0])} would run a command. If you trust it, pass --data.allow_pipe true."
            )
        if samples is None:
            raise ValueError(
                f"data.shards: {printable(urls[0])} can only be read from end to end, so its length is not known. "
                "Give about how many images there are: --data.stream_samples 1000000"
            )
        for url in urls:
            if not url.startswith(PIPE) and not is_url(url) and not Path(url).exists():
                raise FileNotFoundError(f"data.shards: {printable(url)} does not exist.")
        self.urls, self.samples, self.cache = urls, samples, cache
        self.common_folder = common_prefix_length(urls)
        self.location = urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"
        self.shards = [Shard(url, 0, 0, "") for url in urls]
        self.classes: list[str] | None = None
        self.channels, self.bits = 3, 8
        self.is_remote = False
        self.image_size: list[int] | None = None
        self.mean: list[float] = []
        self.std: list[float] = []

    def __len__(self) -> int:
        return self.samples

    def missing_shards(self) -> dict[int, str]:
        """Return an empty dict, since streams are not checked before they are read."""
        return {}

    def shard_label(self, shard: int) -> str:
        """Return a stream's readable name, without the folder common to all streams."""
        return self.urls[shard][self.common_folder :]

    def fingerprint(self) -> str:
        """Return a short digest of the addresses."""
        return hashlib.sha256("\n".join(self.urls).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def local(self, url: str) -> str:
        """Path or command for the webdataset library; a remote file is fetched first."""
        return str(self.cache.get(url)) if is_url(url) and not url.startswith(PIPE) else url


class StreamBatches(IterableDataset):
    """An endless stream of micro-batches of one rank; each worker reads its own shards.

    The order also depends on `start_step`.
    """

    def __init__(
        self, index: StreamIndex, views: Views, channels: int, rank: int, ranks: int, micro: int,
        accumulation_steps: int, start_step: int = 0, max_pixels: int = MAX_PIXELS,
    ) -> None:  # fmt: skip
        self.index, self.views, self.channels, self.max_pixels = index, views, channels, max_pixels
        self.rank, self.ranks, self.micro = rank, ranks, micro
        self.accumulation_steps, self.start_step = accumulation_steps, start_step
        self.labels = {url: index.shard_label(number) for number, url in enumerate(index.urls)}
        self.unused: set[str] = set()  # image fields already reported as unused
        if ranks > len(index.urls):
            raise ValueError(
                f"data.shards: {len(index.urls)} streams cannot be shared by {ranks} ranks. "
                f"Use at most {len(index.urls)} ranks, or more and smaller files."
            )

    def workers(self, requested: int) -> int:
        """Number of workers, at most one per shard of the rank."""
        return min(requested, len(self.index.urls) // self.ranks)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = self._samples(worker, workers)
        for number in itertools.count(worker, workers):
            rows = list(itertools.islice(samples, self.micro))
            contents = {number: (key, content) for _, number, key, content, _ in rows}
            first_row = (self.rank * self.accumulation_steps + number % self.accumulation_steps) * self.micro
            numbers, epochs = np.array([row[1] for row in rows]), np.array([row[0] for row in rows])
            reader = MemoryReader(contents, self.channels, self.max_pixels)
            batch = make_batch(reader, self.views, numbers, epochs, first_row=first_row)
            batch.unreadable |= {name: reason for *_, problems in rows for name, reason in problems.items()}
            yield batch

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[int, int, str, bytes, dict[str, str]]]:
        """Yield shuffled (epoch, number, key, image bytes, problems since the last sample), without end."""
        for epoch in itertools.count():
            key = (self.views.seed, epoch, "stream", self.start_step)
            urls = [self.index.urls[i] for i in rng.generator(*key).permutation(len(self.index.urls))]
            assigned = urls[self.rank :: self.ranks][worker::workers]
            generator = rng.generator(*key, self.rank, worker)
            problems: dict[str, str] = {}
            buffer: list[tuple[int, str, bytes]] = []
            count = 0
            for sample in self._read(assigned, problems):
                count += 1
                if len(buffer) < BUFFER:
                    buffer.append(sample)
                    continue
                slot = int(generator.integers(BUFFER))
                drawn, buffer[slot] = buffer[slot], sample
                yield epoch, *drawn, _drain(problems)
            for slot in generator.permutation(len(buffer)):
                yield epoch, *buffer[slot], _drain(problems)
            if not count:
                reasons = [f"{name}: {text}" for name, text in itertools.islice(problems.items(), MAX_REASONS)]
                raise ValueError(f"data.shards: no image in {printable(', '.join(assigned))}. {'; '.join(reasons)}")

    def _read(self, urls: list[str], problems: dict[str, str]) -> Iterator[tuple[int, str, bytes]]:
        """Yield (number, printable key, bytes) of every image; a damaged stream ends early and is reported."""
        from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

        url_of: dict[str, str] = {}  # by the path or command that is opened for it

        def sources() -> Iterator[dict[str, str]]:
            for url in urls:
                try:
                    local = self.index.local(url)
                except BadImage as error:
                    problems[printable(url)] = str(error)
                    continue
                url_of[local] = url
                yield {"url": local}

        def note(error: Exception) -> bool:
            url = next(reversed(url_of.values()), "")
            text = str(error.args[0]) if error.args else ""
            member, is_second, _ = text.partition(": duplicate file name")
            if is_second:
                problems[printable(f"{url}/{member}")] = "a second member of this name"
            else:
                problems[printable(url)] = printable(f"damaged stream ({type(error).__name__}: {text})")
            return True

        members = tar_file_expander(url_opener(sources(), handler=note), handler=note)
        for sample in group_by_keys(members, keys=_key_and_field, handler=note):
            key, url = sample["__key__"], url_of[sample["__url__"]]
            label = self.labels[url]
            if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
                problems[printable(f"{label}/{key}", MAX_KEY)] = "a path that leads out of its folder"
                continue
            images, others = _images_of(sample)
            if len(images) == 1:
                yield sample_number(f"{url} {key}"), printable(f"{label}/{key}", MAX_KEY), sample[images[0]]
            elif images:
                names = printable(", ".join(images), 60)
                problems[printable(f"{label}/{key}.*", MAX_KEY)] = (
                    f"{len(images)} images of one key ({names}): none of them is used"
                )
            for name in set(others) - self.unused:
                self.unused.add(name)
                example = printable(f"{key}.{name}")
                logger.info(f"data.shards: images such as {example} are not used, only one of each key is")


def _key_and_field(name: str) -> tuple[str | None, str | None]:
    """Key and field of a member as in WebDataset, except that photo.0001.jpg is a separate sample (see tars.py)."""
    from webdataset.tariterators import base_plus_ext

    key, field = base_plus_ext(name)
    middle, _, suffix = (field or "").rpartition(".")
    if FRAME_NUMBER.fullmatch(middle) and f".{suffix.lower()}" in IMAGE_SUFFIXES:
        return f"{key}.{middle}", suffix
    return key, field


def _images_of(sample: dict[str, str | bytes]) -> tuple[list[str], list[str]]:
    """The fields that may hold the image of a sample (one is expected), and fields with other images."""
    names = [name for name, content in sample.items() if isinstance(content, bytes)]
    names = [name for name in names if f".{name.lower().rpartition('.')[2]}" in IMAGE_SUFFIXES]
    plain = [name for name in names if "." not in name]
    return (plain[:1], [name for name in names if name != plain[0]]) if plain else (names, [])


def sample_number(key: str) -> int:
    """A reproducible number for a sample, from its shard and key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8]) >> (
        64 - SAMPLE_NUMBER_BITS
    )


def _drain(problems: dict[str, str]) -> dict[str, str]:
    drained = dict(problems)
    problems.clear()
    return drained
