"""Download a file from a given position on, and detect transfers that are slow or endless and files that change.

http(s) is read with the standard library; s3, gs and others with fsspec.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import quote

from sslvit.data.header import BadImage
from sslvit.data.opener import Pace, RemoteError, make_opener
from sslvit.files import printable

CHUNK = 2**18
FSSPEC_CHUNK = 16 * 2**20
GONE = (404, 410)  # the file does not exist
REFUSED = (400, 401, 403)  # the server denies access
RANGE_NOT_SATISFIABLE = 416
SAFE_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"  # characters with a meaning in an address
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
HTTP_VERSION = ("ETag", "Last-Modified")
FSSPEC_VERSION = ("ETag", "etag", "LastModified", "updated", "mtime", "generation")  # depends on the file system


class Gone(BadImage):
    """The file does not exist, so a retry would not help."""


class TryAgain(Exception):
    """A temporary failure.

    Args:
        problem: Description of the failure.
        wait_seconds: Time that the server asks to wait before a retry.
        restart: Whether the part fetched so far must be discarded.
    """

    def __init__(self, problem: str, wait_seconds: float = 0.0, restart: bool = False) -> None:
        super().__init__(printable(problem))
        self.wait_seconds, self.restart = wait_seconds, restart


class RemoteFile:
    """One file on the network while it is fetched, possibly in several tries.

    `size` is None if only the server knows it. A file of more than `max_bytes` is rejected, and a connection that stays
    below the minimum rate for `timeout_seconds` is abandoned.
    """

    def __init__(
        self, address: str, size: int | None, max_bytes: int, timeout_seconds: float, min_bytes_per_second: float
    ) -> None:
        self.address, self.size, self.max_bytes = address, size, max_bytes
        self.timeout, self.min_rate = timeout_seconds, min_bytes_per_second
        self.version: dict[str, str] = {}  # version of the file in the first response

    def chunks(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield (position in the file, bytes) from `start` on, or from 0 if the server does not support ranges.

        Raises:
            Gone: the file does not exist.
            BadImage: the file has the wrong length.
            RemoteError: the server denies access, or the file is too large.
            TryAgain: a temporary failure.
            ValueError: the address is invalid.
        """
        is_http = self.address.startswith(("http://", "https://"))
        try:
            for position, chunk in self._http(start) if is_http else self._fsspec(start):
                if position + len(chunk) > self._limit():
                    self._reject(f"more than {self._limit()} bytes")
                yield position, chunk
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error

    def ask_version(self) -> dict[str, str]:
        """Metadata that identifies the version of the file: length, ETag and date.

        This requests one byte of the file, since some signed addresses allow GET but not HEAD.

        Raises:
            Gone: the file does not exist.
            RemoteError: the server denies access.
            TryAgain: a temporary failure.
            ValueError: the address is invalid.
        """
        if not self.address.startswith(("http://", "https://")):
            return self._fsspec_version()
        try:
            with self._ask(0, Pace(self.timeout, self.min_rate), {"Range": "bytes=0-0"}) as response:
                found = {key: response.headers[key] for key in HTTP_VERSION if response.headers[key]}
                content_range = CONTENT_RANGE.fullmatch((response.headers["Content-Range"] or "").strip())
                length = content_range[3] if content_range else response.headers["Content-Length"]
                return found | ({"length": length} if length else {})
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error

    def _fsspec_version(self) -> dict[str, str]:
        files, path = self._file_system()
        with self._named_errors():
            about = files.info(path)
            found = {key: str(about[key]) for key in FSSPEC_VERSION if about.get(key)}
            return found | ({"length": str(about["size"])} if about.get("size") else {})

    def _limit(self) -> int:
        return self.max_bytes if self.size is None else self.size

    def _reject(self, problem: str) -> NoReturn:
        """Raise an error for a wrong length: BadImage for a shard, which is tried again, otherwise RemoteError."""
        if self.size is not None:
            raise BadImage(f"{problem} instead of {self.size}")
        raise RemoteError(f"{printable(self.address)}: {problem} are not taken. Check the address and the server.")

    def _expect(self, total: int | None) -> None:
        """Reject a file of the wrong length before it is fetched."""
        if total is not None and (total > self.max_bytes or self.size not in (None, total)):
            self._reject(f"{total} bytes")

    def _check_version(self, version: dict[str, str], is_more: bool, start: int) -> None:
        """Store the version of the first response; a later response that continues it must have the same version."""
        if is_more and self.version:
            common = self.version.keys() & version.keys()
            if not common or any(self.version[key] != version[key] for key in common):
                raise TryAgain(f"the file has changed on the server after byte {start}", restart=True)
        else:
            self.version = version

    def _http(self, start: int) -> Iterator[tuple[int, bytes]]:
        pace = Pace(self.timeout, self.min_rate)
        with self._ask(start, pace) as response:
            position, total = self._parse_range(response, start)
            self._expect(total)
            pace.restart()
            while chunk := response.read1(CHUNK):
                pace.bytes += len(chunk)
                yield position, chunk
                position += len(chunk)
            if total is not None and position < total:
                raise TryAgain(f"the connection ended {total - position} bytes early")

    def _ask(self, start: int, pace: Pace, more: dict[str, str] | None = None) -> http.client.HTTPResponse:
        headers = {"User-Agent": "sslvit", "Accept-Encoding": "identity", **(more or {})}
        if start:
            headers["Range"] = f"bytes={start}-"
            etag = self.version.get("ETag", "W/")
            condition = self.version.get("Last-Modified") if etag.startswith("W/") else etag
            if condition:  # if the file has changed, the server sends all of it
                headers["If-Range"] = condition
        try:
            address = quote(self.address, SAFE_CHARACTERS, errors="surrogateescape")
            return make_opener(pace).open(urllib.request.Request(address, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                self._explain(error)
        except (ValueError, http.client.InvalidURL) as error:
            raise ValueError(f"{printable(self.address)}: not an address ({printable(error)}).") from error

    def _explain(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raise the error that corresponds to an HTTP error."""
        answer, address = printable(f"the server answers {error.code} {error.reason}"), printable(self.address)
        if error.code in GONE:
            raise Gone(f"missing shard ({answer} for {address})") from error
        if error.code in REFUSED:
            raise RemoteError(f"{address}: {answer}. Check the address and your access to it.") from error
        if error.code < 400:
            raise RemoteError(f"{address}: {answer}. Give the address where the file itself lies.") from error
        retry_after = error.headers.get("Retry-After") or ""
        wait = float(retry_after) if retry_after.isdecimal() else 0.0
        raise TryAgain(answer, wait, restart=error.code == RANGE_NOT_SATISFIABLE) from error

    def _parse_range(self, response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
        """Position of a response's bytes in the file, and the length of the file if the server gives it."""
        version = {key: response.headers[key] for key in HTTP_VERSION if response.headers[key]}
        length = response.headers["Content-Length"]
        if length is not None and not re.fullmatch(r"\d{1,18}", length.strip(), re.ASCII):
            raise TryAgain(f"the server says a Content-Length of {printable(length, 40)}")
        if response.status == 206:
            content_range = response.headers["Content-Range"] or "no position"
            match = CONTENT_RANGE.fullmatch(content_range.strip())
            if not match or int(match[1]) != start:
                problem = f"asked for the bytes from {start} on, the server sends {printable(content_range, 60)}"
                raise TryAgain(problem, restart=True)
            total = None if match[3] == "*" else int(match[3])
            self._check_version(version, start > 0, start)
            return start, total
        if response.status != 200:
            raise TryAgain(f"the server answers {response.status} {response.reason}")
        self._check_version(version, False, 0)
        return 0, None if length is None else int(length)

    def _fsspec(self, start: int) -> Iterator[tuple[int, bytes]]:
        files, path = self._file_system()
        with self._named_errors():
            about = files.info(path)
            total = int(about["size"])
            self._expect(total)
            self._check_version({key: str(about[key]) for key in FSSPEC_VERSION if about.get(key)}, start > 0, start)
            for position in range(start, total, FSSPEC_CHUNK):
                end = min(position + FSSPEC_CHUNK, total)
                chunk = files.cat_file(path, start=position, end=end)
                if len(chunk) != end - position:
                    raise TryAgain(f"{len(chunk)} bytes came for the {end - position} from {position} on")
                yield position, chunk

    def _file_system(self) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{printable(self.address)}: {printable(error)}") from error

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Convert errors of a file system to those of this module."""
        address = printable(self.address)
        try:
            yield
        except (TryAgain, BadImage, RemoteError):
            raise
        except FileNotFoundError as error:
            raise Gone(f"missing shard ({address})") from error
        except PermissionError as error:
            raise RemoteError(f"{address}: {printable(error)}. Check the address and your access to it.") from error
        except Exception as error:  # every file system has errors of its own
            raise TryAgain(f"{type(error).__name__}: {error}") from error
