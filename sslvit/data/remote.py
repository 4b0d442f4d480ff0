"""Shards from the network -> a bounded folder on this machine.

One download per machine however many processes ask, continued where it broke off, checked against the index, and
put in its place only when whole. http(s) is read with the standard library; s3, gs and others through fsspec.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException, IncompleteRead
from pathlib import Path

from filelock import FileLock

from sslvit.data.decode import BadImage
from sslvit.data.index import Shard, sha256_of

TRIES = 8  # without a byte of progress: with the waits below, some two minutes
FIRST_WAIT_SECONDS = 1.0  # before the second try; doubled for each further one
LONGEST_WAIT_SECONDS = 60.0
READ_TIMEOUT_SECONDS = 60.0  # without a single byte
CHUNK = 2**20
FSSPEC_CHUNK = 16 * 2**20
GONE = (404, 410)  # the server does not have it
REFUSED = (400, 401, 403)  # nor will it give it
RANGE_NOT_SATISFIABLE = 416
REMEMBERED_SECONDS = 120  # for which other processes do not ask again for a shard that is missing or damaged
PART_DAYS = 2  # after which an unfinished download is given up


class RemoteError(RuntimeError):
    """The network or the server failed for good; the message names the address."""


class _TryAgain(Exception):
    """What went wrong, and when the server wants to be asked again."""

    def __init__(self, problem: str, wait_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_seconds = wait_seconds


class ShardCache:
    """Files from the network, kept in a folder within a size; the longest unused go first.

    Args:
        folder: on a disk of this machine.
        limit_gb: size of the folder.
        tries: how often a transfer may fail without a byte of progress.
        first_wait_seconds: before the second try; doubled for each further one.
        timeout_seconds: without a byte, after which a connection is given up.
    """

    def __init__(
        self, folder: str | Path, limit_gb: float = 200, tries: int = TRIES,
        first_wait_seconds: float = FIRST_WAIT_SECONDS, timeout_seconds: float = READ_TIMEOUT_SECONDS,
    ) -> None:  # fmt: skip
        self.folder = Path(folder).expanduser()
        self.limit = int(limit_gb * 2**30)
        self.tries, self.first_wait, self.timeout = tries, first_wait_seconds, timeout_seconds

    def shard(self, address: str, shard: Shard) -> Path:
        """A shard's file on this machine.

        Raises:
            BadImage: the server does not have it, or what it has is not what the index describes.
            RemoteError: the transfer failed again and again.
        """
        return self.get(address, shard.bytes, shard.sha256)

    def get(self, address: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Any file; without a checksum it is fetched anew each time."""
        path = self.path_of(address, sha256)
        if sha256 is not None and _touch(path):
            return path  # it got this name only after its checksum agreed
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if sha256 is not None and _touch(path):
                return path  # another process was faster
            if size is not None:  # a shard; who looks for an index anew has perhaps just uploaded it
                self._recall_failure(path)
            self._make_room(size or 0, path)
            try:
                self._download(address, path, size, sha256)
            except BadImage as error:
                if size is not None:
                    path.with_name(path.name + ".bad").write_text(str(error))
                raise
            if size is None:
                self._make_room(0, path)
        return path

    def path_of(self, address: str, sha256: str | None = None) -> Path:
        """Where a file is kept: named after the whole address and its content, so that none is taken for another."""
        digest = hashlib.sha256(f"{address} {sha256 or ''}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}-{Path(address.split('?')[0]).name[-80:]}"

    def _recall_failure(self, path: Path) -> None:
        noted = path.with_name(path.name + ".bad")
        with suppress(FileNotFoundError):
            if time.time() - noted.stat().st_mtime < REMEMBERED_SECONDS:
                raise BadImage(noted.read_text())
            noted.unlink()

    def _download(self, address: str, path: Path, size: int | None, sha256: str | None) -> None:
        part = path.with_name(path.name + ".part")
        if size is None:
            part.unlink(missing_ok=True)
        failures = damages = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                self._transfer(address, part, size)
                self._check(part, size, sha256)
                break
            except _Gone:
                raise
            except BadImage as error:  # another transfer may be better
                damages += 1
                if damages == self.tries:
                    raise BadImage(
                        f"damaged shard ({address}: {error}, {damages} times). Upload it again, and its index with it."
                    ) from error
                problem, wait = str(error), 0.0
            except _TryAgain as error:
                problem, wait = str(error), error.wait_seconds
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures >= self.tries:
                raise RemoteError(
                    f"{address}: not fetched in {failures} tries; the last: {problem}. Check the network and the "
                    "server, then go on with --resume."
                )
            wait = max(wait, self.first_wait * 2 ** max(failures - 1, 0) * (0.5 + random.random()))  # not all at once
            time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)

    def _check(self, part: Path, size: int | None, sha256: str | None) -> None:
        """Raise BadImage for a file that is not the one of the index; it is deleted."""
        length = part.stat().st_size
        if size is not None and length != size:
            part.unlink()  # though the server says that this is all: the next try begins anew
            raise BadImage(f"{length} bytes instead of {size}")
        if sha256 is not None and sha256_of(part) != sha256:
            part.unlink()
            raise BadImage("its bytes do not have the checksum in index.json")

    def _transfer(self, address: str, part: Path, size: int | None) -> None:
        """Append to what is there already, to the end of the file.

        Raises:
            BadImage: there is no such file.
            RemoteError: the server refuses.
            _TryAgain: anything that may pass.
        """
        start = part.stat().st_size if part.exists() else 0
        if size is not None and start > size:
            part.unlink()
            start = 0
        if size is not None and start == size:
            return
        is_http = address.startswith(("http://", "https://"))
        chunks = self._http(address, start, part) if is_http else _fsspec_chunks(address, start)
        try:
            with open(part, "r+b" if start else "wb") as file:
                for place, chunk in chunks:
                    file.seek(place)
                    file.truncate()
                    file.write(chunk)
        except (BadImage, RemoteError, _TryAgain):
            raise
        except (OSError, HTTPException) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error

    def _http(self, address: str, start: int, part: Path) -> Iterator[tuple[int, bytes]]:
        """(place in the file, bytes) from `start`, or from 0 where the server does not serve parts."""
        request = urllib.request.Request(address, headers={"User-Agent": "sslvit", "Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            answer = f"the server answers {error.code} {error.reason}"
            if error.code in GONE:
                raise _Gone(f"missing shard ({answer} for {address})") from error
            if error.code in REFUSED:
                raise RemoteError(f"{address}: {answer}. Check the address and your access to it.") from error
            if error.code == RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            retry_after = error.headers.get("Retry-After") or ""
            raise _TryAgain(answer, float(retry_after) if retry_after.isdecimal() else 0.0) from error
        with response:
            place = start if response.status == 206 else 0
            promised = response.headers.get("Content-Length")
            received = 0
            while chunk := response.read(CHUNK):
                yield place, chunk
                place, received = place + len(chunk), received + len(chunk)
            if promised is not None and received < int(promised):
                raise IncompleteRead(b"", int(promised) - received)

    def _make_room(self, size: int, keep: Path) -> None:
        """Delete the longest unused files until `size` more fits; whoever has one open can go on reading it."""
        if size > self.limit:
            raise ValueError(
                f"data.cache_gb: {self.limit / 2**30:g} GB cannot hold one shard of {size / 2**30:.2f} GB. Raise it."
            )
        with FileLock(self.folder / "room.lock"):
            files = []
            for file in self.folder.glob("??/*"):
                with suppress(FileNotFoundError):
                    about = file.stat()
                    is_old_part = file.suffix == ".part" and time.time() - about.st_mtime > PART_DAYS * 86_400
                    if is_old_part:
                        file.unlink()
                    elif file.suffix not in (".lock", ".bad"):
                        files.append((about.st_mtime, about.st_size, file))
            used = sum(length for _, length, _ in files) + size
            for _, length, file in sorted(files):
                if used <= self.limit:
                    return
                if file != keep and file.suffix != ".part":
                    file.unlink(missing_ok=True)
                    used -= length


class _Gone(BadImage):
    """No other try would find it."""


def _touch(path: Path) -> bool:
    """Whether the file is there; if so it was used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # someone else's file: it is there, only its time cannot be set
        return True
    return True


def _fsspec_chunks(address: str, start: int) -> Iterator[tuple[int, bytes]]:
    """(place in the file, bytes) from `start` on."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{address}: {error}") from error
    try:
        total = int(files.info(path)["size"])
        for place in range(start, total, FSSPEC_CHUNK):
            yield place, files.cat_file(path, start=place, end=min(place + FSSPEC_CHUNK, total))
    except FileNotFoundError as error:
        raise _Gone(f"missing shard ({address})") from error
    except PermissionError as error:
        raise RemoteError(f"{address}: {error}. Check the address and your access to it.") from error
    except Exception as error:  # every file system has errors of its own
        raise _TryAgain(f"{type(error).__name__}: {error}") from error
