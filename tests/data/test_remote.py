"""Shards from a real web server that misbehaves: what arrives is whole, or the error says what happened."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from shard_fixtures import numbered_shards, numbers_of

from sslvit.data import remote as remote_module
from sslvit.data.decode import BadImage
from sslvit.data.open import open_data, open_shards
from sslvit.data.reader import ShardReader
from sslvit.data.remote import SUB_FOLDER, RemoteError, ShardCache
from sslvit.files import WriteError
from sslvit.settings import DataSettings


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


@pytest.fixture
def server(tmp_path: Path):
    numbered_shards(tmp_path / "served" / "a", 40, shard_mb=0.02)
    server = Server(tmp_path / "served")
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", tries=4, first_wait_seconds=0.01, timeout_seconds=0.5)


def test_remote_shards_are_read_like_local_ones_and_fetched_once(server: Server, cache: ShardCache) -> None:
    local = open_shards(server.folder / "a")
    for _ in range(2):
        remote = open_shards(f"{server.address}/a/", cache)
        assert numbers_of(remote) == numbers_of(local)
        assert remote.fingerprint() == local.fingerprint()
        assert remote.key(7) == local.key(7)
    assert {name: n for name, n in server.requests.items() if name.endswith(".tar")} == {
        f"a/{shard.name}": 1 for shard in local.shards
    }
    assert server.requests["a/index.npy"] == 1  # its checksum in index.json has not changed


@pytest.mark.parametrize(
    "problems", [["drop"], ["drop", "drop"], [500, 503], ["truncated file"], ["other bytes"], ["stall"], [500, "drop"]]
)
def test_a_server_that_fails_for_a_while_delivers_in_the_end(server: Server, cache: ShardCache, problems: list) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000001.tar"] = list(problems)
    assert numbers_of(index) == numbers_of(open_shards(server.folder / "a"))
    assert server.requests["a/shard-000001.tar"] == len(problems) + 1


def test_a_dropped_transfer_goes_on_where_it_was(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    half = index.shards[1].bytes // 2
    server.fail["a/shard-000001.tar"] = ["drop"]
    index.shard_path(1)
    assert server.ranges[-1] == f"bytes={half}-"
    server.serves_ranges = False
    server.fail["a/shard-000002.tar"] = ["drop"]
    assert index.shard_path(2).read_bytes() == (server.folder / "a" / "shard-000002.tar").read_bytes()
    assert server.requests["a/shard-000002.tar"] == 2  # where parts are not served, the whole file from its start


@pytest.mark.parametrize("problem", ["truncated file", "other bytes"])
def test_a_damaged_shard_on_the_server_is_bad_samples(server: Server, cache: ShardCache, problem: str) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000001.tar"] = [problem] * 99
    first, last = index.first_of_shard[1:3]
    numbers = numbers_of(index)
    assert set(numbers[first:last]) == {-1}
    assert min(numbers[:first] + numbers[last:]) >= 0
    with pytest.raises(BadImage, match=rf"damaged shard \({server.address}/a/shard-000001.tar: .*Upload it again"):
        ShardReader(index, 1, 0).read(int(first))


def test_a_shard_that_the_server_does_not_have_is_bad_samples(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    (server.folder / "a" / "shard-000001.tar").unlink()
    reader = ShardReader(index, 1, 0)
    for _ in range(3):
        with pytest.raises(BadImage, match="missing shard .the server answers 404"):
            reader.read(int(index.first_of_shard[1]))
    assert server.requests["a/shard-000001.tar"] == 1


def test_a_server_that_dies_for_good_is_an_error_that_names_it(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000000.tar"] = [500] * 99
    with pytest.raises(
        RemoteError, match=r"shard-000000.tar: not fetched in 4 tries; the last: the server answers 500"
    ):
        index.shard_path(0)
    assert server.requests["a/shard-000000.tar"] == 4
    server.stop()
    with pytest.raises(RemoteError, match="not fetched in 4 tries.*Check the network and the server"):
        index.shard_path(1)


def test_a_kept_part_of_a_killed_process_is_continued(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    whole = (server.folder / "a" / "shard-000000.tar").read_bytes()
    path = index.local_path(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(whole[:1000])
    assert index.shard_path(0).read_bytes() == whole
    assert server.ranges[-1] == "bytes=1000-"
    path.unlink()
    path.with_name(path.name + ".part").write_bytes(b"x" * 1000)  # of another version of the file
    assert index.shard_path(0).read_bytes() == whole


def test_a_part_longer_than_the_shard_is_begun_anew(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    path = index.local_path(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(bytes(10**6))
    assert index.shard_path(0).read_bytes() == (server.folder / "a" / "shard-000000.tar").read_bytes()
    server.fail["a/shard-000001.tar"] = [416, 429]
    assert index.shard_path(1).exists()


def test_a_slow_transfer_that_gets_on_is_not_given_up(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000000.tar"] = ["drop"] * 10  # half of what is left each time: more drops than tries
    assert index.shard_path(0).read_bytes() == (server.folder / "a" / "shard-000000.tar").read_bytes()


def test_shards_uploaded_anew_are_not_taken_for_the_old_ones(server: Server, cache: ShardCache) -> None:
    numbers_of(open_shards(f"{server.address}/a", cache))
    old = {path.name: path.stat().st_size for path in (server.folder / "a").glob("*.tar")}
    for path in (server.folder / "a").iterdir():
        path.unlink()
    from sslvit.data.arrays import array_samples
    from sslvit.data.pack import pack
    from sslvit.data.store import PackSettings

    images = np.repeat(np.arange(100, 140, dtype=np.uint8), 64).reshape(40, 8, 8)
    samples = array_samples(images, np.arange(40) % 2)
    for sample in samples:
        sample.bytes = len(sample.read())
    pack(samples, server.folder / "a", ["even", "odd"], PackSettings(shard_mb=0.02), workers=1)
    assert {path.name: path.stat().st_size for path in (server.folder / "a").glob("*.tar")} == old
    assert sorted(numbers_of(open_shards(f"{server.address}/a", cache))) == list(range(100, 140))


def test_a_missing_shard_costs_one_request_whoever_asks(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000001.tar"] = [404] * 99
    for _ in range(3):
        with pytest.raises(BadImage, match="answers 404"):
            ShardReader(index, 1, 0).read(int(index.first_of_shard[1]))
    assert "image at byte" in index.key(int(index.first_of_shard[1]))
    assert server.requests["a/shard-000001.tar"] == 1


@pytest.mark.parametrize("code", [401, 403])
def test_a_server_that_refuses_is_an_error_and_not_bad_samples(server: Server, cache: ShardCache, code: int) -> None:
    index = open_shards(f"{server.address}/a", cache)
    server.fail["a/shard-000001.tar"] = [code] * 99
    with pytest.raises(RemoteError, match=f"answers {code}.*your access to it"):
        index.shard_path(1)
    assert server.requests["a/shard-000001.tar"] == 1


def test_names_with_spaces_are_quoted(server: Server, cache: ShardCache) -> None:
    whole = open_shards(server.folder / "a")
    (server.folder / "a" / "shard-000001.tar").rename(server.folder / "a" / "my shard%20#1.tar")
    whole.shards[1].name = "my shard%20#1.tar"
    whole.save()
    assert numbers_of(open_shards(f"{server.address}/a", cache)) == numbers_of(open_shards(server.folder / "a"))


def test_equal_names_at_two_addresses_do_not_collide(server: Server, cache: ShardCache, tmp_path: Path) -> None:
    other = numbered_shards(tmp_path / "served" / "b", 25)
    one, two = (open_shards(f"{server.address}/{name}", cache) for name in ("a", "b"))
    assert sorted(numbers_of(one)) == list(range(40))
    assert numbers_of(two) == numbers_of(other)


def _fetch(address: str, folder: Path, done) -> None:
    index = open_shards(address, ShardCache(folder, first_wait_seconds=0.01))
    numbers_of(index)
    done.put(os.getpid())


def test_many_processes_fetch_each_shard_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    processes = [
        context.Process(target=_fetch, args=(f"{server.address}/a", tmp_path / "cache", done)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len({done.get(timeout=10) for _ in processes}) == 4
    assert {n for name, n in server.requests.items() if name.endswith(".tar")} == {1}


def test_the_cache_stays_within_its_size(server: Server, tmp_path: Path) -> None:
    local = open_shards(server.folder / "a")
    largest = max(shard.bytes for shard in local.shards)
    assert len(local.shards) >= 3
    cache = ShardCache(tmp_path / "cache", limit_gb=2.5 * largest / 2**30)
    index = open_shards(f"{server.address}/a", cache)
    reader = ShardReader(index, 1, 0)
    for sample in range(len(index)):
        reader.read(sample)
        kept = cache.folder.glob("??/*.tar")
        assert sum(path.stat().st_size for path in kept) <= 2.5 * largest
    assert sorted(numbers_of(index)) == list(range(40))
    small = ShardCache(tmp_path / "small", limit_gb=largest / 4 / 2**30)
    with pytest.raises(ValueError, match="data.cache_gb: .* cannot hold one shard"):
        open_shards(f"{server.address}/a", small).shard_path(0)


def test_a_pattern_of_addresses_needs_no_index(server: Server, cache: ShardCache, capsys) -> None:
    local = open_shards(server.folder / "a")
    files = {name: (server.folder / "a" / name).read_bytes() for name in ("index.json", "index.npy")}
    for name in files:
        (server.folder / "a" / name).unlink()
    with pytest.raises(FileNotFoundError, match="no index there .*shard-{000000..000099}.tar"):
        open_shards(f"{server.address}/a", cache)
    for name, content in files.items():
        (server.folder / "a" / name).write_bytes(content)
    assert numbers_of(open_shards(f"{server.address}/a", cache)) == numbers_of(local)  # uploaded: found at once
    for name in files:
        (server.folder / "a" / name).unlink()
    pattern = f"{server.address}/a/shard-{{000000..000001}}.tar"
    for _ in range(2):
        assert numbers_of(open_shards(pattern, cache)) == numbers_of(local)[: local.first_of_shard[2]]
    assert capsys.readouterr().out.count("indexing them once") == 1
    with pytest.raises(FileNotFoundError, match="missing shard .the server answers 404"):
        open_shards(f"{server.address}/a/shard-{{000000..000055}}.tar", cache)


def without_index(server: Server) -> str:
    """The address of the served shards as a pattern, their index gone."""
    for name in ("index.json", "index.npy"):
        (server.folder / "a" / name).unlink()
    return f"{server.address}/a/shard-{{000000..000001}}.tar"


def test_shards_without_an_index_are_fetched_once(server: Server, cache: ShardCache) -> None:
    pattern = without_index(server)
    for _ in range(2):
        numbers_of(open_shards(pattern, cache))
    assert server.requests["a/shard-000000.tar"] == server.requests["a/shard-000001.tar"] == 1
    assert len(list(cache.folder.glob("??/*.tar"))) == 2


def test_a_shard_without_an_index_that_is_replaced_on_the_server_is_indexed_anew(
    server: Server, cache: ShardCache, tmp_path: Path
) -> None:
    pattern, server.says_versions = without_index(server), True
    before = numbers_of(open_shards(pattern, cache))
    path = server.folder / "a" / "shard-000001.tar"
    first = len(open_shards(f"{server.address}/a/shard-000000.tar", cache))
    other = numbered_shards(tmp_path / "other", 40, shard_mb=0.02, first=100).shard_path(1).read_bytes()
    assert len(other) == path.stat().st_size  # only its ETag tells it from the old one
    path.write_bytes(other)
    after = open_shards(pattern, cache)
    assert numbers_of(after)[:first] == before[:first]
    assert numbers_of(after)[first:] == [100 + number for number in before[first:]]
    path.write_bytes(other + bytes(10240))  # a server that says no more than lengths
    server.says_versions = False
    longer = open_shards(pattern, cache)
    assert longer.shards[1].bytes == len(other) + 10240


def test_a_server_that_is_away_is_named_when_versions_are_asked_for(server: Server, cache: ShardCache) -> None:
    pattern = without_index(server)
    server.fail["a/shard-000001.tar"] = [500, 503]
    assert len(open_shards(pattern, cache)) > 10
    server.fail["a/shard-000001.tar"] = [500] * 4
    with pytest.raises(RemoteError, match="shard-000001.tar: no answer in 4 tries; the last: the server answers 500"):
        open_shards(pattern, cache)


def test_a_damaged_index_in_the_cache_is_made_or_fetched_again(server: Server, cache: ShardCache, capsys) -> None:
    whole = numbers_of(open_shards(f"{server.address}/a", cache))
    (records,) = cache.folder.glob("??/*index.npy")
    records.write_bytes(records.read_bytes()[:-3] + b"xyz")
    assert numbers_of(open_shards(f"{server.address}/a", cache)) == whole
    pattern = without_index(server)
    part = numbers_of(open_shards(pattern, cache))
    (kept,) = cache.folder.glob("index-*")
    (kept / "index.npy").write_bytes((kept / "index.npy").read_bytes()[:-3] + b"xyz")
    capsys.readouterr()
    assert numbers_of(open_shards(pattern, cache)) == part
    assert "is damaged, so they are indexed again" in capsys.readouterr().out
    assert server.requests["a/shard-000000.tar"] == 3  # with its index, without, again
    index = open_shards(pattern, cache)
    index.records, index.classes = index.records.copy(), ["even", "odd"]
    index.records["label"][2] = 7
    with pytest.raises(ValueError, match=f"{kept}/index.npy has the label 7.*Delete that folder: .* made again"):
        index.labels_of(slice(None))


def test_downloads_side_by_side_stay_within_the_size_of_the_cache(server: Server, tmp_path: Path) -> None:
    numbered_shards(server.folder / "b", 60, shard_mb=0.01)
    local = open_shards(server.folder / "b")
    assert len(local.shards) >= 9
    largest = max(shard.bytes for shard in local.shards)
    limit = int(3.5 * largest)
    caches = [ShardCache(tmp_path / "cache", limit_gb=limit / 2**30) for _ in range(2)]
    indices = [open_shards(f"{server.address}/b", cache) for cache in caches]
    server.slow_seconds = 0.1
    threads = [
        threading.Thread(target=indices[number % 2].shard_path, args=(number,)) for number in range(len(local.shards))
    ]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, sum(map(length_of, caches[0].folder.glob("??/*"))))
        time.sleep(0.002)
    assert {server.requests[f"b/{shard.name}"] for shard in local.shards} == {1}
    assert 1.5 * largest < most <= limit
    assert server.most_under_way >= 2
    assert not [*caches[0].folder.glob("??/*.lock"), *caches[0].folder.glob("??/*.part")]  # nothing is left of them


def length_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_the_longest_unused_shard_goes_first(server: Server, tmp_path: Path) -> None:
    local = open_shards(server.folder / "a")
    assert len(local.shards) == 4
    largest = max(shard.bytes for shard in local.shards)
    cache = ShardCache(tmp_path / "cache", limit_gb=3.9 * largest / 2**30)
    index = open_shards(f"{server.address}/a", cache)
    for number in (0, 1, 2):
        path = index.shard_path(number)
        os.utime(path, (1000 + number, 1000 + number))
    index.shard_path(0)  # used again, so the second is now the longest unused
    index.shard_path(3)
    assert [index.local_path(number).exists() for number in range(4)] == [True, False, True, True]


def test_room_that_a_killed_download_had_reserved_is_free_again(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    cache.limit = 2 * max(shard.bytes for shard in index.shards)
    lock = index.local_path(1).with_name(index.local_path(1).name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(str(cache.limit))
    (cache.folder / "room.used").write_text(str(cache.limit))
    fetching = threading.Thread(target=index.shard_path, args=(0,), daemon=True)
    fetching.start()
    fetching.join(10)
    assert index.local_path(0).exists()
    assert not lock.exists()


def test_the_folder_is_not_listed_for_each_download(server: Server, cache: ShardCache, monkeypatch) -> None:
    index = open_shards(f"{server.address}/a", cache)
    listings = []
    original = ShardCache._cache_files
    monkeypatch.setattr(ShardCache, "_cache_files", lambda self: listings.append(self is cache) or original(self))
    for number in range(4):
        index.shard_path(number)
    assert True not in listings
    noted = int((cache.folder / "room.used").read_text())
    assert noted == sum(path.stat().st_size for path in cache.folder.glob("??/*"))


def test_waits_grow_with_failures_and_are_not_alike(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, first_wait_seconds=1.0)
    for failures, wait in ((1, 1.0), (2, 2.0), (4, 8.0)):
        drawn = [cache._wait(failures, 0.0) for _ in range(200)]
        assert 0.5 * wait <= min(drawn) < 0.7 * wait
        assert 1.3 * wait < max(drawn) <= 1.5 * wait
    assert cache._wait(20, 0.0) == 60.0
    assert cache._wait(1, 30.0) == 30.0  # what the server asks for
    assert cache._wait(1, 1e9) == 60.0


def test_a_download_is_on_the_disk_before_it_has_its_name(server: Server, cache: ShardCache, monkeypatch) -> None:
    index, done = open_shards(f"{server.address}/a", cache), []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def renamed(old, new) -> None:
        done.append(("rename", str(old)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    part = f"{index.local_path(0)}.part"
    index.shard_path(0)
    assert [about for about in done if about[1] == part] == [("sync", part), ("rename", part)]


def test_every_worker_fetches_ahead_what_the_others_do_not(server: Server, cache: ShardCache) -> None:
    """Three workers want the same shards in the same order; each has two transfers of its own under way."""
    index = numbered_shards(server.folder / "b", 60, shard_mb=0.01)
    remote = open_shards(f"{server.address}/b", cache)
    server.slow_seconds = 0.3
    readers = [ShardReader(remote, 1, 0) for _ in range(3)]
    for reader in readers:
        reader.prefetch(list(range(len(index.shards))))
    limit = time.monotonic() + 20
    while len(list(cache.folder.glob("??/*.tar"))) < len(index.shards) and time.monotonic() < limit:
        time.sleep(0.01)
    assert server.most_under_way == 6
    assert {server.requests[f"b/{shard.name}"] for shard in index.shards} == {1}


def test_shards_are_fetched_ahead_of_their_use(server: Server, cache: ShardCache) -> None:
    index = open_shards(f"{server.address}/a", cache)
    reader = ShardReader(index, 1, 0)
    reader.prefetch([0, 1, 2])
    limit = time.monotonic() + 10
    while sum(server.requests[f"a/shard-{i:06d}.tar"] for i in range(3)) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
    assert sum(server.requests[f"a/shard-{i:06d}.tar"] for i in range(3)) == 3
    reader.prefetch([2, 1, 0])
    numbers_of(index)
    assert [server.requests[f"a/shard-{i:06d}.tar"] for i in range(3)] == [1, 1, 1]


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


def test_a_mixture_of_local_and_remote_sources(server: Server, tmp_path: Path) -> None:
    numbered_shards(tmp_path / "near", 30)
    settings = DataSettings(
        mixture={str(tmp_path / "near"): 1, f"{server.address}/a": 3},
        global_batch_size=8,
        cache=str(tmp_path / "cache"),
    )
    index, plan = open_data(settings, 0)
    samples, _ = plan.batch(0)
    assert (samples < 30).sum() == 2
    assert len(index) == 70
    assert numbers_of(index)[:30] == numbers_of(index.sources[0])
    with pytest.raises(ValueError, match=r"near.*its 32 images of each batch.*more than the 30 samples"):
        open_data(DataSettings(mixture=settings.mixture, global_batch_size=128, cache=settings.cache), 0)


def test_an_index_that_is_none_is_named(server: Server, cache: ShardCache) -> None:
    path = server.folder / "a" / "index.json"
    about = json.loads(path.read_text())
    about["splits"]["train"]["filenames"][1] = "http://elsewhere/x.tar"
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="lies outside of its folder"):
        open_shards(f"{server.address}/a", cache)
    path.write_text("<html>hello</html>")
    with pytest.raises(ValueError, match=r"/a/index.json: not valid JSON"):
        open_shards(f"{server.address}/a", cache)
    about["splits"]["train"]["filenames"][1] = "shard-000001.tar"
    path.write_text(json.dumps(about | {"records_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="not the one that index.json describes"):
        open_shards(f"{server.address}/a", cache)


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


def test_files_of_the_user_in_the_cache_folder_are_never_touched(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    theirs = [folder / "ab" / "holiday.jpg", folder / "cd" / "thesis.part", folder / "photo.jpg"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10**6))
        os.utime(path, (0, 0))
    local = open_shards(server.folder / "a")
    limit_gb = 1.5 * max(shard.bytes for shard in local.shards) / 2**30
    cache = ShardCache(folder, limit_gb)
    assert sorted(numbers_of(open_shards(f"{server.address}/a", cache))) == list(range(40))
    assert cache.folder == folder / SUB_FOLDER
    later = cache.folder / "ab" / f"{'ab' * 16}.jpg"  # put there by hand, after the folder was marked
    later.parent.mkdir(exist_ok=True)
    later.write_bytes(bytes(10**6))
    os.utime(later, (0, 0))
    again = ShardCache(folder, limit_gb)
    assert sorted(numbers_of(open_shards(f"{server.address}/a", again))) == list(range(40))
    assert all(path.stat().st_size == 10**6 for path in [*theirs, later])


def test_a_cache_folder_is_made_when_needed_and_is_the_same_for_all(tmp_path: Path) -> None:
    one, two = ShardCache(tmp_path / "new"), ShardCache(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    assert one.folder == two.folder == ShardCache(tmp_path / "new").folder == tmp_path / "new"
    (tmp_path / "full" / SUB_FOLDER).mkdir(parents=True)
    (tmp_path / "full" / SUB_FOLDER / "shard-000000.tar").touch()
    with pytest.raises(ValueError, match="data.cache: .*not of this cache. Choose an empty or a new folder"):
        _ = ShardCache(tmp_path / "full").folder
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="data.cache: .*/file is not a folder"):
        _ = ShardCache(tmp_path / "file").folder


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
    small = ShardCache(cache.requested, limit_gb=2**20 / 2**30)
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


def test_a_full_disk_is_not_called_a_problem_of_the_network(server: Server, cache: ShardCache, monkeypatch) -> None:
    index = open_shards(f"{server.address}/a", cache)

    class FullDisk:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115
            self.seek, self.truncate, self.close = self.file.seek, self.file.truncate, self.file.close

        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remote_module, "open", FullDisk, raising=False)
    with pytest.raises(WriteError, match="data.cache: .*No space left on device.*Make room on that disk"):
        index.shard_path(0)
    assert server.requests["a/shard-000000.tar"] == 1
    assert not list(cache.folder.rglob("*.part"))
    with pytest.raises(WriteError, match="data.cache"):  # not a sample to skip
        ShardReader(index, 1, 0).read(0)


@pytest.mark.parametrize("address", ["http://[::1/x.tar", "http://127.0.0.1:port/x.tar"])
def test_what_is_no_address_is_said_at_once(cache: ShardCache, address: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        cache.get(address)


@pytest.mark.parametrize("name", ["caf\udce9.tar", "two words.tar", 60 * "\u65e5"])
def test_addresses_may_hold_any_characters(server: Server, cache: ShardCache, name: str) -> None:
    (server.folder / name).write_bytes(b"content")
    assert cache.get(f"{server.address}/{name}").read_bytes() == b"content"
