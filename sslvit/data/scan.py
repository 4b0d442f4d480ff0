"""What one shard holds: its members by offset, and the channels, sizes and statistics of its images.

Packing and indexing both make one report per shard, in parallel and in any order; together they are the index.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sslvit.data.decode import IMAGE_SUFFIXES, MODES, BadImage, Header, decode, read_header
from sslvit.data.index import NO_LABEL, RECORD, Shard, ShardIndex, sha256_of
from sslvit.data.parallel import in_parallel

MOST_CLASSES_PER_IMAGE = 2  # larger labels are other numbers
STATISTICS_SAMPLES = 10_000  # channel mean and std are measured on about this many images
PICKLES = {".pyd", ".pkl", ".pickle", ".pth", ".pt"}  # what other readers would unpickle, that is: run


@dataclass
class Measured:
    """Properties of images, added up.

    Args:
        moments: sums over images of the mean of each channel, and of its mean square.
        channels: of the images that were decoded for the moments.
        images: how many these are.
        sizes: how often each (height, width) occurs.
        modes: how often each mode occurs.
        kinds: how often each (channels, bits) occurs.
    """

    moments: list[list[float]] = field(default_factory=list)
    channels: int = 0
    images: int = 0
    sizes: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)

    def count(self, header: Header) -> None:
        self.sizes[header.height, header.width] += 1
        self.modes[header.mode] += 1
        self.kinds[header.channels, header.bits] += 1

    def measure(self, content: bytes, header: Header) -> None:
        """Add the moments of one image; those of another number of channels are left out."""
        is_mixed = header.mode != "array" and header.channels < 4
        channels = 3 if is_mixed else header.channels  # grey images among colours count as colours
        if self.images and channels != self.channels:
            return
        pixels = decode(content, channels, header.bits, header=header).numpy().reshape(channels, -1) / 255
        here = np.stack([pixels.mean(1), np.square(pixels).mean(1)])  # every image counts the same, whatever its size
        self.moments = (np.array(self.moments) + here if self.images else here).tolist()
        self.channels, self.images = channels, self.images + 1

    def add(self, other: Measured) -> None:
        for name in ("sizes", "modes", "kinds"):
            getattr(self, name).update(getattr(other, name))
        if other.images and (not self.images or self.channels == other.channels):
            self.moments = (np.array(self.moments) + other.moments).tolist() if self.images else other.moments
            self.channels, self.images = other.channels, self.images + other.images

    def describe(self, location: str) -> dict[str, Any]:
        """Fields of the index.

        Raises:
            ValueError: no image could be decoded.
        """
        if not self.images:
            raise ValueError(f"{location}: none of the images can be decoded.")
        kinds = {channels for channels, _ in self.kinds}
        only = next(iter(kinds)) if len(kinds) == 1 else 0
        channels = only or (3 if kinds <= set(MODES) else self.channels)
        mean, square = np.array(self.moments)[:, :channels] / self.images
        return {
            "channels": channels,
            "bits": 16 if {bits for _, bits in self.kinds} == {16} else 8,
            "mean": mean.round(4).tolist(),
            "std": np.sqrt((square - mean**2).clip(min=0)).round(4).tolist(),
            "image_size": list(next(iter(self.sizes))) if len(self.sizes) == 1 else None,
        }


@dataclass
class ShardReport:
    """All that the index needs of one shard.

    Args:
        shard: name, counts, checksum.
        records: of its samples.
        measured: properties of its images.
        skipped: images that were left out, with the reason.
    """

    shard: Shard
    records: np.ndarray
    measured: Measured = field(default_factory=Measured)
    skipped: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All but the records, as JSON takes it."""
        measured = dict(vars(self.measured))
        for name in ("sizes", "kinds"):  # JSON has no keys of two numbers
            measured[name] = [[*key, count] for key, count in measured[name].items()]
        return {"shard": asdict(self.shard), "measured": measured, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, content: dict[str, Any], records: np.ndarray) -> ShardReport:
        measured = dict(content["measured"])
        for name in ("sizes", "kinds"):
            measured[name] = Counter({(a, b): count for a, b, count in measured[name]})
        measured["modes"] = Counter(measured["modes"])
        return cls(Shard(**content["shard"]), records, Measured(**measured), content["skipped"])


def join_reports(
    reports: list[ShardReport], location: str | Path, classes: list[str] | None, encoding: str = ""
) -> ShardIndex:
    """The index of all shards; empty ones are left out.

    Raises:
        ValueError: no image could be decoded.
    """
    measured = Measured()
    skipped: dict[str, str] = {}
    for report in reports:
        measured.add(report.measured)
        skipped |= report.skipped
    kept = [report for report in reports if report.shard.samples]
    records = np.concatenate([report.records for report in kept]) if kept else np.empty(0, RECORD)
    return ShardIndex(
        str(location), [report.shard for report in kept], records, classes, encoding=encoding, skipped=skipped,
        **measured.describe(str(location)),
    )  # fmt: skip


def index_shards(folder: str | Path, workers: int | None = None) -> ShardIndex:
    """Make the index of tar shards that others wrote (WebDataset format): KEY.jpg beside KEY.cls.

    Args:
        folder: where they lie, and where the index goes.
        workers: processes; None for one per core.

    Raises:
        ValueError: no shard, or none with an image in it; damaged ones are read as far as they go, and named.
    """
    names = sorted(path.name for path in Path(folder).glob("*.tar"))
    if not names:
        raise ValueError(f"{folder}: no .tar files there.")
    index = index_names(str(folder), names, lambda name: Path(folder) / name, workers)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # what an earlier index knows and tars do not
        before = json.loads((Path(folder) / "index.json").read_text())
        if index.classes and before["classes"] and len(before["classes"]) >= len(index.classes):
            index.classes = before["classes"]
        index.encoding = before["encoding"]
    index.save()
    return index


def index_names(
    location: str, names: list[str], path_of: Callable[[str], Path], workers: int | None = None
) -> ShardIndex:
    """The index of shards by name, wherever they are.

    Args:
        location: of the index.
        names: of the shards.
        path_of: brings a shard to this machine, where it is not, and returns its path.
        workers: processes; None for one per core.
    """
    reports = list(in_parallel(_ScanJob(names, path_of), len(names), workers, "indexing", len(names), "shards"))
    if not any(report.shard.samples for report in reports):
        raise ValueError(f"{location}: the shards hold no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    labels = np.concatenate([report.records["label"] for report in reports])
    missing, top = int((labels == NO_LABEL).sum()), int(labels.max())
    classes = None
    if 0 < missing < len(labels):
        print(f"{location}: {missing} of {len(labels)} images have no label, so the others' are not used either")
    elif not missing and top >= MOST_CLASSES_PER_IMAGE * len(labels) + 1000:
        print(f"{location}: labels up to {top} for {len(labels)} images are no class numbers; they are not used")
    elif not missing:
        classes = [str(label) for label in range(top + 1)]
    index = join_reports(reports, location, classes)
    if index.skipped:
        name, reason = next(iter(index.skipped.items()))
        print(f"left out {len(index.skipped)} things (the first: {name}: {reason}); all are in index.json")
    return index


@dataclass
class _ScanJob:
    names: list[str]
    path_of: Callable[[str], Path]

    def __call__(self, number: int, tick: Callable[[int], None]) -> ShardReport:
        report = scan_shard(self.path_of(self.names[number]), len(self.names))
        report.shard.name = self.names[number]
        tick(1)
        return report


def scan_shard(path: Path, shards: int = 1) -> ShardReport:
    """Members, checksum and image properties of one tar file, one of so many.

    What could do harm (absolute paths, "..", pickles) is left out and named; so is what cannot be read.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    skipped: dict[str, str] = {}
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                if member.size < 0 or member.offset < end or member.offset_data + member.size > length:
                    raise tarfile.ReadError("a member ends beyond the file")
                end = member.offset_data + member.size
                if member.isfile():
                    problem = _take(member, tar, images, labels)
                    if problem:
                        skipped[f"{path.name}/{member.name}"] = problem
            if not _ends_there(path, tar.offset):  # tarfile stops without a word at a damaged header
                raise tarfile.ReadError("no end mark after the last member")
    except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError) as error:
        skipped[path.name] = f"truncated tar: {len(images)} images read, what follows is lost ({error})"
    rows = [(offset, size, labels.get(key, NO_LABEL)) for key, (offset, size) in images.items()]
    records = np.array(rows, RECORD)
    shard = Shard(path.name, len(records), length, sha256_of(path))
    return ShardReport(shard, records, measure_shard(path, records, shards), skipped)


def _take(
    member: tarfile.TarInfo, tar: tarfile.TarFile, images: dict[str, tuple[int, int]], labels: dict[str, int]
) -> str:
    """Note an image or a label; returns why a member is left out, if it is."""
    name = PurePosixPath(member.name)
    stem, _, field_name = name.name.partition(".")
    key = str(name.parent / stem)
    if name.is_absolute() or ".." in name.parts:
        return "a path that leads out of its folder"
    if name.suffix.lower() in PICKLES:
        return "a pickle, which would run code"
    if f".{field_name.lower()}" in IMAGE_SUFFIXES:  # KEY.seg.png is another field, not the image
        if key in images:
            return "a second image of its key"
        if member.size >= 2**32:
            return "more than 4 GB"
        images[key] = (member.offset_data, member.size)
    elif field_name == "cls":
        text = tar.extractfile(member).read(32)
        if not text.strip().isdigit() or int(text) >= 2**31:
            return f"{text!r} instead of a class number"
        labels[key] = int(text)
    return ""


def _ends_there(path: Path, place: int) -> bool:
    """Whether a tar's end mark, a block of zeros, stands where its members end."""
    with open(path, "rb") as file:
        file.seek(place)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def measure_shard(path: Path, records: np.ndarray, shards: int) -> Measured:
    """Sizes and modes of all images of a shard, and moments of its part of STATISTICS_SAMPLES."""
    measured = Measured()
    most = min(len(records), max(50, STATISTICS_SAMPLES // shards))
    chosen = set(np.linspace(0, len(records) - 1, most).astype(int).tolist())
    with open(path, "rb") as file:
        for place, record in enumerate(records):
            content = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
            try:
                header = read_header(content)
                measured.count(header)
                if place in chosen:
                    measured.measure(content, header)
            except BadImage:
                continue
    return measured
