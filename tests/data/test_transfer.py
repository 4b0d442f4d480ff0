"""Slow, endless, redirected, changed and nonsensical answers of a server are noticed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from server_fixtures import Server
from shard_fixtures import numbered_shards, numbers_of

from sslvit.data import remote as remote_module
from sslvit.data.header import BadImage
from sslvit.data.open import open_shards
from sslvit.data.remote import RemoteError, ShardCache


def test_a_slow_transfer_that_gets_on_is_not_given_up(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000000.tar"] = ["drop"] * 10  # half of what is left each time: more drops than tries
    assert index.shard_path(0).read_bytes() == (server.folder / "a" / "shard-000000.tar").read_bytes()


def test_names_with_spaces_are_quoted(server: Server, cache: ShardCache) -> None:
    whole = open_shards(server.folder / "a")
    (server.folder / "a" / "shard-000001.tar").rename(server.folder / "a" / "my shard%20#1.tar")
    whole.shards[1].name = "my shard%20#1.tar"
    whole.save()
    assert numbers_of(open_shards(f"{server.address}/a", cache)) == numbers_of(open_shards(server.folder / "a"))


def test_waits_grow_with_failures_and_are_not_alike(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, first_wait_seconds=1.0)
    for failures, wait in ((1, 1.0), (2, 2.0), (4, 8.0)):
        drawn = [cache._wait(failures, 0.0) for _ in range(200)]
        assert 0.5 * wait <= min(drawn) < 0.7 * wait
        assert 1.3 * wait < max(drawn) <= 1.5 * wait
    assert cache._wait(20, 0.0) == 60.0
    assert cache._wait(1, 30.0) == 30.0  # what the server asks for
    assert cache._wait(1, 1e9) == 60.0


def test_other_file_systems_go_through_fsspec(tmp_path: Path, cache: ShardCache) -> None:
    import fsspec

    local = numbered_shards(tmp_path / "local", 20, shard_mb=0.01)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "local").iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote = open_shards("memory://bucket", cache)
    assert numbers_of(remote) == numbers_of(local)
    part = remote.local_path(1)
    part.unlink()
    part.with_name(part.name + ".part").write_bytes((tmp_path / "local" / "shard-000001.tar").read_bytes()[:700])
    assert numbers_of(remote) == numbers_of(local)
    memory.rm("/bucket/shard-000001.tar")
    part.unlink()
    with pytest.raises(BadImage, match="missing shard .memory://bucket/shard-000001.tar"):
        remote.shard_path(1)
    with pytest.raises((ValueError, FileNotFoundError), match="nonsense://"):
        open_shards("nonsense://bucket", cache)


def answer(
    handler: BaseHTTPRequestHandler, body: bytes = b"", status: int = 200, reason: str | None = None, **headers: object
) -> None:
    """A whole answer with just these headers."""
    handler.send_response(status, reason)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


def drip(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """A byte now and then, so that the connection never falls silent."""
    answer(handler, Content_Length=len(content))
    for i in range(200):
        handler.wfile.write(content[i : i + 1])
        time.sleep(0.05)


def drip_headers(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nX: " + 200 * b"x":
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def drip_interim_answers(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    for _ in range(200):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


@pytest.mark.parametrize("problem", [drip, drip_headers, drip_interim_answers])
def test_a_server_that_drips_is_given_up(server: Server, tmp_path: Path, problem: Callable) -> None:
    cache = ShardCache(tmp_path / "cache", tries=2, first_wait_seconds=0.01, timeout_seconds=0.3)
    server.fail["a/index.json"] = [problem] * 99
    began = time.monotonic()
    with pytest.raises(RemoteError, match="not fetched in 2 tries; .* bytes in 0.3 s, less than 4096 a second"):
        cache.get(f"{server.address}/a/index.json")
    assert time.monotonic() - began < 5  # 10 for a single one that is waited for
    assert server.requests["a/index.json"] == 2


def test_a_byte_per_connection_is_no_progress(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)

    def one_byte(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        place = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        answer(handler, content[start : start + 1], 206 if start else 200, Content_Length=len(content) - start, **place)

    server.fail["a/shard-000000.tar"] = [one_byte] * 999
    with pytest.raises(RemoteError, match="not fetched in 4 tries; the last: .*bytes early"):
        index.shard_path(0)
    assert 4 <= server.requests["a/shard-000000.tar"] <= 8


def endless(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(bytes(2**16))


def test_no_more_is_taken_than_a_file_can_have(server: Server, cache: ShardCache, monkeypatch) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000000.tar"] = [endless] * 99
    with pytest.raises(BadImage, match=f"more than {index.shards[0].bytes} bytes instead of {index.shards[0].bytes}"):
        index.shard_path(0)
    monkeypatch.setitem(remote_module.MAX_INDEX_BYTES, "index.json", 2**20)
    server.fail["a/index.json"] = [endless, lambda handler, _: answer(handler, Content_Length=2**40)]
    for problem in ("more than 1048576 bytes are not taken", "1099511627776 bytes are not taken"):
        with pytest.raises(RemoteError, match=f"/a/index.json: {problem}. Check the address and the server"):
            cache.get(f"{server.address}/a/index.json")
    assert server.requests["a/index.json"] == 3
    assert sum(path.stat().st_size for path in cache.folder.rglob("*.part")) <= 2**20
    small = ShardCache(cache.room.requested, limit_gb=2**20 / 2**30)
    server.fail["a/shard-000001.tar"] = [endless]
    with pytest.raises(RemoteError, match="more than 1048576 bytes are not taken"):
        small.get(f"{server.address}/a/shard-000001.tar")


@pytest.mark.parametrize("length", ["abc", "-1", "1_0", "9" * 400])
def test_a_length_that_is_no_number_is_said_in_one_line(server: Server, cache: ShardCache, length: str) -> None:
    server.fail["a/index.json"] = [lambda handler, content: answer(handler, content, Content_Length=length)] * 99
    with pytest.raises(RemoteError, match=f"says a Content-Length of {length[:30]}") as error:
        cache.get(f"{server.address}/a/index.json")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[bad", ""])
def test_redirects_lead_to_http_only(server: Server, cache: ShardCache, target: str) -> None:
    server.fail["a/index.json"] = [lambda handler, _: answer(handler, status=302, Location=target)] * 99
    with pytest.raises(RemoteError, match="a/index.json: the server ") as error:
        cache.get(f"{server.address}/a/index.json")
    assert "\n" not in str(error.value)
    assert server.requests["a/index.json"] <= 11
    server.fail["a/index.json"] = [lambda handler, _: answer(handler, status=301, Location="/a/shard-000000.tar")]
    whole = (server.folder / "a" / "shard-000000.tar").read_bytes()
    assert cache.get(f"{server.address}/a/index.json").read_bytes() == whole


@pytest.mark.parametrize("status", [302, 403, 404, 500])
def test_words_of_the_server_cannot_forge_lines(server: Server, cache: ShardCache, status: int) -> None:
    reason = "bad\x1b[2J\r\x85done: 100 %" + "x" * 3000
    server.fail["a/index.json"] = [lambda handler, _: answer(handler, b"", status, reason)] * 99
    with pytest.raises((RemoteError, BadImage)) as error:
        cache.get(f"{server.address}/a/index.json")
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", str(error.value))
    assert len(str(error.value)) < 600


def test_a_part_from_another_place_is_noticed_without_a_checksum(server: Server, cache: ShardCache) -> None:
    def half(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        answer(handler, content[: len(content) // 2], ETag='"1"', Content_Length=len(content))

    def other_place(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        answer(handler, content[:50], 206, ETag='"1"', Content_Range=f"bytes 0-49/{len(content)}")

    whole = (server.folder / "a" / "index.json").read_bytes()
    server.fail["a/index.json"] = [half, other_place]
    assert cache.get(f"{server.address}/a/index.json").read_bytes() == whole
    assert server.ranges == [None, f"bytes={len(whole) // 2}-", None]
    server.fail["a/index.json"] = [half, other_place] * 99
    with pytest.raises(RemoteError, match="not fetched in 4 tries"):
        cache.get(f"{server.address}/a/index.json")


@pytest.mark.parametrize("validator", ["ETag", "Last-Modified", "weak", "none"])
def test_a_file_that_changes_between_its_parts_is_not_patched_together(
    server: Server, cache: ShardCache, validator: str
) -> None:
    old, new = b"a" * 1000, b"b" * 1000
    conditions = []

    def headers(version: int) -> dict[str, str]:
        return {"ETag": {"ETag": f'"{version}"'}, "weak": {"ETag": f'W/"{version}"'}, "none": {}}.get(
            validator, {"Last_Modified": f"Mon, 0{version} Jan 2024 00:00:00 GMT"}
        )

    def first_half(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        answer(handler, old[:500], Content_Length=1000, **headers(1))

    def second_half(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        conditions.append(handler.headers["If-Range"])
        if handler.headers["Range"] is None:
            answer(handler, new, Content_Length=1000, **headers(2))
        else:  # a server that does not know If-Range
            answer(handler, new[500:], 206, Content_Range="bytes 500-999/1000", Content_Length=500, **headers(2))

    server.fail["a/index.json"] = [first_half, second_half, second_half]
    assert cache.get(f"{server.address}/a/index.json").read_bytes() == new
    known = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert conditions[0] == known.get(validator)


@pytest.mark.parametrize("address", ["http://[::1/x.tar", "http://127.0.0.1:port/x.tar"])
def test_what_is_no_address_is_said_at_once(cache: ShardCache, address: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        cache.get(address)


@pytest.mark.parametrize("name", ["caf\udce9.tar", "two words.tar", 60 * "\u65e5"])
def test_addresses_may_hold_any_characters(server: Server, cache: ShardCache, name: str) -> None:
    (server.folder / name).write_bytes(b"content")
    assert cache.get(f"{server.address}/{name}").read_bytes() == b"content"
