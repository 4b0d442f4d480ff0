"""Shards from the network -> a bounded folder on this machine.

One download per machine however many processes ask, continued where it broke off, checked against the index, and
put in its place only when whole. How bytes come from the network is in transfer.py, how the folder stays within its
size in cache_folder.py.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sslvit.data.cache_folder import FAILURE_TTL_SECONDS, CacheFolder, disk_errors_named, locked
from sslvit.data.header import BadImage
from sslvit.data.opener import RemoteError
from sslvit.data.records import sha256_of
from sslvit.data.transfer import Gone, RemoteFile, TryAgain
from sslvit.files import WriteError, printable

MAX_TRIES = 8  # without progress: with the waits below, some two minutes
FIRST_WAIT_SECONDS = 1.0  # before the second try; doubled for each further one
MAX_WAIT_SECONDS = 60.0
READ_TIMEOUT_SECONDS = 60.0  # without a byte, or below the minimum rate
MIN_BYTES_PER_SECOND = 4096.0  # a shard of 256 MB would take 18 hours
MAX_INDEX_BYTES = {"index.json": 2**30, "index.npy": 2**36}  # of files that are fetched before their size is known
VERSION_THREADS = 16  # shards without an index, for their versions


class ShardCache:
    """Files from the network, kept in a folder within a size; the longest unused go first.

    Args:
        folder: on a disk of this machine; one that holds other things already gets a sub-folder for the shards.
        limit_gb: size of the folder.
        tries: Number of failures without progress after which a transfer is given up.
        first_wait_seconds: Wait before the second try; doubled for each further one.
        timeout_seconds: without a byte, or below the minimum rate, after which a connection is given up.
        min_bytes_per_second: slower transfers count as failed.
    """

    def __init__(
        self, folder: str | Path, limit_gb: float = 200, tries: int = MAX_TRIES,
        first_wait_seconds: float = FIRST_WAIT_SECONDS, timeout_seconds: float = READ_TIMEOUT_SECONDS,
        *, min_bytes_per_second: float = MIN_BYTES_PER_SECOND,
    ) -> None:  # fmt: skip
        self.room = CacheFolder(folder, int(limit_gb * 2**30))
        self.tries, self.first_wait, self.timeout = tries, first_wait_seconds, timeout_seconds
        self.min_rate = min_bytes_per_second

    @property
    def folder(self) -> Path:
        """Where the files are, made and marked when first asked for."""
        return self.room.path

    def fetch_if_free(self, address: str, size: int, sha256: str) -> bool:
        """Fetch a shard ahead of its use; False if another process or thread is fetching it."""
        return self._get(address, size, sha256, wait=False) is not None

    def get(
        self, address: str, size: int | None = None, sha256: str | None = None, max_bytes: int | None = None,
        expected: int | None = None,
    ) -> Path:  # fmt: skip
        """Return any file, which is fetched first.

        Args:
            address: Address of the file.
            size: its length as an index tells it; another one is damage.
            sha256: its checksum; without one it is fetched anew each time.
            max_bytes: more of it are not taken.
            expected: its length as the server tells it, for which room is made.

        Raises:
            BadImage: the server does not have it, or what it has is not what the index describes.
            RemoteError: the transfer failed again and again.
            WriteError: the cache's disk is full or cannot be written to.
        """
        path = self._get(address, size, sha256, max_bytes, expected)
        assert path is not None  # waited for
        return path

    def _get(
        self, address: str, size: int | None, sha256: str | None, max_bytes: int | None = None,
        expected: int | None = None, wait: bool = True,
    ) -> Path | None:  # fmt: skip
        path = self.path_of(address, sha256)
        if sha256 is not None and _touch(path):
            return path  # it got this name only after its checksum agreed
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), wait) as lock:
            if lock is None:
                return None
            if sha256 is not None and _touch(path):
                return path  # another process was faster
            if size is not None:  # a shard; who looks for an index anew has perhaps just uploaded it
                self._raise_recent_failure(path)
            self.room.reserve(size or expected or 0, path, lock)
            try:
                self._download(address, path, size, sha256, max_bytes)
            except BadImage as error:
                if size is not None:
                    with suppress(OSError):  # a note to others, no more
                        path.with_name(path.name + ".bad").write_text(str(error))
                raise
            if size is None and expected is None:  # only now is its length known
                os.truncate(lock, 0)
                self.room.reserve(0, path, None)
        return path

    def versions(self, addresses: list[str]) -> list[dict[str, str]]:
        """What tells each file from another one at its address: length, ETag, date, as far as its server says them.

        Raises:
            BadImage: there is no such file.
            RemoteError: the server refuses, or does not answer.
        """
        with ThreadPoolExecutor(min(len(addresses), VERSION_THREADS) or 1) as threads:
            return list(threads.map(self._version, addresses))

    def _version(self, address: str) -> dict[str, str]:
        remote = RemoteFile(address, None, self.room.limit, self.timeout, self.min_rate)
        for failures in range(1, self.tries + 1):
            try:
                return remote.ask_version()
            except TryAgain as error:
                if failures == self.tries:
                    raise RemoteError(
                        f"{printable(address)}: no answer in {failures} tries; the last: {error}. Check the network "
                        "and the server."
                    ) from error
                time.sleep(self._wait(failures, error.wait_seconds))
        raise AssertionError("unreachable")

    def rename_to_digest(self, address: str, sha256: str) -> None:
        """Keep a file that came without a checksum under the name of its content, so that it is not fetched twice."""
        path = self.path_of(address, sha256)
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # gone already, for room
                os.replace(self.path_of(address), path)

    def _wait(self, failures: int, minimum: float) -> float:
        """Seconds before the next try, longer after each failure, and not the same for all who failed at once."""
        wait = self.first_wait * 2 ** max(failures - 1, 0) * (0.5 + random.random())
        return min(max(minimum, wait), MAX_WAIT_SECONDS)

    def path_of(self, address: str, sha256: str | None = None) -> Path:
        """Where a file is kept: named after the whole address and its content, so that none is taken for another."""
        digest = hashlib.sha256(f"{address} {sha256 or ''}".encode("utf-8", "surrogateescape")).hexdigest()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", _name_of(address)[-80:]) or "_"
        return self.room.path / digest[:2] / f"{digest[:32]}-{name}"

    def _raise_recent_failure(self, path: Path) -> None:
        note = path.with_name(path.name + ".bad")
        with suppress(FileNotFoundError):
            if time.time() - note.stat().st_mtime < FAILURE_TTL_SECONDS:
                raise BadImage(printable(note.read_text(errors="replace"), 1000))
            note.unlink()

    def _download(
        self, address: str, path: Path, size: int | None, sha256: str | None, max_bytes: int | None = None
    ) -> None:
        partial = path.with_name(path.name + ".part")
        if size is None:
            partial.unlink(missing_ok=True)
        limit = self.room.limit if size is not None else MAX_INDEX_BYTES.get(_name_of(address), self.room.limit)
        remote = RemoteFile(address, size, min(limit, max_bytes or limit), self.timeout, self.min_rate)
        failures = damages = 0
        reached, since = _length(partial), time.monotonic()
        while True:
            try:
                self._transfer(remote, partial)
                self._check(partial, size, sha256)
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
                problem, wait, now, restart = str(error), 0.0, 0, True
            except TryAgain as error:
                problem, wait, now, restart = str(error), error.wait_seconds, _length(partial), error.restart
            if restart or (sha256 is None and not remote.version):  # it could not be told what the parts belong to
                partial.unlink(missing_ok=True)
            gained = now - reached
            has_progress = gained > 0 and gained >= self.min_rate * (time.monotonic() - since)
            reached, since = max(reached, now), time.monotonic()
            failures = 0 if has_progress else failures + 1
            if failures >= self.tries:
                raise RemoteError(
                    f"{printable(address)}: not fetched in {failures} tries; the last: {problem}. Check the network "
                    "and the server, then give the command again (sslvit resume RUN goes on with a run)."
                )
            time.sleep(self._wait(failures, wait))
        with disk_errors_named(path):
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)

    def _check(self, partial: Path, size: int | None, sha256: str | None) -> None:
        """Raise BadImage for a file that is not the one of the index."""
        length = partial.stat().st_size
        if size is not None and length != size:  # though the server says that this is all
            raise BadImage(f"{length} bytes instead of {size}")
        if sha256 is not None and sha256_of(partial) != sha256:
            raise BadImage("its bytes do not have the checksum in index.json")

    def _transfer(self, remote: RemoteFile, partial: Path) -> None:
        """Append to what is there already, to the end of the file.

        Raises:
            WriteError: this machine's disk is full or cannot be written to; no other try would help.
        """
        start = _length(partial)
        if remote.size is not None and start > remote.size:
            partial.unlink()
            start = 0
        if remote.size is not None and start == remote.size and start:
            return
        chunks = remote.chunks(start)
        first = next(chunks, None)  # before the file is opened: what is there stays if there is no answer
        try:
            with disk_errors_named(partial):
                file = open(partial, "r+b" if start else "wb")  # noqa: SIM115 closed below, where errors are the disk's
            try:
                end = -1
                while first is not None:
                    position, chunk = first
                    with disk_errors_named(partial):
                        if position != end:
                            file.seek(position)
                            file.truncate()
                        file.write(chunk)
                    end = position + len(chunk)
                    first = next(chunks, None)
            finally:
                with disk_errors_named(partial):
                    file.close()
        except WriteError:
            partial.unlink(missing_ok=True)  # a full disk is in the way of others too
            raise


def _name_of(address: str) -> str:
    return Path(address.split("?")[0]).name


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> bool:
    """Whether the file is there; if so it was used just now."""
    with suppress(OSError):  # someone else's file may be there, only its time cannot be set
        os.utime(path)
    return os.path.exists(path)
