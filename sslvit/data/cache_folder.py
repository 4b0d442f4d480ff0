"""A size-limited cache folder for files from the network; the least recently used files are deleted first.

While a download is running, its lock file holds the number of bytes reserved for it, so that parallel downloads stay
within the limit together.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sslvit.files import WriteError, cache_folder, printable, write_atomically, write_error
from sslvit.locks import lock_file

FAILURE_TTL_SECONDS = 120  # during which no process asks again for a missing or damaged shard
EVICT_DOWN_TO = 0.95  # fraction of the limit; the slack means that few downloads have to list the folder
ROOM_POLL_SECONDS = 0.1  # between checks while other downloads occupy all the room
MAX_PART_DAYS = 2  # age at which an unfinished download is deleted
USED_FILE = "room.used"  # holds an upper bound of the bytes in the folder
MARKER = ".sslvit-shard-cache"  # marks a folder whose files may be deleted
SUB_FOLDER = "sslvit-shards"  # used inside a folder that holds other files
CACHE_NAME = re.compile(r"[0-9a-f]{32}-[A-Za-z0-9._-]{1,80}(\.part|\.lock|\.bad)?", re.ASCII)


class CacheFolder:
    """A folder whose files may be deleted, with a limit on its size.

    Args:
        requested: Folder on a local disk; if it already holds other files, a sub-folder is used.
        limit: Size of the folder in bytes.
    """

    def __init__(self, requested: str | Path, limit: int) -> None:
        self.requested, self.limit = requested, limit
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """Path of the folder, which is created and marked on first use.

        Raises:
            ValueError: the folder and its sub-folder both hold other files.
            WriteError: the folder cannot be created.
        """
        if self._path is None:
            self._path = _claim_folder(cache_folder(self.requested))
        return self._path

    def reserve(self, size: int, path: Path, lock: int | None) -> None:
        """Make room for a download by deleting the least recently used files, and note its size in its lock file.

        A process that has a deleted file open can go on reading it. If other downloads occupy all the room, this waits
        for them. The folder is listed only when the noted bytes reach the limit.
        """
        if size > self.limit:
            raise ValueError(
                f"data.cache_gb: {self.limit / 2**30:g} GB cannot hold one shard of {size / 2**30:.2f} GB. Raise it."
            )
        while not self._try_reserve(size, path, lock):
            time.sleep(ROOM_POLL_SECONDS)

    def _try_reserve(self, size: int, path: Path, lock: int | None) -> bool:
        note = self.path / USED_FILE
        with locked(self.path / "room.lock"):
            used = _read_number(note)
            if lock is None or used is None or used + size > self.limit:
                used = self._evict(size, path)
            is_free = used + size <= self.limit
            with disk_errors_named(note):
                if is_free and lock is not None:
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, str(size).encode(), 0)
                write_atomically(note, str(used + size if is_free else used), sync=False)
        return is_free or lock is None

    def _evict(self, size: int, keep: Path) -> int:
        """Delete files until `size` more bytes fit, with some slack; returns the number of bytes in use."""
        kept: dict[Path, os.stat_result] = {}
        used, now, locks = 0, time.time(), []
        for file, about in self.files():
            kind = file.suffix if file.suffix in (".part", ".lock", ".bad") else ""
            if kind == ".lock":
                locks.append(file)
            elif kind == ".bad":
                if now - about.st_mtime > FAILURE_TTL_SECONDS:
                    _unlink(file)
            elif kind == ".part":
                if file.with_suffix(".lock").exists():
                    continue  # still running: its lock holds its final size
                if now - about.st_mtime > MAX_PART_DAYS * 86_400:
                    _unlink(file)
                else:
                    used += about.st_size
            else:
                kept[file] = about
        for lock in locks:
            file = lock.with_suffix("")
            if file == keep:
                continue
            reserved = _reserved(lock)
            if not reserved and file not in kept:  # the download may have just finished
                with suppress(OSError):
                    kept[file] = file.stat()
            used += reserved
        used += sum(about.st_size for about in kept.values())
        if used + size <= self.limit:
            return used
        for file in sorted(kept, key=lambda file: kept[file].st_mtime):
            if used + size <= max(EVICT_DOWN_TO * self.limit, size):
                break
            if file != keep and _unlink(file):
                used -= kept[file].st_size
        return used

    def files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of the cache, recognized by their names."""
        for file in self.path.glob("[0-9a-f][0-9a-f]/*"):
            if CACHE_NAME.fullmatch(file.name) and file.name.startswith(file.parent.name):
                with suppress(OSError):
                    about = file.lstat()
                    if stat.S_ISREG(about.st_mode):
                        yield file, about


def _claim_folder(folder: Path) -> Path:
    """A folder of our own: the given one if it is new, empty or marked, otherwise a sub-folder of it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"data.cache: {printable(folder)} is not a folder.")
    for candidate in (folder, folder / SUB_FOLDER):
        with disk_errors_named(candidate):
            candidate.mkdir(parents=True, exist_ok=True)
            found = os.listdir(candidate)
            if MARKER in found:
                return candidate
            if not found:  # the marker is the first file, so that processes that start together agree
                (candidate / MARKER).write_text("Made by sslvit for shards from the network, and cleared by it.\n")
                return candidate
    raise ValueError(
        f"data.cache: {printable(folder)} and its {SUB_FOLDER} hold files that are not of this cache. "
        "Choose an empty or a new folder."
    )


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Raise errors of the local disk as WriteError, to tell them from errors of the network."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"data.cache: {write_error(path, error)}") from error


@contextmanager
def locked(lock: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold a lock in the cache; raises WriteError if the lock file cannot be written."""
    with ExitStack() as stack:
        with disk_errors_named(lock):
            handle = stack.enter_context(lock_file(lock, wait))
        yield handle


def _reserved(lock: Path) -> int:
    """Bytes reserved by a running download; 0 if its process was killed, and then the lock file is deleted."""
    note = _read_number(lock) or 0
    with lock_file(lock, wait=False) as handle:
        return note if handle is None else 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return None


def _unlink(path: Path) -> bool:
    """Delete a file; returns False if it belongs to another user and stays."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
