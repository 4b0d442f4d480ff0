"""Gzipped tars and pipes: read from end to end, shared out, shuffled by the seed, and never trusted."""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded

from sslvit.data.header import BadImage
from sslvit.data.open import open_data
from sslvit.data.stream import StreamBatches, StreamIndex, sample_number
from sslvit.data.views import Views
from sslvit.settings import DataSettings
from sslvit.settings.views import CenterSettings

WHOLE = Views(CenterSettings(), [4, 4], "bilinear", seed=1)


def gzipped(path: Path, numbers: range, more: dict[str, bytes] | None = None) -> Path:
    members = {f"{n:04d}.png": encoded(Image.new("L", (4, 4), n), "PNG") for n in numbers} | (more or {})
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


@pytest.fixture
def streams(tmp_path: Path) -> list[str]:
    return [str(gzipped(tmp_path / f"{i}.tar.gz", range(10 * i, 10 * i + 10))) for i in range(6)]


def index_of(urls: list[str], tmp_path: Path, **options) -> StreamIndex:
    settings = DataSettings(cache=str(tmp_path / "cache"))
    from sslvit.data.open import shard_cache

    return StreamIndex(urls, options.get("samples", 60), options.get("allow_pipe", False), shard_cache(settings))


def read(index: StreamIndex, batches: int, rank: int = 0, ranks: int = 1, workers: int = 0, micro: int = 5, **more):
    stream = StreamBatches(index, WHOLE, 1, rank, ranks, micro, 1, **more)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=stream.workers(workers))
    iterator = iter(loader)
    return [next(iterator) for _ in range(batches)]


def pixels(batches) -> list[int]:
    return [int(v) for batch in batches for v in batch.views[0][:, 0, 0, 0]]


def test_an_epoch_reads_every_image_once_in_a_shuffled_order(streams: list[str], tmp_path: Path) -> None:
    first = pixels(read(index_of(streams, tmp_path), 24))
    assert sorted(first[:60]) == sorted(first[60:]) == list(range(60))
    assert first[:60] != first[60:]
    assert first[:60] != list(range(60))
    assert first == pixels(read(index_of(streams, tmp_path), 24))
    assert first != pixels(read(index_of(streams, tmp_path), 24, start_step=7))


def test_what_the_order_of_a_stream_depends_on(streams: list[str], tmp_path: Path) -> None:
    """On seed, epoch and the step from which a run goes on: of the streams and of the images within one."""

    def order(urls: list[str], seed: int, step: int, epoch: int) -> list[int]:
        views = Views(CenterSettings(), [4, 4], "bilinear", seed=seed)
        count = 10 * len(urls)
        samples = StreamBatches(index_of(urls, tmp_path), views, 1, 0, 1, 5, 1, start_step=step)._samples(0, 1)
        rows = list(itertools.islice(samples, count * (epoch + 1)))[-count:]
        assert {row[0] for row in rows} == {epoch}
        return [int(row[2].rpartition("/")[2]) for row in rows]

    for urls in (streams, streams[:1]):
        keys = [(0, 0, 0), (1, 0, 0), (0, 5, 0), (0, 0, 1)]
        found = [order(urls, *key) for key in keys]
        assert len({tuple(each) for each in found}) == len(keys)
        assert all(sorted(each) == sorted(found[0]) for each in found)
        assert found[0] != sorted(found[0])
        assert order(urls, *keys[0]) == found[0]


def test_a_stream_longer_than_the_buffer_is_shuffled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslvit.data.stream.BUFFER", 5)
    url = str(gzipped(tmp_path / "x.tar.gz", range(60)))
    found = pixels(read(index_of([url], tmp_path), 12))
    assert sorted(found) == list(range(60))
    steps = np.abs(np.diff(found))
    assert (steps[:50] != 1).mean() > 0.5  # one that follows the buffer in its order has hardly any other
    assert max(place - number for place, number in enumerate(found)) > 5  # some wait in the buffer for long
    assert max(number - place for place, number in enumerate(found)) <= 5


def test_ranks_and_workers_shuffle_streams_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stream as any rank or worker would read it: with another shuffle by each."""
    index = index_of([str(gzipped(tmp_path / f"{i}.tar.gz", range(30))) for i in range(4)], tmp_path)

    def order(rank: int, worker: int) -> list[str]:
        batches = StreamBatches(index, WHOLE, 1, rank, 2, 5, 1)
        return [row[2].rpartition("/")[2] for row in itertools.islice(batches._samples(worker, 2), 30)]

    orders = [order(rank, worker) for rank in (0, 1) for worker in (0, 1)]
    assert len({tuple(each) for each in orders}) == 4
    assert order(1, 1) == orders[3]


def test_ranks_and_workers_share_the_shards(streams: list[str], tmp_path: Path) -> None:
    seen: list[int] = []
    for rank in range(3):
        batches = read(index_of(streams, tmp_path), 4, rank, 3, workers=2)
        seen += pixels(batches)
        assert [batch.first_row for batch in batches] == [rank * 5] * 4
    assert sorted(seen) == list(range(60))
    with pytest.raises(ValueError, match="6 streams cannot be shared by 7 ranks"):
        read(index_of(streams, tmp_path), 1, 0, 7)


def test_draws_follow_the_key_and_not_the_place(streams: list[str], tmp_path: Path) -> None:
    (batch,) = read(index_of(streams, tmp_path), 1)
    expected = [sample_number(f"{streams[value // 10]} {value:04d}") for value in pixels([batch])]
    assert batch.samples.tolist() == expected


def test_equal_keys_in_two_shards_are_two_images(tmp_path: Path) -> None:
    urls = []
    for shard in range(3):
        images = {f"{n:04d}.png": encoded(Image.new("L", (4, 4), 50 * shard + n), "PNG") for n in range(10)}
        urls.append(str(gzipped(tmp_path / f"{shard}.tar.gz", range(0), images)))
    seen = pixels(read(index_of(urls, tmp_path), 6))
    assert sorted(seen) == sorted(50 * shard + n for shard in range(3) for n in range(10))


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_unreadable_images_of_one_key_in_two_streams_are_two(tmp_path: Path) -> None:
    urls = []
    for name in "ab":
        (tmp_path / name).mkdir()
        urls.append(str(gzipped(tmp_path / name / "x.tar.gz", range(4), {"zz.png": b"not an image"})))
    batches = read(index_of(urls, tmp_path), 2)
    assert {name for batch in batches for name in batch.unreadable} == {"a/x.tar.gz/zz", "b/x.tar.gz/zz"}


def test_pickles_are_never_opened_and_bad_members_are_counted(tmp_path: Path) -> None:
    harm = pickle.dumps(Harmful(tmp_path / "harmed"))
    members = {"a.pyd": harm, "b.pth": harm, "../up.png": b"x", "zz.png": b"not an image"}
    url = str(gzipped(tmp_path / "x.tar.gz", range(9), members))
    batches = read(index_of([url], tmp_path), 2)
    bad = {name: reason for batch in batches for name, reason in batch.unreadable.items()}
    assert bad["x.tar.gz/zz"].startswith("not an image")
    assert "leads out of its folder" in bad["x.tar.gz/../up"]
    assert sum(int(batch.valid.sum()) for batch in batches) == 9
    assert not (tmp_path / "harmed").exists()


def test_a_truncated_stream_is_counted_and_the_rest_is_read(streams: list[str], tmp_path: Path) -> None:
    content = Path(streams[2]).read_bytes()
    Path(streams[2]).write_bytes(content[: len(content) // 2])
    batches = read(index_of(streams, tmp_path), 20)
    seen = set(pixels(batches))
    assert set(range(60)) - set(range(20, 30)) <= seen
    assert any("damaged stream" in reason for batch in batches for reason in batch.unreadable.values())


def test_a_stream_without_images_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    url = str(gzipped(tmp_path / "x.tar.gz", range(0), {"a.txt": b"hello"}))
    with pytest.raises(ValueError, match="no image in .*x.tar.gz"):
        read(index_of([url], tmp_path), 1)
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(ValueError, match="no image in .*y.tar.gz"):
        read(index_of([str(tmp_path / "y.tar.gz")], tmp_path), 1)


def test_commands_run_only_by_permission(tmp_path: Path) -> None:
    url = f"pipe:cat {gzipped(tmp_path / 'x.tar.gz', range(10))} | gunzip"
    options = {"shards": url, "global_batch_size": 4, "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="would run a command. If you trust it, pass --data.allow_pipe true"):
        open_data(DataSettings(**options), 0)
    with pytest.raises(ValueError, match="can only be read from end to end.*--data.stream_samples"):
        open_data(DataSettings(**options, allow_pipe=True), 0)
    index, plan = open_data(DataSettings(**options, allow_pipe=True, stream_samples=10), 0)
    assert (len(index), plan.steps_per_epoch) == (10, 2)
    assert sorted(pixels(read(index, 2))) == list(range(10))
    with pytest.raises(FileNotFoundError, match="none.tar.gz does not exist"):
        index_of([str(tmp_path / "none.tar.gz")], tmp_path)


def test_sizes_and_values_of_views_are_those_of_shards(streams: list[str], tmp_path: Path) -> None:
    (batch,) = read(index_of(streams, tmp_path), 1)
    assert batch.views[0].shape == (5, 1, 4, 4)
    assert batch.views[0].dtype == torch.uint8
    assert np.unique(batch.views[0].numpy().reshape(5, -1).std(1)).tolist() == [0.0]
    assert batch.labels is None


def test_names_that_are_not_utf8_are_read_and_never_reach_the_screen_raw(tmp_path: Path, capsys) -> None:
    forged = "x\x1b[2J\ndone: 100 %"
    images = {f"caf\udce9-{n}.png": encoded(Image.new("L", (4, 4), n), "PNG") for n in range(4)}
    bad = {"\udcff.png": b"no image", f"{forged}.png": b"no image", f"../{forged}.png": b"up"}
    url = str(gzipped(tmp_path / "x.tar.gz", range(10, 14), images | bad))
    batches = read(index_of([url], tmp_path), 2)
    seen = {value for batch in batches for value in batch.views[0][:, 0, 0, 0][batch.valid].tolist()}
    assert seen == {0, 1, 2, 3, 10, 11, 12, 13}
    named = {name for batch in batches for name in batch.unreadable}
    names = {"\\xff", "x\\x1b[2J\\x0adone: 100 %", "../x\\x1b[2J\\x0adone: 100 %"}
    assert named == {f"x.tar.gz/{name}" for name in names}
    url = str(gzipped(tmp_path / "y.tar.gz", range(0), {f"../{forged}.png": b"up", "caf\udce9.txt": b"hello"}))
    with pytest.raises(ValueError, match="no image in .*y.tar.gz") as error:
        read(index_of([url], tmp_path), 1)
    assert str(error.value).isprintable()
    assert "\x1b" not in capsys.readouterr().out


def test_damage_of_any_kind_is_named_by_its_stream(streams: list[str], tmp_path: Path, monkeypatch) -> None:
    from webdataset import tariterators

    original = tariterators.gopen.gopen

    def failing(url: str, **options):
        if url == streams[3]:
            raise OSError  # without a word
        return original(url, **options)

    monkeypatch.setattr(tariterators.gopen, "gopen", failing)
    twice = {"a.png": encoded(Image.new("L", (4, 4), 200), "PNG")}
    with tarfile.open(streams[4], "w:gz") as tar:
        for name, content in [*twice.items(), *twice.items()]:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    Path(streams[5]).write_bytes(b"no tar")
    batches = read(index_of(streams, tmp_path), 12)
    bad = {name: reason for batch in batches for name, reason in batch.unreadable.items()}
    assert bad[f"{streams[4]}/a.png"] == "a second member of this name"
    assert bad[streams[3]].startswith("damaged stream (OSError: ")
    assert bad[streams[5]].startswith("damaged stream (ReadError: ")
    assert {*range(30), 200} <= set(pixels(batches))


def test_images_whose_names_hold_dots_are_read_or_named(tmp_path: Path, capsys) -> None:
    images = {n: encoded(Image.new("L", (4, 4), n), "PNG") for n in range(20)}
    members = {f"photo.{n:04d}.png": images[n] for n in range(4)}
    members |= {"a.png": images[4], "a.seg.png": images[10], "b.png": images[5], "b.seg.png": images[11]}
    members |= {"c.thumbnail.png": images[6], "d.left.png": images[12], "d.right.png": images[13]}
    batches = read(index_of([str(gzipped(tmp_path / "x.tar.gz", range(0), members))], tmp_path), 2)
    assert set(pixels(batches)) == set(range(7))
    bad = {name: reason for batch in batches for name, reason in batch.unreadable.items()}
    assert bad == {"x.tar.gz/d.*": "2 images of one key (left.png, right.png): none of them is used"}
    assert capsys.readouterr().out.count("images such as a.seg.png are not used") == 1


def test_a_stream_that_the_server_does_not_have_is_counted(streams: list[str], tmp_path: Path, monkeypatch) -> None:
    index = index_of([*streams, "http://127.0.0.1:9/none.tar.gz"], tmp_path)

    def gone(address: str) -> Path:
        raise BadImage(f"missing shard ({address})")

    monkeypatch.setattr(index.cache, "get", gone)
    batches = read(index, 13)
    assert set(pixels(batches)) == set(range(60))
    assert {name for batch in batches for name in batch.unreadable} == {"http://127.0.0.1:9/none.tar.gz"}
