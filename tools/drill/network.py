"""A server that disconnects, stalls, lies, sends endlessly or redirects: complete files, or an error with the cause."""

from __future__ import annotations

import base64
import json
import os
import resource
import socket
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from children import Child, one_line_error
from material import Workshop
from shard_fixtures import numbers_of
from trials import Part, Trial

from sslvit.data.open import open_shards
from sslvit.data.remote import ShardCache
from sslvit.files import explain_os_error

SECRET = "what the server must not get this machine to read"
SECONDS = 40.0  # in which a lasting fault is given up; the cache below waits half a second at most
LASTING = 1_000_000
PATIENT = {"tries": 3, "first_wait_seconds": 0.01, "timeout_seconds": 0.7}
ENDLESS_BYTES = 200 << 20
# after one or two of these, everything arrives
PASSING = (
    "cut", "drip", "byte", "silent", "short", "long", "endless", "chunks", "length abc", "length -5", "length huge",
    "500", "503", "429", "garbage", "nothing", "other bytes", "other place", "whole again", "gzip", "color",
)  # fmt: skip
REFUSED = ("401", "403", "404", "410", "to file", "to ftp", "to nowhere", "in circles")
FOLLOWED = ("elsewhere",)


def parts(workshop: Workshop) -> list[Part]:
    return [
        Part("passing", "after faults that pass, every shard is whole",
             lambda trial: fetch(trial, workshop, trial.rng.choice(PASSING), trial.rng.randint(1, 2)), 200),
        Part("lasting", "faults that last end in one line, in time, and nothing wrong is kept",
             lambda trial: fetch(trial, workshop, trial.rng.choice(PASSING + REFUSED), LASTING), 200),
        Part("index", "the same where the index is fetched",
             lambda trial: fetch(trial, workshop, trial.rng.choice(PASSING + REFUSED + FOLLOWED),
                                 trial.rng.choice((1, LASTING)), trial.rng.choice(("index.json", "index.npy"))), 200),
    ]  # fmt: skip


def fetch(trial: Trial, workshop: Workshop, fault: str, times: int, file: str | None = None) -> None:
    shards, port = workshop.shards(), server_of(workshop)
    names = sorted(path.name for path in shards.glob("*.tar"))
    secret = trial.folder / "secret.txt"
    secret.write_text(SECRET)
    plan = {"fault": fault, "times": times, "file": file or trial.rng.choice(names), "at": trial.rng.random(),
            "secret": str(secret), "trial": trial.name}  # fmt: skip
    plan_name = base64.urlsafe_b64encode(json.dumps(plan).encode()).decode()
    cache, numbers = trial.folder / "cache", trial.folder / "numbers.json"

    def work() -> int:
        try:
            index = open_shards(f"http://127.0.0.1:{port}/{plan_name}", ShardCache(cache, **PATIENT))
            numbers.write_text(json.dumps(numbers_of(index)))
        except (ValueError, OSError, RuntimeError) as error:  # as the command says it
            said = explain_os_error(error) if isinstance(error, OSError) else None
            print(f"sslvit: error: {said or error}")
            return 1
        return 0

    child = Child(work, trial.folder / "log.txt", limits={resource.RLIMIT_FSIZE: ENDLESS_BYTES // 2})
    code = child.wait(SECONDS)
    name = f"{fault} ({'always' if times == LASTING else f'{times} times'}) for {plan['file']}"
    if not trial.expect(code is not None, f"{name}: still waiting after {SECONDS:g} s"):
        return
    right = json.loads(json.dumps(numbers_of(open_shards(shards))))
    if code == 0:
        got = json.loads(numbers.read_text())
        wrong = [(a, b) for a, b in zip(got, right, strict=True) if a not in (b, -1)]
        trial.expect(not wrong, f"{name}: wrong images {wrong[:3]}")
        is_whole = got == right
    else:
        problem = one_line_error(child)
        trial.expect(not problem, f"{name}: {problem}")
        is_bounded = plan["file"] == "index.json" or "File too large" not in child.last_line()  # its length is unknown
        trial.expect(is_bounded, f"{name}: took {ENDLESS_BYTES // 2} bytes and more")
        is_whole = False
    if times != LASTING and fault in (PASSING if plan["file"].endswith(".tar") else FOLLOWED):
        trial.expect(is_whole, f"{name}: not everything arrived: {child.last_line()[-300:]}")
    kept = [path for path in cache.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    trial.expect(not kept and SECRET not in child.text(), f"{name}: a file of this machine was read")


def server_of(workshop: Workshop) -> int:
    """The port of a server that goes on until the drill ends."""
    if not hasattr(workshop, "port"):
        listening = socket.create_server(("127.0.0.1", 0))
        shards = workshop.shards()
        workshop.helpers.append(Child(lambda: serve(listening, shards), workshop.folder / "server.txt"))
        workshop.port = listening.getsockname()[1]
        listening.close()
    return workshop.port


def serve(listening: socket.socket, folder: Path) -> None:
    parent, counts = os.getppid(), Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, plan_name, name = self.path.split("?")[0].split("/", 2)
            plan = json.loads(base64.urlsafe_b64decode(plan_name))
            body = (folder / name).read_bytes() if (folder / name).is_file() else None
            if body is None:
                return self.send_error(404)
            if name == plan["file"]:
                counts[plan_name] += 1
                if counts[plan_name] <= plan["times"]:
                    return misbehave(self, plan, body, counts[plan_name])
            send(self, body)

        def log_message(self, *_) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def service_actions(self) -> None:
            if os.getppid() != parent:
                os._exit(0)

        def handle_error(self, *_) -> None:  # the client has gone
            pass

    server = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    server.serve_forever(0.2)


def send(handler: BaseHTTPRequestHandler, body: bytes, shift: int = 0, serves_parts: bool = True) -> None:
    """A proper answer; `shift` tells a lie about its place."""
    start, asked = 0, handler.headers.get("Range")
    if asked and serves_parts:
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
    else:
        handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) - start))
    handler.end_headers()
    handler.wfile.write(body[start:])


def misbehave(handler: BaseHTTPRequestHandler, plan: dict, body: bytes, number: int) -> None:
    fault, place = plan["fault"], int(plan["at"] * len(body))
    handler.close_connection = True
    if fault in ("401", "403", "404", "410", "429", "500", "503"):
        handler.send_response(int(fault))
        handler.send_header("Retry-After", "0")
        handler.end_headers()
        return
    if fault == "color":
        handler.wfile.write(b"HTTP/1.0 500 \x1b[31mred\rforged\x9b\r\n\r\n")
        return
    if fault in ("garbage", "nothing"):
        handler.wfile.write(b"\x00\xff\x1b[2J no server\r\n\r\n" if fault == "garbage" else b"")
        return
    if fault in ("other place", "whole again"):
        if number % 2:
            return begin(handler, len(body), body[:place])
        return send(handler, body, shift=3 if fault == "other place" else 0, serves_parts=fault == "other place")
    targets = {"to file": f"file://{plan['secret']}", "to ftp": "ftp://127.0.0.1/x", "to nowhere": "http://[::",
               "in circles": handler.path, "elsewhere": f"{handler.path}?again"}  # fmt: skip
    if fault in targets:
        if "?" in handler.path:
            return send(handler, body)
        handler.send_response(302)
        handler.send_header("Location", targets[fault])
        handler.end_headers()
        return
    if fault == "drip":
        begin(handler, len(body), b"")
        for place in range(min(len(body), int(20 * SECONDS))):
            handler.wfile.write(body[place : place + 1])
            time.sleep(0.1)
        return
    if fault == "silent":
        begin(handler, len(body), body[:place])
        time.sleep(3)
        return
    if fault in ("endless", "chunks"):
        handler.protocol_version = "HTTP/1.1"
        begin(handler, None, b"", *([("Transfer-Encoding", "chunked")] if fault == "chunks" else []))
        piece = bytes(1 << 16)
        piece = b"10000\r\n" + piece + b"\r\n" if fault == "chunks" else piece
        for _ in range(ENDLESS_BYTES >> 16):
            handler.wfile.write(piece)
        return
    lengths = {"length abc": "abc", "length -5": "-5", "length huge": "9" * 30}
    answers = {
        "cut": (len(body), body[:place]), "byte": (len(body), body[:1]), "short": (place, body[:place]),
        "long": (len(body) + 1000, body + bytes(1000)), "other bytes": (len(body), bytes(len(body))),
        "gzip": (len(body), body),
    }  # fmt: skip
    if fault in lengths:
        return begin(handler, lengths[fault], body)
    begin(handler, *answers[fault], *([("Content-Encoding", "gzip")] if fault == "gzip" else []))


def begin(handler: BaseHTTPRequestHandler, length: int | str | None, content: bytes, *headers: tuple[str, str]) -> None:
    handler.send_response(200)
    for name, value in [*headers, *([("Content-Length", str(length))] if length is not None else [])]:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
