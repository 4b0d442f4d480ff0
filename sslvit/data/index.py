"""Where every sample lies: the index beside a set of tar shards.

    index.json   shards (name, samples, bytes, sha256), classes, channel statistics, common image size
    index.npy    one record per sample: where its image starts in its shard, its length, its label

With it, any sample is one read by offset, an epoch's length is known before it starts, and nothing is scanned.
index.json is a superset of the _info.json that timm reads, which is written beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from sslvit.data.decode import BadImage

FORMAT = 3
RECORD = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4")])
CHECKED_BYTES = 64 * 2**20  # up to this length index.npy is compared with its checksum at each start
FIELDS = ("classes", "channels", "bits", "mean", "std", "image_size", "encoding", "orientation", "skipped")
SPLITS = ("train", "val", "validation", "test")  # a folder of this name is a split for timm; others are its train


@dataclass
class Shard:
    """One tar file.

    Args:
        name: file name in the index's folder, or a path or address of its own.
        samples: how many it holds.
        bytes: its length.
        sha256: of its bytes.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


class Index(Protocol):
    """What readers ask of one data set, or of several joined."""

    location: str
    shards: list[Shard]
    classes: list[str] | None
    channels: int
    bits: int
    mean: list[float]
    std: list[float]
    image_size: list[int] | None
    orientation: str
    is_remote: bool

    def __len__(self) -> int: ...
    def locate(self, sample: int) -> tuple[int, int, int]: ...
    def shard_path(self, shard: int) -> Path: ...
    def key(self, sample: int) -> str: ...
    def labels_of(self, samples: np.ndarray) -> np.ndarray: ...
    def absent(self) -> dict[str, str]: ...
    def fingerprint(self) -> str: ...


@dataclass
class ShardIndex:
    """All shards of a data set.

    Args:
        location: folder or address where the shards lie.
        shards: in order; samples are numbered through them from zero.
        records: one RECORD per sample.
        classes: names by label, or None for unlabelled data.
        channels: of the images.
        bits: 8, or 16 if all images have them.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        image_size: height and width if all images share them.
        encoding: what packing did to the images, in words; empty for nothing.
        orientation: upright if images are turned as EXIF says, stored if their pixels are taken as they lie.
        skipped: files that packing left out, with the reason.
        cache: brings shards here from the network (remote.ShardCache), or None.
    """

    location: str
    shards: list[Shard]
    records: np.ndarray
    classes: list[str] | None = None
    channels: int = 3
    bits: int = 8
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    image_size: list[int] | None = None
    encoding: str = ""
    orientation: str = "upright"
    skipped: dict[str, str] = field(default_factory=dict)
    cache: Any = None

    def __post_init__(self) -> None:
        self.location = str(self.location)
        self.first_of_shard = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(int)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def shard_samples(self) -> np.ndarray:
        return np.diff(self.first_of_shard)

    def labels_of(self, samples: np.ndarray | slice) -> np.ndarray:
        """Class numbers.

        Raises:
            ValueError: these images have none.
        """
        if self.classes is None:
            raise ValueError(
                f"{self.location}: these images have no labels, and a probe needs them. "
                "Pack a folder with one sub-folder per class."
            )
        return self.records["label"][samples]

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Number of the shard, offset and length of a sample's image.

        Raises:
            BadImage: the record is damaged.
        """
        shard = int(np.searchsorted(self.first_of_shard, sample, side="right")) - 1
        record = self.records[sample]
        offset, size = int(record["offset"]), int(record["size"])
        if not 0 <= offset <= self.shards[shard].bytes - size:
            raise BadImage("damaged record in index.npy")
        return shard, offset, size

    @property
    def is_remote(self) -> bool:
        """Whether any shard has to come from the network."""
        return is_address(self.location) or any(is_address(shard.name) for shard in self.shards)

    def address(self, shard: int) -> str:
        """Path or address of a tar file."""
        name = self.shards[shard].name
        if is_address(name) or os.path.isabs(name):
            return name
        if self.location.startswith(("http://", "https://")):
            name = quote(name)
        return f"{self.location.rstrip('/')}/{name}"

    def shard_path(self, shard: int) -> Path:
        """The tar file on this machine; one from the network is fetched first."""
        address = self.address(shard)
        return self.cache.shard(address, self.shards[shard]) if is_address(address) else Path(address)

    def known_path(self, shard: int) -> Path:
        """Where the tar file is if it is here; nothing is fetched."""
        address = self.address(shard)
        return self.cache.path_of(address, self.shards[shard].sha256) if is_address(address) else Path(address)

    def key(self, sample: int) -> str:
        """A sample's name for people: shard and member."""
        shard = int(np.searchsorted(self.first_of_shard, sample, side="right")) - 1
        name, offset = Path(self.shards[shard].name).name, int(self.records[sample]["offset"])
        try:
            with open(self.known_path(shard), "rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace").name
        except (tarfile.HeaderError, OSError, ValueError):
            member = f"(image at byte {offset})"
        return f"{name}/{member}"

    def absent(self) -> dict[str, str]:
        """Shards on this machine that are missing or have another length, with what is wrong."""
        wrong = {}
        for number, shard in enumerate(self.shards):
            if is_address(self.address(number)):
                continue
            try:
                size = self.shard_path(number).stat().st_size
            except OSError:
                wrong[shard.name] = "missing shard"
                continue
            if size != shard.bytes:
                wrong[shard.name] = f"{size} bytes, index.json says {shard.bytes}"
        return wrong

    def save(self, folder: str | Path | None = None) -> None:
        """Write the files, each whole or not at all; index.json last, so that its presence means all is there."""
        folder = Path(folder or self.location)
        part = folder / f"index.{os.getpid()}.part.npy"
        np.save(part, self.records)
        os.replace(part, folder / "index.npy")
        split = folder.name if folder.name in SPLITS else "train"
        about = {
            "name": split, "num_samples": len(self),
            "filenames": [shard.name for shard in self.shards],
            "shard_lengths": [shard.samples for shard in self.shards],
        }  # fmt: skip
        more = {"bytes": [s.bytes for s in self.shards], "sha256": [s.sha256 for s in self.shards]}
        content = {
            "format": FORMAT, "records_sha256": sha256_of(folder / "index.npy"),
            **{name: getattr(self, name) for name in FIELDS}, "splits": {split: about | more},
        }  # fmt: skip
        _write_json(folder / "_info.json", {"splits": {split: about}})
        _write_json(folder / "index.json", content)

    def fingerprint(self) -> str:
        """Short name of the exact bytes of all shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


def load_index(folder: str | Path) -> ShardIndex:
    """The index in a folder of shards.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another format.
    """
    folder = Path(folder)
    file = folder / "index.json"
    if not file.exists():
        hint = f"Run: sslvit shards index {folder}" if any(folder.glob("*.tar")) else "Run: sslvit shards pack SRC DST"
        if (folder / "packing").is_dir():
            hint = "Packing was not finished there: run the same sslvit shards pack again, or shards index --merge."
        raise FileNotFoundError(f"{folder}: no index.json there. {hint}")
    return read_index(file.read_bytes(), folder / "index.npy", str(folder))


def read_index(content: bytes, records_file: Path, location: str, is_own: bool = False) -> ShardIndex:
    """An index from the bytes of its index.json and the file of its records.

    Args:
        content: of index.json.
        records_file: index.npy.
        location: of the shards.
        is_own: made here, so it may name shards anywhere; others only in their own folder.
    """
    again = f"Make it again: sslvit shards index {location}"
    try:
        about = json.loads(content)
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, this sslvit reads {FORMAT}")
        (split,) = about["splits"].values()
        columns = [split[name] for name in ("filenames", "shard_lengths", "bytes", "sha256")]
        shards = [Shard(*values) for values in zip(*columns, strict=True)]
        if os.path.getsize(records_file) <= CHECKED_BYTES and sha256_of(records_file) != about["records_sha256"]:
            raise ValueError("index.npy is not the one that it describes")
        if not all(isinstance(s.name, str) and isinstance(s.bytes, int) and s.samples >= 0 for s in shards):
            raise ValueError("its list of shards is damaged")
        records = np.load(records_file, mmap_mode="r", allow_pickle=False)
        fields = {name: about[name] for name in FIELDS}
    except Exception as error:  # besides the usual, numpy parses headers with Python's own parser and its errors
        raise ValueError(f"{location}/index.json: unreadable ({error}). {again}") from error
    index = ShardIndex(location, shards, records, **fields)
    if records.dtype != RECORD or records.ndim != 1 or index.first_of_shard[-1] != len(records):
        raise ValueError(f"{location}/index.json: does not fit index.npy. {again}")
    for shard in shards:
        if not is_own and (".." in Path(shard.name).parts or os.path.isabs(shard.name) or is_address(shard.name)):
            raise ValueError(f"{location}/index.json: the shard {shard.name} lies outside of its folder. {again}")
    return index


def is_address(source: str) -> bool:
    """Whether it names something on the network."""
    return "://" in source


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)
