"""A folder of files from the network that is kept within a size; the longest unused go first.

While a download is under way, its lock's file holds the room that is reserved for it, so that downloads side by side
stay within the limit together.
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

FAILURE_TTL_SECONDS = 120  # for which other processes do not ask again for a shard that is missing or damaged
EVICT_DOWN_TO = 0.95  # of the limit: the folder is then listed for one download in many
ROOM_POLL_SECONDS = 0.1  # between checks while downloads of others take all of it
MAX_PART_DAYS = 2  # after which an unfinished download is given up
USED_FILE = "room.used"  # holds how many bytes the folder has at most
MARKER = ".sslvit-shard-cache"  # lies in a folder in which files may be deleted
SUB_FOLDER = "sslvit-shards"  # used in a folder that holds other things
CACHE_NAME = re.compile(r"[0-9a-f]{32}-[A-Za-z0-9._-]{1,80}(\.part|\.lock|\.bad)?", re.ASCII)


class CacheFolder:
    """A folder whose files may be deleted, and the room in it.

    Args:
        requested: on a disk of this machine; one that holds other things already gets a sub-folder for the shards.
        limit: Size of the folder in bytes.
    """

    def __init__(self, requested: str | Path, limit: int) -> None:
        self.requested, self.limit = requested, limit
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """Where the files are, made and marked when first asked for.

        Raises:
            ValueError: it holds other things, and so does the sub-folder.
            WriteError: it cannot be made.
        """
        if self._path is None:
            self._path = _claim_folder(cache_folder(self.requested))
        return self._path

    def reserve(self, size: int, path: Path, lock: int | None) -> None:
        """Make room for a download, by deleting the longest unused files, and note in its lock that it is taken.

        Whoever has a deleted file open can go on reading it. Where other downloads take all the room, they are waited
        for. The folder is only listed when what is noted in it comes to the limit.
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
                    os.pwrite(lock, str(size).encode(), 0)
                write_atomically(note, str(used + size if is_free else used), sync=False)
        return is_free or lock is None

    def _evict(self, size: int, keep: Path) -> int:
        """Delete what need not be kept until `size` more fits, and some more; returns how much is in use."""
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
                    continue  # under way: its lock says how long it becomes
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
            if not reserved and file not in kept:  # it may have come just now
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
        """The files in this folder that have a name which only this class gives."""
        for file in self.path.glob("[0-9a-f][0-9a-f]/*"):
            if CACHE_NAME.fullmatch(file.name) and file.name.startswith(file.parent.name):
                with suppress(OSError):
                    about = file.lstat()
                    if stat.S_ISREG(about.st_mode):
                        yield file, about


def _claim_folder(folder: Path) -> Path:
    """A folder in which all is ours: this one if it is new, empty or marked, otherwise one inside it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"data.cache: {printable(folder)} is not a folder.")
    for candidate in (folder, folder / SUB_FOLDER):
        with disk_errors_named(candidate):
            candidate.mkdir(parents=True, exist_ok=True)
            found = os.listdir(candidate)
            if MARKER in found:
                return candidate
            if not found:  # the mark is the first file in it, so that processes that start at once agree
                (candidate / MARKER).write_text("Made by sslvit for shards from the network, and cleared by it.\n")
                return candidate
    raise ValueError(
        f"data.cache: {printable(folder)} and its {SUB_FOLDER} hold files that are not of this cache. "
        "Choose an empty or a new folder."
    )


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Errors of this machine's disk get their own name: they are none of the network."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"data.cache: {write_error(path, error)}") from error


@contextmanager
def locked(lock: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold a lock in the cache; errors of its file are those of the disk."""
    with ExitStack() as stack:
        with disk_errors_named(lock):
            handle = stack.enter_context(lock_file(lock, wait))
        yield handle


def _reserved(lock: Path) -> int:
    """Bytes that a download under way has reserved; 0 for one whose process was killed, and its lock goes."""
    note = _read_number(lock) or 0
    with lock_file(lock, wait=False) as handle:
        return note if handle is None else 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return None


def _unlink(path: Path) -> bool:
    """Whether the file is gone; one of another user stays."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
