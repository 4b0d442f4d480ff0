"""Fetch shards from the network into a size-limited cache folder.

Each file is downloaded once per machine, however many processes need it. An interrupted download is resumed, and a file
is checked against the index before it gets its final name. transfer.py downloads the bytes, and cache_folder.py limits
the size of the folder.
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

MAX_TRIES = 8  # without progress; about two minutes with the waits below
FIRST_WAIT_SECONDS = 1.0  # before the second try; doubled for each further one
MAX_WAIT_SECONDS = 60.0
READ_TIMEOUT_SECONDS = 60.0  # without data, or below the minimum rate
MIN_BYTES_PER_SECOND = 4096.0  # a shard of 256 MB would take 18 hours
MAX_INDEX_BYTES = {"index.json": 2**30, "index.npy": 2**36}  # limits for files whose size is not known in advance
VERSION_THREADS = 16  # parallel requests for the versions of shards without an index


class ShardCache:
    """A size-limited cache of files from the network; the least recently used files are deleted first.

    Args:
        folder: Folder on a local disk; if it already holds other files, a sub-folder is used.
        limit_gb: Maximum size of the folder in GB.
        tries: Number of consecutive failures without progress after which a transfer is abandoned.
        first_wait_seconds: Wait before the second try; doubled for each further one.
        timeout_seconds: Seconds without data, or below the minimum rate, after which a connection is abandoned.
        min_bytes_per_second: Minimum rate; slower transfers count as failed.
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
        """Path of the folder, which is created and marked on first use."""
        return self.room.path

    def fetch_if_free(self, address: str, size: int, sha256: str) -> bool:
        """Fetch a shard in advance; False if another process or thread is fetching it."""
        return self._get(address, size, sha256, wait=False) is not None

    def get(
        self, address: str, size: int | None = None, sha256: str | None = None, max_bytes: int | None = None,
        expected: int | None = None,
    ) -> Path:  # fmt: skip
        """Fetch a file unless it is cached, and return its local path.

        Args:
            address: Address of the file.
            size: Size given by the index; a file of another size is damaged.
            sha256: Checksum; without one, the file is fetched again each time.
            max_bytes: Maximum size.
            expected: Size given by the server, used to make room.

        Raises:
            BadImage: the server does not have the file, or it does not match the index.
            RemoteError: the transfer failed repeatedly.
            WriteError: the cache's disk is full or cannot be written to.
        """
        path = self._get(address, size, sha256, max_bytes, expected)
        assert path is not None  # None only without waiting
        return path

    def _get(
        self, address: str, size: int | None, sha256: str | None, max_bytes: int | None = None,
        expected: int | None = None, wait: bool = True,
    ) -> Path | None:  # fmt: skip
        path = self.path_of(address, sha256)
        if sha256 is not None and _touch(path):
            return path  # a file gets this name only after its checksum was verified
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), wait) as lock:
            if lock is None:
                return None
            if sha256 is not None and _touch(path):
                return path  # another process was faster
            if size is not None:  # a shard; an index is always looked up again, as it may have just been uploaded
                self._raise_recent_failure(path)
            self.room.reserve(size or expected or 0, path, lock)
            try:
                self._download(address, path, size, sha256, max_bytes)
            except BadImage as error:
                if size is not None:
                    with suppress(OSError):  # only a note for other processes
                        path.with_name(path.name + ".bad").write_text(str(error))
                raise
            if size is None and expected is None:  # its size is known only now
                os.truncate(lock, 0)
                self.room.reserve(0, path, None)
        return path

    def versions(self, addresses: list[str]) -> list[dict[str, str]]:
        """Versions that identify the file at each address: length, ETag and date, as far as the server gives them.

        Raises:
            BadImage: a file does not exist.
            RemoteError: the server denies access, or does not answer.
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
        """Rename a file fetched without a checksum to the name with its checksum, so that it is not fetched again."""
        path = self.path_of(address, sha256)
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # already evicted
                os.replace(self.path_of(address), path)

    def _wait(self, failures: int, minimum: float) -> float:
        """Seconds before the next try: exponential backoff with jitter."""
        wait = self.first_wait * 2 ** max(failures - 1, 0) * (0.5 + random.random())
        return min(max(minimum, wait), MAX_WAIT_SECONDS)

    def path_of(self, address: str, sha256: str | None = None) -> Path:
        """Path of a file in the cache; its name depends on the whole address and the checksum, so that it is unique."""
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
            except BadImage as error:  # another attempt may succeed
                damages += 1
                if damages == self.tries:
                    raise BadImage(
                        f"damaged shard ({printable(address)}: {error}, {damages} times). Upload it again, and its "
                        "index with it."
                    ) from error
                problem, wait, now, restart = str(error), 0.0, 0, True
            except TryAgain as error:
                problem, wait, now, restart = str(error), error.wait_seconds, _length(partial), error.restart
            if restart or (sha256 is None and not remote.version):  # the parts could belong to different files
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
        """Raise BadImage for a file that does not match the index."""
        length = partial.stat().st_size
        if size is not None and length != size:  # although the server says it is complete
            raise BadImage(f"{length} bytes instead of {size}")
        if sha256 is not None and sha256_of(partial) != sha256:
            raise BadImage("its bytes do not have the checksum in index.json")

    def _transfer(self, remote: RemoteFile, partial: Path) -> None:
        """Download the rest of a file and append it to the partial one.

        Raises:
            WriteError: the local disk is full or not writable, so a retry would not help.
        """
        start = _length(partial)
        if remote.size is not None and start > remote.size:
            partial.unlink()
            start = 0
        if remote.size is not None and start == remote.size and start:
            return
        chunks = remote.chunks(start)
        first = next(chunks, None)  # before the file is opened, so that it is kept if there is no answer
        try:
            with disk_errors_named(partial):
                file = open(partial, "r+b" if start else "wb")  # noqa: SIM115 closed below, with disk errors named
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
            partial.unlink(missing_ok=True)  # free the space for other processes
            raise


def _name_of(address: str) -> str:
    return Path(address.split("?")[0]).name


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> bool:
    """Whether the file exists; if so, mark it as just used."""
    with suppress(OSError):  # a file of another user exists, but its time cannot be set
        os.utime(path)
    return os.path.exists(path)
