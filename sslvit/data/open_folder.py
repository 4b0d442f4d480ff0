"""Open an image folder as data: its shards are packed into the cache on first use."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from filelock import FileLock

from sslvit.data.first_rank import is_local_rank_zero, publish_folder, wait_for_folder
from sslvit.data.folders import folder_source
from sslvit.data.header import BadImage, read_header
from sslvit.data.index import ShardIndex, load_index
from sslvit.data.pack import pack
from sslvit.data.plan import evenly_spaced
from sslvit.data.remote import ShardCache
from sslvit.data.sources import ImageSource
from sslvit.data.unfinished import digest_samples, digest_times
from sslvit.files import printable

logger = logging.getLogger(__name__)

Check = Callable[[ImageSource], None]  # raises ValueError to reject a folder before it is packed
MAX_LOOKED_AT = 16  # evenly spaced images whose headers are read to find the channels


def open_image_folder(path: Path, cache: ShardCache, check: Check | None = None) -> ShardIndex:
    """The index of an image folder's shards, which are packed into the cache on first use; `check` may reject it."""
    notes = cache.folder / "packed"
    if not is_local_rank_zero() and (folder := wait_for_folder(notes, path)) is not None:
        with FileLock(folder / ".pack.lock"):  # the first process may still be packing
            if (folder / "index.json").exists():
                return load_index(folder)
    with publish_folder(notes, path) if is_local_rank_zero() else nullcontext() as publish:
        found = folder_source(path)
        folder = packed_folder(path, found, cache)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".pack.lock"):
            if publish is not None:
                publish(folder)  # from now on, the others wait for the lock
            index = _pack_once(path, found, folder, check)
    return index


def _pack_once(path: Path, found: ImageSource, folder: Path, check: Check | None) -> ShardIndex:
    """The index of a folder's shards, which are packed now unless they exist."""
    with suppress(FileNotFoundError, ValueError):  # the cache may have been cleared of some files
        index = load_index(folder)
        if not index.missing_shards():
            logger.info(f"{printable(path)}: an image folder; using its shards packed earlier in {folder}.")
            return index
    if check is not None:
        check(found)
    for note in found.notes:
        logger.info(f"{printable(path)}: {note}")
    logger.info(f"{printable(path)}: an image folder; packing it into {folder} first.")
    packed = pack(found.samples, folder, found.classes, overwrite=True, skipped=found.skipped)
    assert packed is not None  # None only for a part
    return packed


def channels_of(found: ImageSource) -> set[int]:
    """Numbers of channels found in a few readable images of a folder."""
    numbers = set()
    for sample in evenly_spaced(len(found.samples), MAX_LOOKED_AT):
        with suppress(BadImage, OSError):
            numbers.add(read_header(found.samples[int(sample)].read()).channels)
    return numbers


def packed_folder(path: Path, found: ImageSource, cache: ShardCache) -> Path:
    """Cache folder for an image folder's shards; its name depends on all file names, sizes, times and classes."""
    about = f"{digest_samples(found.samples)} {digest_times(found.samples)} {found.classes}"
    digest = hashlib.sha256(about.encode("utf-8", "surrogateescape"))
    name = re.sub(r"[^\w-]", "_", path.resolve().name) or "images"
    return cache.folder / "packed" / f"{name[:40]}-{digest.hexdigest()[:16]}"
