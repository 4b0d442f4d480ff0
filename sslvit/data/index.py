"""Where every sample lies: the index beside a set of tar shards.

    index.json   shards (name, samples, bytes, sha256), classes, channel statistics, common image size
    index.npy    one record per sample: where its image starts in its shard, its length, its label

With it, any sample is one read by offset, an epoch's length is known before it starts, and nothing is scanned.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

FORMAT = 1
RECORD = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4")])
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
NO_LABEL = -1
FIELDS = ("classes", "channels", "mean", "std", "image_size", "skipped")


@dataclass
class Shard:
    """One tar file.

    Args:
        name: file name in the index's folder.
        samples: how many it holds.
        bytes: its length.
        sha256: of its bytes.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class ShardIndex:
    """All shards of a data set.

    Args:
        folder: where the shards lie.
        shards: in order; samples are numbered through them from zero.
        records: one RECORD per sample.
        classes: names by label, or None for unlabelled data.
        channels: of the images (1, 3 or 4).
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        image_size: height and width if all images share them.
        skipped: files that packing left out, with the reason.
    """

    folder: Path
    shards: list[Shard]
    records: np.ndarray
    classes: list[str] | None = None
    channels: int = 3
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    image_size: list[int] | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first_of_shard = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])])

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """Label of every sample."""
        if self.classes is None:
            raise ValueError(
                f"{self.folder}: these images have no labels, and a probe needs them. "
                "Pack a folder with one sub-folder per class."
            )
        return self.records["label"]

    def locate(self, sample: int) -> tuple[Path, int, int]:
        """Shard file, offset and length of a sample's image."""
        shard = int(np.searchsorted(self.first_of_shard, sample, side="right")) - 1
        record = self.records[sample]
        return self.folder / self.shards[shard].name, int(record["offset"]), int(record["size"])

    def key(self, sample: int) -> str:
        """A sample's name for people: shard and member."""
        path, offset, _ = self.locate(sample)
        with open(path, "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except tarfile.HeaderError:
            name = f"(damaged header at byte {offset - tarfile.BLOCKSIZE})"
        return f"{path.name}/{name}"

    def save(self) -> None:
        """Write both files, each whole or not at all; index.json last, so that its presence means all is there."""
        np.save(self.folder / "index.part.npy", self.records)
        os.replace(self.folder / "index.part.npy", self.folder / "index.npy")
        about = {
            "format": FORMAT, "samples": len(self), "classes": self.classes, "channels": self.channels,
            "mean": self.mean, "std": self.std, "image_size": self.image_size, "skipped": self.skipped,
            "shards": [asdict(shard) for shard in self.shards],
        }  # fmt: skip
        part = self.folder / "index.json.part"
        part.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(part, self.folder / "index.json")

    def fingerprint(self) -> str:
        """Short name of the exact bytes of all shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


def load_index(folder: str | Path) -> ShardIndex:
    """The index in a folder of shards.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another format, or does not fit the shards beside it.
    """
    folder = Path(folder)
    file = folder / "index.json"
    if not file.exists():
        hint = f"Run: sslvit shards index {folder}" if any(folder.glob("*.tar")) else "Run: sslvit shards pack SRC DST"
        raise FileNotFoundError(f"{folder}: no index.json there. {hint}")
    try:
        about = json.loads(file.read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, this sslvit reads {FORMAT}")
        shards = [Shard(**shard) for shard in about["shards"]]
        records = np.load(folder / "index.npy", mmap_mode="r", allow_pickle=False)
        fields = {name: about[name] for name in FIELDS}
        expected = about["samples"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file}: unreadable ({error}). Make it again: sslvit shards index {folder}") from error
    index = ShardIndex(folder, shards, records, **fields)
    if records.dtype != RECORD or len(records) != expected or index.first_of_shard[-1] != len(records):
        raise ValueError(f"{file}: does not fit index.npy. Make it again: sslvit shards index {folder}")
    for shard in shards:
        path = folder / shard.name
        if not path.exists():
            raise ValueError(f"{path}: missing, though index.json lists it.")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, index.json says {shard.bytes}. Copy it again, or if it was "
                f"changed on purpose: sslvit shards index {folder}"
            )
    return index


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
