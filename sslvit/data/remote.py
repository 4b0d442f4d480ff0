"""Shards from the network -> a bounded folder on this machine.

One download per machine however many processes ask, continued where it broke off, checked against the index, and
put in its place only when whole. How bytes come from the network is in transfer.py.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from sslvit.data.decode import BadImage
from sslvit.data.index import Shard, sha256_of
from sslvit.data.transfer import Gone, RemoteError, RemoteFile, TryAgain
from sslvit.files import WriteError, cache_folder, printable, write_error

TRIES = 8  # without progress: with the waits below, some two minutes
FIRST_WAIT_SECONDS = 1.0  # before the second try; doubled for each further one
LONGEST_WAIT_SECONDS = 60.0
READ_TIMEOUT_SECONDS = 60.0  # without a byte, or below the least rate
LEAST_BYTES_PER_SECOND = 4096.0  # a shard of 256 MB would take 18 hours
REMEMBERED_SECONDS = 120  # for which other processes do not ask again for a shard that is missing or damaged
PART_DAYS = 2  # after which an unfinished download is given up
MAX_INDEX_BYTES = {"index.json": 2**30, "index.npy": 2**36}  # of files that are fetched before their size is known
MARK = ".sslvit-shard-cache"  # lies in a folder in which files may be deleted
SUB_FOLDER = "sslvit-shards"  # used in a folder that holds other things
OWN_NAME = re.compile(r"[0-9a-f]{32}-[A-Za-z0-9._-]{1,80}(\.part|\.lock|\.bad)?", re.ASCII)


class ShardCache:
    """Files from the network, kept in a folder within a size; the longest unused go first.

    Args:
        folder: on a disk of this machine; one that holds other things already gets a sub-folder for the shards.
        limit_gb: size of the folder.
        tries: how often a transfer may fail without progress.
        first_wait_seconds: before the second try; doubled for each further one.
        timeout_seconds: without a byte, or below the least rate, after which a connection is given up.
        least_bytes_per_second: slower transfers count as failed.
    """

    def __init__(
        self, folder: str | Path, limit_gb: float = 200, tries: int = TRIES,
        first_wait_seconds: float = FIRST_WAIT_SECONDS, timeout_seconds: float = READ_TIMEOUT_SECONDS,
        *, least_bytes_per_second: float = LEAST_BYTES_PER_SECOND,
    ) -> None:  # fmt: skip
        self.requested = folder
        self.limit = int(limit_gb * 2**30)
        self.tries, self.first_wait, self.timeout = tries, first_wait_seconds, timeout_seconds
        self.least_rate = least_bytes_per_second
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the files are, made and marked when first asked for.

        Raises:
            ValueError: it holds other things, and so does the sub-folder.
            WriteError: it cannot be made.
        """
        if self._folder is None:
            self._folder = _marked_folder(cache_folder(self.requested))
        return self._folder

    def shard(self, address: str, shard: Shard) -> Path:
        """A shard's file on this machine.

        Raises:
            BadImage: the server does not have it, or what it has is not what the index describes.
            RemoteError: the transfer failed again and again.
            WriteError: the cache's disk is full or cannot be written to.
        """
        return self.get(address, shard.bytes, shard.sha256)

    def get(
        self, address: str, size: int | None = None, sha256: str | None = None, max_bytes: int | None = None
    ) -> Path:
        """Any file; without a checksum it is fetched anew each time, and no more of it than `max_bytes`."""
        path = self.path_of(address, sha256)
        if sha256 is not None and _touch(path):
            return path  # it got this name only after its checksum agreed
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
            lock.acquire()
        try:
            if sha256 is not None and _touch(path):
                return path  # another process was faster
            if size is not None:  # a shard; who looks for an index anew has perhaps just uploaded it
                self._recall_failure(path)
            self._make_room(size or 0, path)
            try:
                self._download(address, path, size, sha256, max_bytes)
            except BadImage as error:
                if size is not None:
                    with suppress(OSError):  # a note to others, no more
                        path.with_name(path.name + ".bad").write_text(str(error))
                raise
            if size is None:
                self._make_room(0, path)
        finally:
            lock.release()
        return path

    def path_of(self, address: str, sha256: str | None = None) -> Path:
        """Where a file is kept: named after the whole address and its content, so that none is taken for another."""
        digest = hashlib.sha256(f"{address} {sha256 or ''}".encode("utf-8", "surrogateescape")).hexdigest()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", _name_of(address)[-80:]) or "_"
        return self.folder / digest[:2] / f"{digest[:32]}-{name}"

    def _recall_failure(self, path: Path) -> None:
        noted = path.with_name(path.name + ".bad")
        with suppress(FileNotFoundError):
            if time.time() - noted.stat().st_mtime < REMEMBERED_SECONDS:
                raise BadImage(printable(noted.read_text(errors="replace"), 1000))
            noted.unlink()

    def _download(
        self, address: str, path: Path, size: int | None, sha256: str | None, max_bytes: int | None = None
    ) -> None:
        part = path.with_name(path.name + ".part")
        if size is None:
            part.unlink(missing_ok=True)
        limit = self.limit if size is not None else MAX_INDEX_BYTES.get(_name_of(address), self.limit)
        remote = RemoteFile(address, size, min(limit, max_bytes or limit), self.timeout, self.least_rate)
        failures = damages = 0
        reached, since = _length(part), time.monotonic()
        while True:
            try:
                self._transfer(remote, part)
                self._check(part, size, sha256)
                break
            except Gone:
                raise
            except BadImage as error:  # another transfer may be better
                damages += 1
                if damages == self.tries:
                    raise BadImage(
                        f"damaged shard ({printable(address)}: {error}, {damages} times). Upload it again, and its "
                        "index with it."
                    ) from error
                problem, wait, now, start_anew = str(error), 0.0, 0, True
            except TryAgain as error:
                problem, wait, now, start_anew = str(error), error.wait_seconds, _length(part), error.start_anew
            if start_anew or (sha256 is None and not remote.version):  # it could not be told what the parts belong to
                part.unlink(missing_ok=True)
            gained = now - reached
            has_progress = gained > 0 and gained >= self.least_rate * (time.monotonic() - since)
            reached, since = max(reached, now), time.monotonic()
            failures = 0 if has_progress else failures + 1
            if failures >= self.tries:
                raise RemoteError(
                    f"{printable(address)}: not fetched in {failures} tries; the last: {problem}. Check the network "
                    "and the server, then go on with --resume."
                )
            wait = max(wait, self.first_wait * 2 ** max(failures - 1, 0) * (0.5 + random.random()))  # not all at once
            time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        with _writing(path):
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)

    def _check(self, part: Path, size: int | None, sha256: str | None) -> None:
        """Raise BadImage for a file that is not the one of the index."""
        length = part.stat().st_size
        if size is not None and length != size:  # though the server says that this is all
            raise BadImage(f"{length} bytes instead of {size}")
        if sha256 is not None and sha256_of(part) != sha256:
            raise BadImage("its bytes do not have the checksum in index.json")

    def _transfer(self, remote: RemoteFile, part: Path) -> None:
        """Append to what is there already, to the end of the file.

        Raises:
            WriteError: this machine's disk is full or cannot be written to; no other try would help.
        """
        start = _length(part)
        if remote.size is not None and start > remote.size:
            part.unlink()
            start = 0
        if remote.size is not None and start == remote.size and start:
            return
        chunks = remote.chunks(start)
        first = next(chunks, None)  # before the file is opened: what is there stays if there is no answer
        try:
            with _writing(part):
                file = open(part, "r+b" if start else "wb")  # noqa: SIM115 closed below, where errors are the disk's
            try:
                at = -1
                while first is not None:
                    place, chunk = first
                    with _writing(part):
                        if place != at:
                            file.seek(place)
                            file.truncate()
                        file.write(chunk)
                    at = place + len(chunk)
                    first = next(chunks, None)
            finally:
                with _writing(part):
                    file.close()
        except WriteError:
            part.unlink(missing_ok=True)  # a full disk is in the way of others too
            raise

    def _make_room(self, size: int, keep: Path) -> None:
        """Delete the longest unused files until `size` more fits; whoever has one open can go on reading it."""
        if size > self.limit:
            raise ValueError(
                f"data.cache_gb: {self.limit / 2**30:g} GB cannot hold one shard of {size / 2**30:.2f} GB. Raise it."
            )
        with _writing(self.folder):
            lock = FileLock(self.folder / "room.lock")
            lock.acquire()
        try:
            files = []
            for file, about in self._own_files():
                is_old_part = file.suffix == ".part" and time.time() - about.st_mtime > PART_DAYS * 86_400
                if is_old_part:
                    with suppress(OSError):
                        file.unlink()
                elif file.suffix not in (".lock", ".bad"):
                    files.append((about.st_mtime, about.st_size, file))
            used = sum(length for _, length, _ in files) + size
            for _, length, file in sorted(files):
                if used <= self.limit:
                    return
                if file != keep and file.suffix != ".part":
                    with suppress(PermissionError):  # of another user, who keeps it
                        file.unlink(missing_ok=True)
                        used -= length
        finally:
            lock.release()

    def _own_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files in this folder that have a name which only this class gives."""
        for file in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if OWN_NAME.fullmatch(file.name) and file.name.startswith(file.parent.name):
                with suppress(OSError):
                    about = file.lstat()
                    if stat.S_ISREG(about.st_mode):
                        yield file, about


def _marked_folder(folder: Path) -> Path:
    """A folder in which all is ours: this one if it is new, empty or marked, otherwise one inside it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"data.cache: {printable(folder)} is not a folder.")
    for candidate in (folder, folder / SUB_FOLDER):
        with _writing(candidate):
            candidate.mkdir(parents=True, exist_ok=True)
            found = os.listdir(candidate)
            if MARK in found:
                return candidate
            if not found:  # the mark is the first file in it, so that processes that start at once agree
                (candidate / MARK).write_text("Made by sslvit for shards from the network, and cleared by it.\n")
                return candidate
    raise ValueError(
        f"data.cache: {printable(folder)} and its {SUB_FOLDER} hold files that are not of this cache. "
        "Choose an empty or a new folder."
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of this machine's disk get their own name: they are none of the network."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"data.cache: {write_error(path, error)}") from error


def _name_of(address: str) -> str:
    return Path(address.split("?")[0]).name


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> bool:
    """Whether the file is there; if so it was used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # someone else's file: it is there, only its time cannot be set
        return True
    return True
