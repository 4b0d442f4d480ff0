"""A web server of shards that misbehaves on request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Server:
    """Serves a folder, and fails as told.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter = Counter()
        self.ranges: list[str | None] = []
        self.fail: dict[str, list] = {}  # file name -> what the next requests for it meet
        self.serves_ranges = True
        self.says_versions = False
        self.slow_seconds = 0.0  # that an answer takes, in ten pieces
        self.asked: Counter = Counter()  # for their version, by name
        self.under_way = self.most_under_way = 0
        self.lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = unquote(handler.path.strip("/").split("?")[0], errors="surrogateescape")
        if handler.headers.get("Range") == "bytes=0-0":
            self.asked[name] += 1
        else:
            self.requests[name] += 1
            self.ranges.append(handler.headers.get("Range"))
        problem = self.fail.get(name, []).pop(0) if self.fail.get(name) else None
        path = self.folder / name
        if callable(problem):
            with suppress(ConnectionError):
                problem(handler, path.read_bytes())
            return
        if isinstance(problem, int):
            handler.send_error(problem)
            return
        if not path.is_file():
            handler.send_error(404)
            return
        content, start = path.read_bytes(), 0
        asked = handler.headers.get("Range")
        if asked and self.serves_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last or len(content) - 1)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        else:
            end = len(content) - 1
            handler.send_response(200)
        if self.says_versions:
            handler.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        body = content[start : end + 1]
        if problem == "truncated file":
            body = body[: len(body) // 2]
        if problem == "other bytes":
            body = bytes(len(body))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if problem == "drop":
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            handler.connection.close()
        elif problem == "stall":
            handler.wfile.write(body[:100])
            handler.wfile.flush()
            time.sleep(1.5)
        elif self.slow_seconds and len(body) > 1:
            with self.counting():
                for piece in range(0, len(body), len(body) // 10 + 1):
                    time.sleep(self.slow_seconds / 10)
                    handler.wfile.write(body[piece : piece + len(body) // 10 + 1])
                    handler.wfile.flush()
        else:
            handler.wfile.write(body)

    @contextmanager
    def counting(self):
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        yield
        with self.lock:
            self.under_way -= 1

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
