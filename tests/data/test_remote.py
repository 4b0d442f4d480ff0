"""Shards from a real web server that misbehaves: what arrives is whole, or the error says what happened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from server_fixtures import Server
from shard_fixtures import numbered_shards, numbers_of

from sslvit.data.header import BadImage
from sslvit.data.open import open_data, open_shards
from sslvit.data.reader import ShardReader
from sslvit.data.remote import RemoteError, ShardCache
from sslvit.settings import DataSettings


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


def test_shards_uploaded_anew_are_not_taken_for_the_old_ones(server: Server, cache: ShardCache) -> None:
    numbers_of(open_shards(f"{server.address}/a", cache))
    old = {path.name: path.stat().st_size for path in (server.folder / "a").glob("*.tar")}
    for path in (server.folder / "a").iterdir():
        path.unlink()
    from sslvit.data.array_images import array_samples
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
