"""The cache of shards stays within its size and deletes only its own files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from server_fixtures import Server
from shard_fixtures import numbered_shards, numbers_of

from sslvit.data import remote as remote_module
from sslvit.data.cache_folder import SUB_FOLDER, CacheFolder
from sslvit.data.open import open_shards
from sslvit.data.reader import ShardReader
from sslvit.data.remote import ShardCache
from sslvit.files import WriteError


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
    cache.room.limit = 2 * max(shard.bytes for shard in index.shards)
    lock = index.local_path(1).with_name(index.local_path(1).name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(str(cache.room.limit))
    (cache.folder / "room.used").write_text(str(cache.room.limit))
    fetching = threading.Thread(target=index.shard_path, args=(0,), daemon=True)
    fetching.start()
    fetching.join(10)
    assert index.local_path(0).exists()
    assert not lock.exists()


def test_the_folder_is_not_listed_for_each_download(server: Server, cache: ShardCache, monkeypatch) -> None:
    index = open_shards(f"{server.address}/a", cache)
    listings = []
    original = CacheFolder.files
    monkeypatch.setattr(CacheFolder, "files", lambda self: listings.append(self is cache.room) or original(self))
    for number in range(4):
        index.shard_path(number)
    assert True not in listings
    noted = int((cache.folder / "room.used").read_text())
    assert noted == sum(path.stat().st_size for path in cache.folder.glob("??/*"))


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
