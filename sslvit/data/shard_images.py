"""Read images from shards to pack them again: all of them, or those named in a list."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sslvit.data.header import BadImage
from sslvit.data.index import ShardIndex, load_index
from sslvit.data.sources import ImageSource, Sample
from sslvit.files import printable


class ShardImages:
    """Images in shards; the item is a sample number."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def digest(self) -> str:
        """Return a digest of the shards."""
        return self.index.fingerprint()

    def read(self, item: int) -> bytes:
        """Return the encoded image as stored in its shard."""
        shard, offset, size = self.index.locate(item)
        with open(self.index.shard_path(shard), "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise BadImage("truncated shard")
        return content


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds shards with an index."""
    return (folder / "index.json").is_file() and any(folder.glob("*.tar"))


def shard_source(folder: Path, only: str | Path | None = None) -> ImageSource:
    """Read the images of shards in order, with their labels.

    Args:
        folder: Folder of shards with their index.
        only: File with the names of the images to take, one per line, as `sslvit shards check` writes it.

    Raises:
        ValueError: there are no shards, or the list names images that are not in them.
    """
    if not holds_shards(folder):
        raise ValueError(f"--only names images of shards, and {printable(folder)} holds none. Give the checked shards.")
    index = load_index(folder)
    images, taken = ShardImages(index), None if only is None else read_names(only)
    samples = []
    for number, record in enumerate(index.records):
        name = index.key(number)
        if taken is not None and name not in taken:
            continue
        shard = int(np.searchsorted(index.first_of_shard, number, side="right")) - 1
        folders, slash, member = name.removeprefix(f"{index.shard_label(shard)}/").rpartition("/")
        stem, _, suffixes = member.partition(".")  # as WebDataset splits names
        suffix = f".{suffixes.rpartition('.')[2]}"
        size = int(record["size"])
        samples.append(Sample(f"{folders}{slash}{stem}", suffix, images, number, int(record["label"]), size))
    if taken is not None and len(samples) < len(taken):
        found = {index.key(sample.item) for sample in samples}
        other = next(name for name in taken if name not in found)
        raise ValueError(
            f"--only {printable(only)}: {len(taken) - len(samples):,} of its {len(taken):,} names are not in "
            f"{printable(folder)}, such as {printable(other)}. Give the shards that the list was written for."
        )
    if not samples:
        raise ValueError(f"{printable(only or folder)}: names no images.")
    return ImageSource(samples, index.classes, orientation=index.orientation)


def read_names(path: str | Path) -> dict[str, None]:
    """Read names from a file, one per line, without duplicates.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise ValueError(f"--only {printable(path)}: {(error.strerror or str(error)).lower()}.") from error
    return dict.fromkeys(line.removesuffix("\r") for line in lines if line.strip())
