"""The index of a set of tar shards, which locates every sample.

    index.json   shards (name, samples, bytes, sha256), classes, channel statistics, common image size
    index.npy    one record per sample: offset of its image in the shard, length, label

With the index, a sample takes one read at an offset, the length of an epoch is known in advance, and shards need not be
scanned. index.json is a superset of the _info.json that timm reads, which is written beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np

from sslvit.data.header import BadImage
from sslvit.data.records import check_digest, check_labels, is_url, load_records, save_records, sha256_of
from sslvit.data.remote import ShardCache
from sslvit.data.schema import FORMAT, INDEX_FIELDS, checked_index, parse_json
from sslvit.data.tars import COMPRESSED_TARS
from sslvit.files import printable, write_atomically

MAX_REPEATED_PATH = 80  # length up to which an error message repeats a path
SPLITS = ("train", "val", "validation", "test")  # a folder of this name is that split in timm; any other is train


@dataclass
class Shard:
    """One tar file; its name is relative to the folder of the index, or a path or address."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class ShardIndex:
    """All shards of a data set.

    Args:
        location: Folder or address of the shards.
        shards: Shards in order; samples are numbered consecutively across them, from zero.
        records: One RECORD per sample.
        classes: Class names by label, or None for unlabeled data.
        channels: Number of channels of the images.
        bits: 16 if all images have 16 bits, otherwise 8.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        image_size: Height and width if all images have the same size, otherwise None.
        encoding: How packing changed the images, in words; empty if it did not.
        orientation: upright to rotate images by their EXIF orientation, stored to use their pixels as stored.
        skipped: Name of each skipped file -> reason.
        job: Digest of the packing that wrote the shards (unfinished.digest_job); empty for shards of other tools.
        cache: Cache of shards from the network, or None.
        cached_in: Folder in the local cache that holds the index, if it does not lie beside the shards.
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
    job: str = ""
    cache: ShardCache | None = None
    cached_in: str = ""

    def __post_init__(self) -> None:
        self.location = str(self.location)
        self.first_of_shard = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(int)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def shard_samples(self) -> np.ndarray:
        """Number of samples in each shard."""
        return np.diff(self.first_of_shard)

    def labels_of(self, samples: np.ndarray | slice) -> np.ndarray:
        """Class numbers.

        Raises:
            ValueError: the images have no labels, or the index is damaged.
        """
        if self.classes is None:
            raise ValueError(
                f"{self.location}: these images have no labels, which are needed here. Pack a folder with one folder "
                "per class; without labels, see what the encoder finds alike: sslvit show neighbors ENCODER "
                f"{printable(self.location)}"
            )
        labels = self.records["label"][samples]
        try:
            check_labels(labels, self.classes, "index.npy")
        except ValueError as error:
            where = self.cached_in or self.location
            raise ValueError(f"{printable(where)}/{error}. {_rebuild_hint(self.location, self.cached_in)}") from error
        return labels

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Shard number, offset and length of a sample's image.

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
        """Whether any shard is on the network."""
        return is_url(self.location) or any(is_url(shard.name) for shard in self.shards)

    def address(self, shard: int) -> str:
        """Path or address of a tar file."""
        name = self.shards[shard].name
        if is_url(name) or os.path.isabs(name):
            return name
        if self.location.startswith(("http://", "https://")):
            name = quote(name, errors="surrogateescape")
        return f"{self.location.rstrip('/')}/{name}"

    def shard_path(self, shard: int) -> Path:
        """Return the local path of a tar file; a remote one is fetched first."""
        address, file = self.address(shard), self.shards[shard]
        return self.cache.get(address, file.bytes, file.sha256) if self.cache and is_url(address) else Path(address)

    def fetch_if_free(self, shard: int) -> bool:
        """Fetch a remote tar file in advance; False if another process or thread is fetching it."""
        address, file = self.address(shard), self.shards[shard]
        return not (self.cache and is_url(address)) or self.cache.fetch_if_free(address, file.bytes, file.sha256)

    def local_path(self, shard: int) -> Path:
        """Return the local path of a tar file without fetching it."""
        address, sha256 = self.address(shard), self.shards[shard].sha256
        return self.cache.path_of(address, sha256) if self.cache and is_url(address) else Path(address)

    def key(self, sample: int) -> str:
        """Return shard and member name of a sample; bytes that are not UTF-8 become surrogate escapes."""
        shard = int(np.searchsorted(self.first_of_shard, sample, side="right")) - 1
        name, offset = self.shard_label(shard), int(self.records[sample]["offset"])
        try:
            with open(self.local_path(shard), "rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
        except (tarfile.HeaderError, OSError, ValueError):
            member = f"(image at byte {offset})"
        return f"{name}/{member}"

    def shard_label(self, shard: int) -> str:
        """Return a shard's readable name, without the folder common to all shards."""
        return self.shards[shard].name[self._common_folder :]

    @cached_property
    def _common_folder(self) -> int:
        return common_prefix_length(shard.name for shard in self.shards)

    def missing_shards(self) -> dict[int, str]:
        """Number of each local shard that is missing or has the wrong length -> problem."""
        wrong = {}
        for number, shard in enumerate(self.shards):
            if is_url(self.address(number)):
                continue
            try:
                size = self.shard_path(number).stat().st_size
            except OSError:
                wrong[number] = "missing shard"
                continue
            if size != shard.bytes:
                wrong[number] = f"{size} bytes, index.json says {shard.bytes}"
        return wrong

    def unlisted(self) -> list[str]:
        """Names of local tar files in the folder that the index does not list."""
        if is_url(self.location) or self.cached_in or not Path(self.location).is_dir():
            return []
        known = {shard.name for shard in self.shards} | self.skipped.keys()
        names = [path.name for path in Path(self.location).iterdir() if path.name.endswith((".tar", *COMPRESSED_TARS))]
        return sorted(name for name in names if name not in known)

    def save(self, folder: str | Path | None = None) -> None:
        """Write the files atomically; index.json comes last, so that its presence means that all are complete."""
        folder = Path(folder or self.location)
        save_records(folder / "index.npy", self.records)
        split = folder.name if folder.name in SPLITS else "train"
        about = {
            "name": split, "num_samples": len(self),
            "filenames": [shard.name for shard in self.shards],
            "shard_lengths": [shard.samples for shard in self.shards],
        }  # fmt: skip
        more = {"bytes": [s.bytes for s in self.shards], "sha256": [s.sha256 for s in self.shards]}
        content = {
            "format": FORMAT, "records_sha256": sha256_of(folder / "index.npy"),
            **{name: getattr(self, name) for name in INDEX_FIELDS}, **({"job": self.job} if self.job else {}),
            "splits": {split: about | more},
        }  # fmt: skip
        _write_json(folder / "_info.json", {"splits": {split: about}})
        _write_json(folder / "index.json", content)

    def fingerprint(self) -> str:
        """Short digest of the bytes of all shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    def labels_fingerprint(self) -> str:
        """Short digest of all labels and of the names of the classes; the same shards may be indexed with others."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.labels_of(slice(None)).astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def load_index(folder: str | Path) -> ShardIndex:
    """Load the index of a folder of shards.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index is damaged or of another format.
    """
    folder = Path(folder)
    file = folder / "index.json"
    if not file.exists():
        hint = f"Run: sslvit shards index {folder}" if any(folder.glob("*.tar")) else "Run: sslvit shards pack SRC DST"
        if sets := sets_below(folder):
            hint = f"Shards lie below it: {', '.join(map(printable, sets[:3]))}{', ...' if len(sets) > 3 else ''}."
        if is_unfinished(folder):
            hint = "Packing was not finished there: run the same sslvit shards pack again, or shards index --merge."
        raise FileNotFoundError(f"{folder}: no index.json there. {hint}")
    return read_index(file.read_bytes(), folder / "index.npy", str(folder))


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a packing that is not finished; a class of images may have the name `packing`, too."""
    return (folder / "packing" / "job.json").exists()


def sets_below(folder: Path) -> list[Path]:
    """The nearest folders of shards below a folder, at most two levels down."""
    for pattern in ("*", "*/*"):
        sets = {path.parent for name in ("index.json", "*.tar") for path in folder.glob(f"{pattern}/{name}")}
        if sets:
            return sorted(sets)
    return []


def common_prefix_length(names: Iterable[str]) -> int:
    """Length of the longest folder prefix, with its slash, that all names share."""
    folders = [name[: name.rfind("/") + 1] for name in names]
    return os.path.commonprefix(folders).rfind("/") + 1  # noqa: RUF071 addresses are not paths


def unlisted_warning(index: ShardIndex) -> str:
    """Warning about tar files that the index does not list, with the remedy; empty if there are none."""
    names = index.unlisted()
    if not names:
        return ""
    is_compressed = names[0].endswith(COMPRESSED_TARS)
    how = "unpack them (gunzip), then " if is_compressed else ""
    return (
        f"{len(names)} of {len(names) + len(index.shards)} tar files there are not in index.json and are NOT read (the "
        f"first: {printable(names[0])}). To read them too: {how}sslvit shards index {printable(index.location)}"
    )


def read_index(content: bytes, records_file: Path, location: str, cached_in: str = "") -> ShardIndex:
    """Build an index from the content of index.json and the records file.

    Args:
        content: Bytes of index.json.
        records_file: index.npy.
        location: Folder or address of the shards.
        cached_in: Folder in the local cache for an index made on this machine. Such an index may name shards anywhere;
            any other may only name shards in its own folder.

    Raises:
        ValueError: the index is damaged, of another format, or names shards outside its folder.
    """
    try:
        about = checked_index(parse_json(content), bool(cached_in))
        (split,) = about["splits"].values()
        check_digest(records_file, about["records_sha256"])
        records = load_records(records_file, split["num_samples"], about["classes"])
    except ValueError as error:
        where = printable(cached_in or location)
        raise ValueError(f"{where}/index.json: {printable(error)}. {_rebuild_hint(location, cached_in)}") from error
    columns = [split[name] for name in ("filenames", "shard_lengths", "bytes", "sha256")]
    shards = [Shard(*values) for values in zip(*columns, strict=True)]
    fields = {name: about[name] for name in (*INDEX_FIELDS, "job")}
    return ShardIndex(location, shards, records, **fields, cached_in=cached_in)


def _rebuild_hint(location: str, cached_in: str = "") -> str:
    if cached_in:
        return "Delete that folder: the index is made again."
    if is_url(location):
        return "Make it again where the shards lie (sslvit shards index FOLDER); upload index.json and index.npy."
    return (
        f"Make it again: sslvit shards index {printable(location) if len(location) <= MAX_REPEATED_PATH else 'FOLDER'}"
    )


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")  # ASCII only: bytes that are not UTF-8 become \\udcXX
