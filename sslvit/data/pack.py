"""Images -> tar shards and their index.

Shards are WebDataset's: KEY.jpg (or .png, ...) beside KEY.cls, which holds the class number. Files go in
unchanged, in an order shuffled by a fixed seed, and the same input gives the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sslvit.chance import generator
from sslvit.data.decode import BadImage, open_image
from sslvit.data.index import IMAGE_SUFFIXES, NO_LABEL, RECORD, Shard, ShardIndex, load_index, sha256_of
from sslvit.data.scan import index_shards, measure_images
from sslvit.progress import track

MAX_MEMBER_NAME = 100  # of the plain tar header


@dataclass
class Sample:
    """One image on its way into a shard.

    Args:
        key: its name; made unique and free of dots on the way.
        suffix: of the image file, with the dot.
        read: returns the bytes.
        label: class number, or NO_LABEL.
    """

    key: str
    suffix: str
    read: Callable[[], bytes]
    label: int = NO_LABEL


def open_shards(source: str | Path, beside: str | Path) -> ShardIndex:
    """The index of a shard folder; shards without one are indexed, and an image folder is packed first.

    Args:
        source: a folder of shards or of images.
        beside: where the shards of an image folder go, or lie already.

    Raises:
        FileNotFoundError: nothing given, or nothing there.
        ValueError: no images there, or a damaged index.
    """
    path, beside = Path(source), Path(beside)
    if not source or not path.is_dir():
        given = f"{path} is not a folder" if source else "no data given"
        raise FileNotFoundError(f"{given}. Pass a folder of images or of shards (sslvit shards pack SRC DST).")
    if (path / "index.json").exists():
        return load_index(path)
    if any(path.glob("*.tar")):
        print(f"{path}: shards without an index; indexing them once.")
        return index_shards(path)
    if (path / "train" / "index.json").exists():
        raise FileNotFoundError(f"{path}: holds train/ and val/, not shards. Pass {path / 'train'}.")
    samples, _ = folder_samples(path)
    origin = {"folder": str(path.resolve()), "images": len(samples)}
    noted = beside / "source.json"
    if (beside / "index.json").exists():
        if not noted.exists() or json.loads(noted.read_text()) != origin:
            raise ValueError(f"{beside}: holds shards of other images than {path} has now. Delete it, or pack by hand.")
        print(f"{path}: an image folder; using its shards packed earlier in {beside}.")
        return load_index(beside)
    print(f"{path}: an image folder; packing it into {beside} first.")
    (index,) = pack_folder(path, beside)
    noted.write_text(json.dumps(origin) + "\n")
    return index


def pack_folder(
    source: str | Path,
    destination: str | Path,
    holdout: float = 0.0,
    shard_mb: float = 256,
    overwrite: bool = False,
) -> list[ShardIndex]:
    """Pack an image folder: one class per sub-folder, or a flat folder without labels.

    Args:
        source: images in sub-folders (at any depth below a class), or images side by side.
        destination: folder for the shards; with a holdout its train/ and val/.
        holdout: share of each class, the last by file name, that goes to val/ instead.
        shard_mb: size at which a new shard is begun.
        overwrite: replace shards that are already there.

    Returns:
        The index, or those of train and val.

    Raises:
        ValueError: no images, images beside class folders, or shards already there.
    """
    source, destination = Path(source), Path(destination)
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout {holdout}: not a share between 0 and 1 (0.1 keeps a tenth for validation).")
    samples, classes = folder_samples(source)
    if not holdout:
        return [pack(samples, destination, classes, shard_mb, overwrite)]
    for name in ("train", "val"):
        check_destination(destination / name, overwrite)
    train, val = hold_out(samples, holdout)
    return [
        pack(part, destination / name, classes, shard_mb, overwrite) for name, part in (("train", train), ("val", val))
    ]


def hold_out(samples: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Train and validation: the last share of each class, at least one image, unless it has only one.

    Raises:
        ValueError: every class has one image.
    """
    train, val = [], []
    for label in sorted({sample.label for sample in samples}):
        of_class = [sample for sample in samples if sample.label == label]
        cut = max(1, len(of_class) - max(1, round(share * len(of_class))))
        train, val = train + of_class[:cut], val + of_class[cut:]
    if not val:
        raise ValueError(f"--holdout {share}: no class has two images, so none can be held out.")
    return train, val


def folder_samples(source: Path) -> tuple[list[Sample], list[str] | None]:
    """The images of a folder in the order of their names, and the classes if there are sub-folders."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder.")
    try:
        entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{source}: not readable ({error.strerror}). Check its permissions.") from error
    folders = [entry for entry in entries if entry.is_dir()]
    here = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]
    if here and folders:
        raise ValueError(
            f"{source}: holds images ({here[0].name}, ...) beside folders ({folders[0].name}, ...). "
            "Either one folder per class, or all images side by side."
        )
    if here:
        return [_file_sample(path, source, NO_LABEL) for path in here], None
    samples = [
        _file_sample(path, source, label)
        for label, folder in enumerate(folders)
        for path in _files_below(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not samples:
        raise ValueError(
            f"{source}: no images there (looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and its folders)."
        )
    return samples, [folder.name for folder in folders]


def array_samples(
    images: np.ndarray, labels: Iterable[int] | None = None, numbers: Iterable[int] | None = None
) -> list[Sample]:
    """Images in memory (uint8, 'n h w' or 'n h w c') as PNG samples, named by their numbers (0, 1, ... for None)."""

    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()

    labels = [NO_LABEL] * len(images) if labels is None else labels
    numbers = range(len(images)) if numbers is None else numbers
    return [
        Sample(f"{number:06d}", ".png", lambda image=image: png(image), int(label))
        for number, image, label in zip(numbers, images, labels, strict=True)
    ]


def pack(
    samples: list[Sample],
    destination: str | Path,
    classes: list[str] | None = None,
    shard_mb: float = 256,
    overwrite: bool = False,
) -> ShardIndex:
    """Write shards and their index; unreadable images are left out, counted and named in the index.

    Raises:
        ValueError: shards are already there, nothing is readable, or nothing was given.
    """
    destination = Path(destination)
    if not samples:
        raise ValueError(f"{destination}: no images to pack.")
    check_destination(destination, overwrite)
    destination.mkdir(parents=True, exist_ok=True)
    order = generator(0, "pack").permutation(len(samples))
    records: list[tuple[int, int, int]] = []
    shards: list[Shard] = []
    skipped: dict[str, str] = {}
    keys = _unique_keys(samples)
    shard = _ShardWriter(destination, 0)
    for i in track(order, "packing", len(samples)):
        sample = samples[i]
        try:
            content = sample.read()
            open_image(content)
        except (BadImage, OSError) as error:
            skipped[sample.key + sample.suffix] = str(error)
            continue
        if shard.bytes and shard.bytes + len(content) > shard_mb * 2**20:
            shards.append(shard.close())
            shard = _ShardWriter(destination, len(shards))
        records.append(shard.add(keys[i], sample, content))
    shards.append(shard.close())
    if not records:
        shard.part.unlink()
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{destination}: none of {len(samples)} images is readable (the first: {name}: {reason}).")
    for old in [*destination.glob("shard-*.tar"), *destination.glob("index.*")]:
        old.unlink()  # with --overwrite, and only now that the new ones are whole
    for new in shards:
        os.replace(destination / f"{new.name}.part", destination / new.name)
    index = ShardIndex(destination, shards, np.array(records, RECORD), classes, skipped=skipped)
    measure_images(index)
    index.save()
    if skipped:
        name, reason = next(iter(skipped.items()))
        print(f"left out {len(skipped)} of {len(samples)} images (the first: {name}: {reason}); all are in index.json")
    return index


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if shards lie there and may not be replaced."""
    if not overwrite and (any(folder.glob("*.tar")) or (folder / "index.json").exists()):
        raise ValueError(f"{folder}: already holds shards. Choose another folder, or pass --overwrite.")


class _ShardWriter:
    """A tar file under a temporary name."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"shard-{number:06d}.tar"
        self.part = folder / f"{self.name}.part"
        self.tar = tarfile.open(self.part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed in close()
        self.samples = 0

    @property
    def bytes(self) -> int:
        return self.tar.offset

    def add(self, key: str, sample: Sample, content: bytes) -> tuple[int, int, int]:
        offset = self._member(key + sample.suffix, content)
        if sample.label != NO_LABEL:
            self._member(key + ".cls", str(sample.label).encode())
        self.samples += 1
        return offset, len(content), sample.label

    def _member(self, name: str, content: bytes) -> int:
        about = tarfile.TarInfo(name)
        about.size = len(content)
        self.tar.addfile(about, io.BytesIO(content))  # mtime, owner and mode stay at fixed defaults
        padding = -len(content) % tarfile.BLOCKSIZE
        return self.tar.offset - padding - len(content)

    def close(self) -> Shard:
        self.tar.close()
        return Shard(self.name, self.samples, self.part.stat().st_size, sha256_of(self.part))


def _files_below(folder: Path) -> list[Path]:
    """All files at any depth, in the order of their names; an unreadable folder is an error, not an empty class."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: not readable ({error.strerror}). Check its permissions.") from error

    found = [Path(root) / name for root, _, names in os.walk(folder, onerror=refuse) for name in names]
    return sorted(found)


def _file_sample(path: Path, root: Path, label: int) -> Sample:
    return Sample(str(path.relative_to(root).with_suffix("")), path.suffix.lower(), path.read_bytes, label)


def _unique_keys(samples: list[Sample]) -> list[str]:
    """Keys without dots, which WebDataset would split at, and short enough for a tar header."""
    taken: set[str] = set()
    keys = []
    for number, sample in enumerate(samples):
        key = re.sub(r"[^\w/+-]", "_", sample.key)
        if key in taken or len(key.encode()) + len(sample.suffix) + 1 > MAX_MEMBER_NAME:
            key = f"{number:09d}"
        taken.add(key)
        keys.append(key)
    return keys
