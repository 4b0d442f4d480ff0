"""The job of packing: everything that determines the bytes of the shards, and the writing of one shard."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sslvit import rng
from sslvit.data.header import BadImage
from sslvit.data.index import Shard
from sslvit.data.labels import NO_LABEL
from sslvit.data.measure import measure_shard
from sslvit.data.plan import evenly_spaced
from sslvit.data.records import RECORD
from sslvit.data.scan import ShardReport
from sslvit.data.sources import Samples, SampleTable, Texts
from sslvit.data.store import BLOCK, MAX_MEMBER_NAME, PackSettings, TarWriter, store
from sslvit.data.unfinished import load_report, save_report, shard_name
from sslvit.files import REMEDIES, new_file, printable

MAX_ENCODED_SUFFIX = 4  # the length of webp
# not faults of a file, as a bad sector (EIO) is: every image read meanwhile would be skipped
MACHINE_FAULTS = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN,
)  # fmt: skip
TRIAL_IMAGES = 64  # images encoded in advance to estimate the size of the others


@dataclass
class PackJob:
    """Everything that determines the bytes of the shards; worker processes share it by fork.

    Args:
        samples: Samples in the order of their source; a table, which forked processes need not copy.
        folder: Folder for finished shards.
        settings: How images are stored.
        keys: Unique names, one per sample.
        order: Sample numbers in the order of packing.
        starts: Position in that order at which each shard begins, and the end.
    """

    samples: SampleTable
    folder: Path
    settings: PackSettings
    keys: Texts = field(init=False)
    order: np.ndarray = field(init=False)
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.keys = Texts(_unique_keys(self.samples))
        self.order = rng.generator(0, "pack").permutation(len(self.samples))

    def cut(self) -> None:
        """Decide where shards begin."""
        self.starts = _shard_starts(self._stored_bytes(), self.settings.shard_mb * 2**20)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.starts) - 1

    def _stored_bytes(self) -> np.ndarray:
        """Estimated stored size of each sample, in the order of packing; exact for files stored unchanged."""
        sizes = self.samples.bytes[self.order].astype(float)
        headers = BLOCK + 2 * BLOCK * (self.samples.labels[self.order] != NO_LABEL)
        if self.settings.describe():
            trials = evenly_spaced(len(self.order), TRIAL_IMAGES)
            before = after = 0
            for position in trials:
                sample = self.samples[self.order[position]]
                with suppress(BadImage, OSError):
                    content = sample.read()
                    after += len(store(content, sample.suffix, self.settings)[0])
                    before += len(content)
            sizes *= after / before if before else 1.0
        return np.ceil(sizes / BLOCK) * BLOCK + headers

    def __call__(self, number: int, tick: Callable[[int], None]) -> ShardReport:
        """Write one shard and its report, each atomically."""
        finished = load_report(self.folder, number)
        numbers = self.order[self.starts[number] : self.starts[number + 1]]
        if finished is not None:
            tick(len(numbers))
            return finished
        rows: list[tuple[int, int, int]] = []
        skipped: dict[str, str] = {}
        with new_file(self.folder / shard_name(number)) as temporary:
            with TarWriter(temporary) as tar:
                for position, i in enumerate(numbers):
                    tick(position % 2)  # copying counts for half of the progress, measuring for the other
                    self._add(tar, i, rows, skipped)
            records = np.array(rows, RECORD)
            shard = Shard(shard_name(number), len(records), temporary.stat().st_size, tar.digest.hexdigest())
            upright = self.settings.orientation == "upright"
            left = iter(np.diff(np.linspace(len(numbers) // 2, len(numbers), len(records) + 1).astype(int)))
            measured, _ = measure_shard(
                temporary, records, self.shards, upright, self.settings.max_pixels, is_checked=True,
                done=lambda: tick(int(next(left))),
            )  # fmt: skip
        report = ShardReport(shard, records, measured, skipped)
        save_report(self.folder, number, report)
        return report

    def _add(self, tar: TarWriter, number: int, rows: list[tuple[int, int, int]], skipped: dict[str, str]) -> None:
        """Write one sample, or record why it is skipped."""
        sample = self.samples[number]
        try:
            content, suffix = store(sample.read(), sample.suffix, self.settings)
        except BadImage as error:
            skipped[sample.key + sample.suffix] = str(error)
            return
        except OSError as error:  # a read error; write errors end the packing
            if error.errno in MACHINE_FAULTS:
                remedy = REMEDIES.get(error.errno, "Check the machine and the network.")
                raise RuntimeError(
                    f"{printable(sample.key + sample.suffix)}: could not be read ({error.strerror}). {remedy} Then "
                    "give the same command again: packing resumes."
                ) from error
            skipped[sample.key + sample.suffix] = error.strerror or str(error)
            return
        offset = tar.add(self.keys[number] + suffix, content)
        if sample.label != NO_LABEL:
            tar.add(self.keys[number] + ".cls", str(sample.label).encode())
        rows.append((offset, len(content), sample.label))


def _shard_starts(sizes: np.ndarray, limit: float) -> np.ndarray:
    """Positions at which shards begin, so that none exceeds the limit unless a single image does."""
    ends = np.cumsum(sizes)
    starts = [0]
    while starts[-1] < len(sizes):
        before = ends[starts[-1] - 1] if starts[-1] else 0.0
        starts.append(max(starts[-1] + 1, int(np.searchsorted(ends, before + limit, side="right"))))
    return np.array(starts)


def _unique_keys(samples: Samples) -> list[str]:
    """Unique keys that are relative paths without dots, where WebDataset splits names, and fit a tar header."""
    used: set[str] = set()
    keys = []
    for number, sample in enumerate(samples):
        key = re.sub(r"[^\w/+-]", "_", sample.key).strip("/")
        ending = max(len(sample.suffix), MAX_ENCODED_SUFFIX) + 1  # the image may be re-encoded
        if key in used or not key or len(key.encode()) + ending > MAX_MEMBER_NAME:
            key = f"{number:09d}"
            while key in used:
                key += "_"
        used.add(key)
        keys.append(key)
    return keys
