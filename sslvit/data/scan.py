"""What shards hold: their members, and the channels, sizes and statistics of their images."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from sslvit.data.decode import BadImage, decode, open_image
from sslvit.data.index import IMAGE_SUFFIXES, NO_LABEL, RECORD, Shard, ShardIndex, sha256_of
from sslvit.data.reader import ShardReader
from sslvit.progress import track

STATISTICS_SAMPLES = 10_000  # channel mean and std are measured on at most this many images


def index_shards(folder: str | Path) -> ShardIndex:
    """Make the index of tar shards that others wrote (WebDataset format): KEY.jpg beside KEY.cls.

    Raises:
        ValueError: no shard, a damaged one, or none with an image in it.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no .tar files there.")
    shards, records = [], []
    for path in paths:
        found = _scan(path)
        shards.append(Shard(path.name, len(found), path.stat().st_size, sha256_of(path)))
        records += found
    if not records:
        raise ValueError(f"{folder}: the shards hold no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    table = np.array(records, RECORD)
    top = int(table["label"].max())
    classes = None if (table["label"] == NO_LABEL).any() else [str(label) for label in range(top + 1)]
    index = ShardIndex(folder, shards, table, classes)
    measure_images(index)
    index.save()
    return index


def _scan(path: Path) -> list[tuple[int, int, int]]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, _, field = name.name.partition(".")
                key = str(name.parent / stem)
                if not member.isfile():
                    continue
                if f".{field.lower()}" in IMAGE_SUFFIXES:  # KEY.seg.png is another field, not the image
                    if key in images:
                        raise ValueError(f"{key} has two images")
                    images[key] = (member.offset_data, member.size)
                elif field == "cls":
                    labels[key] = int(tar.extractfile(member).read())
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path}: not a readable tar shard ({error}).") from error
    return [(offset, size, labels.get(key, NO_LABEL)) for key, (offset, size) in images.items()]


def measure_images(index: ShardIndex) -> None:
    """Fill in channels, common size, and mean and std of the channels (on up to 10,000 images spread over the set)."""
    reader = ShardReader(index, memory_limit_mb=0)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(len(index), STATISTICS_SAMPLES)).astype(int))
    moments, sizes, readable, is_grey = np.zeros((2, 3)), set(), 0, True
    for sample in track(chosen, "measuring", len(chosen)):
        try:
            content = reader.read(int(sample))
            image, mode = decode(content), open_image(content).mode
        except BadImage:
            continue
        pixels = image.numpy().reshape(3, -1) / 255
        moments += np.stack([pixels.mean(1), (pixels**2).mean(1)])  # every image counts the same, whatever its size
        sizes.add(tuple(image.shape[1:]))
        is_grey &= mode in ("L", "1") or mode.startswith("I")
        readable += 1
    if not readable:
        raise ValueError(f"{index.folder}: none of the images can be decoded.")
    index.image_size = list(sizes.pop()) if len(sizes) == 1 else None
    index.channels = 1 if is_grey else 3
    mean, square = moments[:, : index.channels] / readable
    index.mean = mean.round(4).tolist()
    index.std = np.sqrt((square - mean**2).clip(min=0)).round(4).tolist()
