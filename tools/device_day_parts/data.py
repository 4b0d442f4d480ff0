"""Images for the other parts: CIFAR-10 and photographs as shards, from --data or generated."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from device_day_parts.common import Day, last_line

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
SYNTHETIC_CIFAR, SYNTHETIC_PHOTOS = 20_000, 64
MIN_PHOTOS = 1024  # fewer are packed several times, since a batch cannot be larger than its data set


def run_part(day: Day) -> None:
    for name, pack in (("cifar", pack_cifar), ("photos", pack_photos)):
        folder = day.work / name
        try:
            origin, images = pack(day, folder)
        except Exception as error:  # unexpected data: use generated images
            shutil.rmtree(folder, ignore_errors=True)
            origin, images = pack(Day(**{**vars(day), "data": None}), folder)
            origin = f"{origin} ({last_line(error)})"
        (day.work / f"{name}.ready").write_text(origin)
        day.record(data=name, origin=origin, images=images)


def find(data: Path | None, word: str) -> Path | None:
    """Find an archive or a folder whose name begins with a word; archives take precedence."""
    found = [] if data is None else [path for path in data.iterdir() if path.name.lower().startswith(word)]
    archives = sorted(path for path in found if path.is_file() and ".t" in path.name)
    return next(iter([*archives, *sorted(path for path in found if path.is_dir())]), None)


def pack_cifar(day: Day, folder: Path) -> tuple[str, int]:
    """Pack CIFAR-10 into train/ and test/."""
    from device_day_parts.common import pack_noise
    from sslvit.data.pack import pack_source
    from sslvit.reports.demo import pack_cifar10

    found = find(day.data, "cifar")
    if found is None:
        pack_noise(folder / "test", day.pick(2000, 40), 32)
        pack_noise(folder / "train", day.pick(SYNTHETIC_CIFAR, 64), 32)
        return "synthetic", day.pick(SYNTHETIC_CIFAR, 64)
    if found.is_file():
        return found.name, len(pack_cifar10(folder, str(found), day.work / "unpacked"))
    if (found / "train" / "index.json").exists():
        from sslvit.data.index import load_index

        folder.mkdir()
        test = next(found / name for name in ("test", "val") if (found / name).exists())
        (folder / "train").symlink_to((found / "train").resolve())
        (folder / "test").symlink_to(test.resolve())
        return found.name, len(load_index(found / "train"))
    train, test = pack_source(found, folder, holdout=0.1)
    (folder / "val").rename(folder / "test")
    return found.name, len(train)


def pack_photos(day: Day, folder: Path) -> tuple[str, int]:
    """Pack at least MIN_PHOTOS photographs."""
    from sslvit.data.pack import pack_source

    found, source = find(day.data, "photo"), day.work / "photographs"
    if found is None:
        make_photos(source, day.pick(SYNTHETIC_PHOTOS, 4))
    elif found.is_file():
        with tarfile.open(found) as tar:
            tar.extractall(source, filter="data")
    else:
        source = found
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"{found}: no images.")
    copies = -(-day.pick(MIN_PHOTOS, 16) // len(files))
    repeated = day.work / "repeated"
    repeated.mkdir(exist_ok=True)
    for number, file in enumerate(files * copies):
        shutil.copy(file, repeated / f"{number:06d}{file.suffix.lower()}")
    (index,) = pack_source(repeated, folder)
    shutil.rmtree(repeated)
    return f"{'synthetic' if found is None else found.name}, {len(files)} files {copies} times", len(index)


def make_photos(folder: Path, count: int) -> None:
    """Generate JPEGs with the usual dimensions and file size of ImageNet's."""
    import numpy as np
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)  # of an archive that could not be used
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(source.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        pixels = np.asarray(coarse) + source.normal(0, 12, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)
