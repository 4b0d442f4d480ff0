"""An image folder is packed once, by one process, and found again."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from shard_fixtures import encoded, image_folder, numbered_shards, numbers_of

from sslvit.data.open import is_image_folder, open_shards
from sslvit.data.pack import pack_source
from sslvit.data.remote import ShardCache


def test_folders_whose_files_have_equal_names_and_lengths_do_not_share_shards(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("L", (6, 6), 50 * number + i).save(tmp_path / name / f"{i}.bmp")
    cache = ShardCache(tmp_path / "cache")
    for number, name in enumerate(("one", "other")):
        assert sorted(numbers_of(open_shards(tmp_path / name, cache))) == [50 * number + i for i in range(4)]
    Image.new("L", (6, 6), 200).save(tmp_path / "one" / "0.bmp")
    assert sorted(numbers_of(open_shards(tmp_path / "one", cache))) == [1, 2, 3, 200]


def _open_as_rank(rank: int, source: Path, cache: Path, walks: Path, results) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    import sslvit.data.open_folder as module

    original = module.folder_source

    def slow_walk(path: Path):
        time.sleep(0.2)
        with walks.open("a") as file:
            file.write(f"{rank}\n")
        return original(path)

    module.folder_source = slow_walk
    results.put((rank, len(open_shards(source, ShardCache(cache)))))


def test_only_the_first_process_of_a_machine_walks_an_image_folder(tmp_path: Path) -> None:
    source, context = image_folder(tmp_path / "in"), multiprocessing.get_context("fork")
    for start in range(2):  # the second time the shards are there already, and one file more
        results = context.Queue()
        about = (source, tmp_path / "cache", tmp_path / f"walks{start}", results)
        ranks = [context.Process(target=_open_as_rank, args=(rank, *about)) for rank in (2, 1, 0)]
        for rank in ranks:
            rank.start()
        assert dict(results.get(timeout=30) for _ in ranks) == dict.fromkeys(range(3), 20 + start)
        for rank in ranks:
            rank.join()
        assert (tmp_path / f"walks{start}").read_text() == "0\n"
        shutil.copy(source / "cat" / "im.001.png", source / "cat" / "new.png")
        next((tmp_path / "cache" / "packed").glob("walk-*.json")).unlink()


def test_a_process_whose_first_one_says_nothing_walks_by_itself(tmp_path: Path, monkeypatch, capsys) -> None:
    source, cache = image_folder(tmp_path / "in"), ShardCache(tmp_path / "cache")
    assert len(open_shards(source, cache)) == 20  # of another start: this process has no first one
    shutil.copy(source / "cat" / "im.001.png", source / "cat" / "new.png")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("sslvit.data.open_folder.MAX_WAIT_SECONDS", 0.2)
    monkeypatch.setattr("sslvit.data.open_folder.os.getppid", lambda: 1)
    assert len(open_shards(source, cache)) == 21
    assert "waiting for the first process on this machine" in capsys.readouterr().out


def test_an_image_folder_is_packed_once_into_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = image_folder(tmp_path / "one"), image_folder(tmp_path / "other", count=3)
    cache = ShardCache(tmp_path / "cache")
    before = open_shards(one, cache)
    one.chmod(0o555)  # a data set that is mounted read-only
    again = open_shards(one, cache)
    assert len(before) == len(again) == 20
    assert before.location == again.location
    assert before.location in capsys.readouterr().out
    assert not list(tmp_path.glob("*-shards"))
    assert len(open_shards(other, cache)) == 6
    one.chmod(0o755)
    changed = one / "cat" / "im.001.png"
    changed.write_bytes(encoded(Image.new("RGB", (6, 8), (9, 9, 9)), "PNG") + b"more")
    assert open_shards(one, cache).location != before.location
    with pytest.raises(FileNotFoundError, match="no data given"):
        open_shards("", cache)


@pytest.mark.parametrize("gone", ["shard-000000.tar", "index.npy", "index.json"])
def test_shards_that_were_purged_from_the_cache_are_packed_again(tmp_path: Path, gone: str) -> None:
    """Scratch disks are cleared of files that nobody has read for some weeks."""
    source, cache = image_folder(tmp_path / "in"), ShardCache(tmp_path / "cache")
    before = open_shards(source, cache)
    (Path(before.location) / gone).unlink()
    again = open_shards(source, cache)
    assert not again.missing_shards()
    assert (again.location, again.fingerprint()) == (before.location, before.fingerprint())


def test_images_beside_a_tar_are_not_left_out_silently(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, cache = image_folder(tmp_path / "in"), ShardCache(tmp_path / "cache")
    pack_source(source, tmp_path / "packed")
    shutil.copy(tmp_path / "packed" / "shard-000000.tar", source / "backup.tar")
    assert open_shards(source, cache).classes == ["0", "1"]
    printed = capsys.readouterr()
    assert "in: its .tar files are read as shards, and the images beside them (the first: cat/im.000.png)" in (
        printed.out + printed.err
    )
    (tmp_path / "packed" / "index.json").unlink()
    open_shards(tmp_path / "packed", cache)
    assert "the images beside them" not in "".join(capsys.readouterr())


def test_a_class_may_be_called_packing(tmp_path: Path) -> None:
    source, cache = image_folder(tmp_path / "in"), ShardCache(tmp_path / "cache")
    (source / "cat").rename(source / "packing")
    assert is_image_folder(source)
    assert open_shards(source, cache).classes == ["dog", "packing"]


@pytest.mark.parametrize("name", ["set {a,b}", "x.tar", "a[1]*"])
def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path, name: str) -> None:
    cache = ShardCache(tmp_path / "cache")
    assert len(open_shards(image_folder(tmp_path / name), cache)) == 20
    numbered_shards(tmp_path / "shards" / name, 7)
    assert len(open_shards(tmp_path / "shards" / name, cache)) == 7


def test_home_variables_and_stars_in_a_path_are_what_a_shell_makes_of_them(tmp_path: Path, monkeypatch) -> None:
    numbered_shards(tmp_path / "shards", 20, shard_mb=0.01)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINE", "shards")
    cache = ShardCache(tmp_path / "cache")
    for name in ("~/shards", "$HOME/$MINE", "~/shards/*.tar", "~/shards/shard-00000?.tar"):
        assert len(open_shards(name, cache)) == 20
    with pytest.raises(FileNotFoundError, match="no file matches .*nothing-"):
        open_shards("~/shards/nothing-*.tar", cache)
