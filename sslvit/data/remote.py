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
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any

from filelock import FileLock

from sslvit.data.decode import BadImage
from sslvit.data.index import Shard, sha256_of

TRIES = 5
FIRST_WAIT_SECONDS = 1.0  # before the second try; doubled for each further one
READ_TIMEOUT_SECONDS = 60.0  # without a single byte
CHUNK = 2**20
FSSPEC_CHUNK = 16 * 2**20
GONE = (401, 403, 404, 410)  # answers that another try does not change


class RemoteError(RuntimeError):
    """The network or the server failed for good; the message names the address."""


class ShardCache:
    """Files from the network, kept in a folder within a size; the longest unused go first.

    Args:
        folder: on a disk of this machine.
        limit_gb: size of the folder.
        tries: how often a transfer is begun or continued before it has failed.
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
        """Any file; without a size and a checksum it is fetched anew each time."""
        path = self.path_of(address)
        if size is not None and self._is_whole(path, size):
            os.utime(path)  # used just now
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if size is not None and self._is_whole(path, size):
                return path  # another process was faster
            self._make_room(size or 0, path)
            self._download(address, path, size, sha256)
        return path

    def path_of(self, address: str) -> Path:
        """Where a file is kept: named after the whole address, so that equal base names never collide."""
        digest = hashlib.sha256(address.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}-{Path(address.split('?')[0]).name[-80:]}"

    def _is_whole(self, path: Path, size: int) -> bool:
        try:
            return path.stat().st_size == size  # it was renamed to this name only after its checksum agreed
        except FileNotFoundError:
            return False

    def _download(self, address: str, path: Path, size: int | None, sha256: str | None) -> None:
        part = path.with_name(path.name + ".part")
        if size is None:
            part.unlink(missing_ok=True)
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.first_wait * 2 ** (attempt - 1) * (0.5 + random.random()))  # not all hosts at once
            try:
                self._transfer(address, part, size)
            except urllib.error.HTTPError as error:
                if error.code in GONE:
                    raise BadImage(f"missing shard (the server answers {error.code} for {address})") from error
                problem = f"the server answers {error.code} {error.reason}"
                continue
            except FileNotFoundError as error:
                raise BadImage(f"missing shard ({address})") from error
            except (OSError, HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            length = part.stat().st_size
            if size is not None and length != size:
                problem = f"{length} bytes instead of {size}"
                if length > size:
                    part.unlink()
                continue
            if sha256 is not None and sha256_of(part) != sha256:
                problem = "its bytes do not have the checksum in index.json"
                part.unlink()
                continue
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            return
        if "instead of" in problem or "checksum" in problem:
            part.unlink(missing_ok=True)
            raise BadImage(f"damaged shard ({address}: {problem}, {self.tries} times). Upload it again.")
        raise RemoteError(
            f"{address}: not fetched in {self.tries} tries; the last: {problem}. Check the network and the server, "
            "then go on with --resume."
        )

    def _transfer(self, address: str, part: Path, size: int | None) -> None:
        """Append to what is there already."""
        start = part.stat().st_size if part.exists() else 0
        if size is not None and start == size:
            return
        is_http = address.startswith(("http://", "https://"))
        chunks = self._http(address, start) if is_http else _fsspec_chunks(address, start)
        with open(part, "r+b" if start else "wb") as file:
            for place, chunk in chunks:
                file.seek(place)
                file.truncate()
                file.write(chunk)

    def _http(self, address: str, start: int) -> Iterator[tuple[int, bytes]]:
        """(place in the file, bytes) from `start`, or from 0 where the server does not serve parts."""
        request = urllib.request.Request(address, headers={"User-Agent": "sslvit", "Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
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
            files = [(f.stat(), f) for f in self.folder.glob("??/*") if f.suffix not in (".lock", ".part")]
            used = sum(about.st_size for about, _ in files) + size
            for about, file in sorted(files, key=lambda pair: pair[0].st_mtime):
                if used <= self.limit:
                    return
                if file != keep:
                    file.unlink(missing_ok=True)
                    used -= about.st_size


def _fsspec_chunks(address: str, start: int) -> Iterator[tuple[int, bytes]]:
    """(place in the file, bytes) from `start` on."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{address}: {error}") from error
    total: Any = files.info(path)["size"]
    for place in range(start, total, FSSPEC_CHUNK):
        yield place, files.cat_file(path, start=place, end=min(place + FSSPEC_CHUNK, total))


def is_address(source: str) -> bool:
    """Whether it names something on the network."""
    return "://" in source
