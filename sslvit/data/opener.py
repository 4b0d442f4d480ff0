"""Open http(s) addresses only, and give up connections that are too slow."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

from sslvit.files import printable


class RemoteError(RuntimeError):
    """The network or the server failed permanently; the message names the address."""


class Pace:
    """Checks that a response makes progress: a minimum number of bytes in each time window."""

    def __init__(self, seconds: float, min_rate: float) -> None:
        self.seconds, self.min_rate = seconds, min_rate
        self.restart()

    def restart(self) -> None:
        """Start a new time window."""
        self.started, self.bytes = time.monotonic(), 0

    def check(self) -> None:
        """Raise TimeoutError if the window has ended with too few bytes."""
        if time.monotonic() - self.started < self.seconds:
            return
        if self.bytes < self.min_rate * self.seconds:
            raise TimeoutError(f"{self.bytes} bytes in {self.seconds:g} s, less than {self.min_rate:g} a second")
        self.restart()


class _PacedStream(io.RawIOBase):
    """A connection whose pace is checked before each read, including reads of the status and headers."""

    def __init__(self, raw: io.RawIOBase, pace: Pace) -> None:
        self.raw, self.pace = raw, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.pace.check()
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _response_class(pace: Pace) -> type[http.client.HTTPResponse]:
    class PacedResponse(http.client.HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            pace.restart()
            self.fp = io.BufferedReader(_PacedStream(self.fp.detach(), pace))

    return PacedResponse


class _Paced(urllib.request.AbstractHTTPHandler):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def do_open(
        self, http_class: Callable[..., http.client.HTTPConnection], req: urllib.request.Request, **options: Any
    ) -> http.client.HTTPResponse:
        def connection(host: str, **more: Any) -> http.client.HTTPConnection:
            made = http_class(host, **more)
            made.response_class = _response_class(self.pace)
            return made

        return super().do_open(connection, req, **options)


class _PacedHTTP(_Paced, urllib.request.HTTPHandler):
    pass


class _PacedHTTPS(_Paced, urllib.request.HTTPSHandler):
    pass


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) addresses only, not to local files or FTP."""

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        address, target = printable(req.full_url), headers["Location"] or headers["URI"] or ""
        try:
            scheme = urlsplit(urljoin(req.full_url, target)).scheme
        except ValueError:
            scheme = ""
        if scheme not in ("http", "https"):
            raise RemoteError(
                f"{address}: the server sends on to {printable(target, 80)}, and only http and https are followed. "
                "Check the address."
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def make_opener(pace: Pace) -> urllib.request.OpenerDirector:
    """Make an opener for http(s) addresses only."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), _PacedHTTP(pace), _PacedHTTPS(pace), _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
