"""What a user names as data is found, indexed once and checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_fixtures import numbered_shards, numbers_of, png, write_tar

from sslvit.data.index import load_index
from sslvit.data.inspect import describe_shards
from sslvit.data.mixture import JoinedIndex
from sslvit.data.open import check_present, open_shards
from sslvit.data.open_names import expand
from sslvit.data.remote import ShardCache
from sslvit.data.scan import index_shards


def test_patterns_name_some_shards_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    index = numbered_shards(tmp_path / "in", 30, shard_mb=0.01)
    cache = ShardCache(tmp_path / "cache")
    names = [shard.name for shard in index.shards]
    assert expand(f"{tmp_path}/in/shard-{{000000..000002}}.tar") == [f"{tmp_path}/in/{name}" for name in names[:3]]
    part = open_shards(f"{tmp_path}/in/shard-{{000001..000002}}.tar", cache)
    first, last = index.first_of_shard[[1, 3]]
    assert numbers_of(part) == numbers_of(index)[first:last]
    assert part.classes == ["even", "odd"]
    for name in ("index.json", "index.npy"):
        (tmp_path / "in" / name).unlink()
    for _ in range(2):
        assert numbers_of(open_shards(f"{tmp_path}/in/shard-{{000001..000002}}.tar", cache)) == numbers_of(part)
    assert capsys.readouterr().out.count("indexing them once") == 1
    with pytest.raises(FileNotFoundError, match="shard-000077.tar does not exist"):
        open_shards(f"{tmp_path}/in/shard-{{000077..000078}}.tar", cache)
    with pytest.raises(ValueError, match="braces that do not close"):
        open_shards(f"{tmp_path}/in/shard-{{00..03.tar", cache)


@pytest.mark.parametrize(("chosen", "is_mapped"), [([0, 1, 2, 3], True), ([1, 2], True), ([2], True), ([2, 0], False)])
def test_a_pattern_leaves_the_records_of_neighbors_in_their_file(
    tmp_path: Path, chosen: list[int], is_mapped: bool
) -> None:
    index = numbered_shards(tmp_path, 40, shard_mb=0.02)
    assert len(index.shards) == 4
    pattern = f"{tmp_path}/shard-{{{','.join(f'{n:06d}' for n in chosen)}}}.tar".replace("{000002}", "000002")
    part = open_shards(pattern, ShardCache(tmp_path / "cache"))
    numbers = numbers_of(index)
    expected = [number for n in chosen for number in numbers[index.first_of_shard[n] : index.first_of_shard[n + 1]]]
    assert numbers_of(part) == expected
    assert part.labels_of(slice(None)).tolist() == [number % 2 for number in expected]
    assert isinstance(part.records, np.memmap) == is_mapped


def test_tars_that_the_index_does_not_list_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    numbered_shards(tmp_path, 4)
    open_shards(tmp_path)
    assert "NOT read" not in capsys.readouterr().out
    write_tar(tmp_path / "later.tar", {f"{i}.png": png(i) for i in range(4)})
    assert len(open_shards(tmp_path)) == 4
    words = f"1 of 2 tar files there are not in index.json and are NOT read (the first: later.tar). To read them too: sslvit shards index {tmp_path}"  # noqa: E501
    assert words in capsys.readouterr().out
    assert words in describe_shards(load_index(tmp_path))
    index_shards(tmp_path)
    assert len(open_shards(tmp_path)) == 8
    assert "NOT read" not in capsys.readouterr().out


def test_equal_names_in_two_folders_are_two_shards(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", {f"{i}.png": png(10 * number + i) for i in range(4)})
    index = open_shards(f"{tmp_path}/{{a,b}}/x.tar", ShardCache(tmp_path / "cache"))
    keys = [index.key(sample) for sample in range(8)]
    assert keys == [f"{name}/x.tar/{i}.png" for name in "ab" for i in range(4)]
    alone = open_shards(f"{tmp_path}/a/x.tar", ShardCache(tmp_path / "cache"))
    assert alone.key(0) == "x.tar/0.png"


def test_missing_shards_of_a_mixture_are_those_of_one_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small, large = numbered_shards(tmp_path / "a", 4), numbered_shards(tmp_path / "b", 200)
    joined = JoinedIndex([small, large], [1, 1])
    clear = replace(large, channels=4, mean=[0.2, 0.3, 0.4, 1.0], std=[0.1, 0.1, 0.1, 0.0])
    gray, color = (
        replace(large, channels=1, mean=[0.5], std=[0.1]),
        replace(large, channels=3, mean=[0.6, 0.5, 0.4], std=[0.1] * 3),
    )
    mixed = JoinedIndex([clear, color], [1, 1])  # an image without alpha is opaque
    assert mixed.mean == [0.4, 0.4, 0.4, 1.0]
    assert mixed.std[3] == 0
    assert JoinedIndex([gray, color], [1, 1]).mean == [0.55, 0.5, 0.45]
    check_present(joined, 0.01)
    small.shard_path(0).unlink()
    assert joined.missing_shards() == {0: "missing shard"}
    check_present(joined, 0.05)
    said = capsys.readouterr().out
    assert f"1 shards cannot be read, 4 of 204 samples ({tmp_path}/a/shard-000000.tar: missing shard)" in said
    with pytest.raises(ValueError, match="4 of 204 samples"):
        check_present(joined, 0.01)
    other = JoinedIndex([large, small], [1, 1])
    assert other.missing_shards() == {1: "missing shard"}


def test_local_shards_that_were_replaced_are_indexed_anew(tmp_path: Path) -> None:
    cache, pattern = ShardCache(tmp_path / "cache"), f"{tmp_path}/{{a,b}}.tar"
    for name, number in (("a", 1), ("b", 2)):
        write_tar(tmp_path / f"{name}.tar", {"x.png": png(number)})
    before = open_shards(pattern, cache)
    write_tar(tmp_path / "b.tar", {"y.png": png(9), "z.png": png(8)})
    after = open_shards(pattern, cache)
    assert (numbers_of(before)[:1], numbers_of(after)) == ([1], [1, 9, 8])


def test_shards_in_a_folder_that_one_may_only_read_are_indexed_in_the_cache(tmp_path: Path, monkeypatch) -> None:
    index = numbered_shards(tmp_path / "theirs", 20, shard_mb=0.01)
    for name in ("index.json", "index.npy", "_info.json"):
        (tmp_path / "theirs" / name).unlink()
    before = sorted((tmp_path / "theirs").iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = open_shards(tmp_path / "theirs", ShardCache(tmp_path / "cache"))
    assert numbers_of(found) == numbers_of(index)
    assert sorted((tmp_path / "theirs").iterdir()) == before


def test_a_folder_above_shards_names_them(tmp_path: Path) -> None:
    for name in ("photos/train", "photos/val"):
        numbered_shards(tmp_path / "sets" / name, 4)
    for folder, first in (("sets", "photos/train"), ("sets/photos", "train")):
        with pytest.raises(ValueError, match=f"no images there .shards lie in its folders {first}, .*/photos/train."):
            open_shards(tmp_path / folder)
        with pytest.raises(FileNotFoundError, match="no index.json there. Shards lie below it: .*/train, .*/val."):
            load_index(tmp_path / folder)
