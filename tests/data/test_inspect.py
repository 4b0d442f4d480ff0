"""What is said of shards is what counting says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import numbered_shards, photograph

from sslvit.data import inspect
from sslvit.data.array_images import array_samples
from sslvit.data.index import ShardIndex
from sslvit.data.inspect import check_shards, describe_shards
from sslvit.data.pack import pack, pack_source
from sslvit.data.plan import EpochPlan


def drawings(folder: Path, sides: list[tuple[int, int]]) -> ShardIndex:
    """A shard of images of the given heights and widths, all different."""
    (folder / "in").mkdir(parents=True)
    for number, (height, width) in enumerate(sides):
        photograph(height, width, number).save(folder / "in" / f"{number:03d}.png")
    (index,) = pack_source(folder / "in", folder / "out", workers=1)
    return index


def test_a_check_counts_shorter_sides_and_large_images_by_their_pixels(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inspect, "LARGE_PIXELS", 1000)
    found = check_shards(drawings(tmp_path, [(20, 60), (60, 20), (50, 20), (20, 50), (31, 40)]), workers=1)
    assert found.sizes == {20: 4, 31: 1}
    assert sorted(found.large.values()) == ["20 x 60", "40 x 31", "60 x 20"]


def test_images_that_occur_more_than_once_are_told_once_each(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, number in [("a", 1), ("b", 1), ("c", 1), ("d", 2), ("e", 2), ("f", 3)]:
        photograph(20, 20, number).save(folder / f"{name}.png")
    (index,) = pack_source(folder, tmp_path / "out", workers=1)
    lines = check_shards(index, workers=1).text(index).splitlines()
    place = next(i for i, line in enumerate(lines) if "more than once" in line)
    assert lines[place].endswith(": 2")
    same = [[key.split("/")[-1][0] for key in line.split(" = ")] for line in lines[place + 1 : place + 3]]
    assert sorted(map(sorted, same)) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("sides", [[8] * 7, [8, 9, 19, 20, 21, 30], [10, 25], list(range(8, 31))])
def test_every_image_stands_in_one_line_of_the_histogram(tmp_path: Path, sides: list[int]) -> None:
    index = drawings(tmp_path, [(side, 40) for side in sides])
    text = check_shards(index, workers=1).text(index)
    lines = [line.split() for line in text.split("shorter side in pixels:\n")[1].splitlines()]
    assert {len(line) for line in lines} == ({5} if max(sides) - min(sides) >= 10 else {3})  # 8 to 15, or 8 alone
    assert sum(int(line[-2]) for line in lines) == len(sides)
    assert len(lines) <= 10
    for low, *to, count, bar in lines:
        assert int(count) == sum(int(low) <= side <= int([low, *to][-1]) for side in sides)
        most = max(int(line[-2]) for line in lines)
        assert len(bar) == max(1, 40 * int(count) // most)


def test_classes_with_the_fewest_and_the_most_images_are_named(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [5, 2, 9])
    images = np.arange(16 * 16, dtype=np.uint8).reshape(16, 4, 4)
    index = pack(array_samples(images, labels), tmp_path, ["ant", "bee", "cow"], workers=1)
    text = describe_shards(index)
    assert "images per class: 2 (bee) to 9 (cow)\n" in text
    assert " in 1 shard, " in text
    assert "dropping" not in text  # at a batch that nobody asked for
    assert "GB" not in text  # of a few kilobytes


def test_what_a_job_needs_is_what_its_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = numbered_shards(tmp_path, 240, shard_mb=0.01)
    index.shards[3] = replace(index.shards[3], bytes=50_000_000)
    plan = EpochPlan(index.shard_samples, 16, lanes=8, window_shards=1)
    monkeypatch.setattr(inspect, "EpochPlan", lambda samples, batch: plan)  # in order, as large sets are read
    text = describe_shards(index, 16)
    assert f"{240 // 16} steps per epoch, each dropping 0 images" in text
    shards = [plan.shards_at_once(0, 16 // hosts) for hosts in (1, 2, 4, 8, 16)]
    assert len(set(shards)) > 1
    assert shards == [32, 16, 8, 4, 4]
    needs = ["1.5 GB on 1", "763 MB on 2", "381 MB on 4", "191 MB on 8", "191 MB on 16"]
    assert ", ".join(needs) in text
    others = [shard for number, shard in enumerate(index.shards) if number != 3]
    total = 50_000_000 + sum((tmp_path / shard.name).stat().st_size for shard in others)
    assert f"in {len(index.shards)} shards, {total / 2**20:.1f} MB" in text


def test_images_are_counted_by_their_modes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        photograph(20, 20, number).convert("L" if number > 2 else "RGB").save(folder / f"{number}.png")
    Image.new("P", (5, 5)).save(folder / "p.png")
    (index,) = pack_source(folder, tmp_path / "out", workers=1)
    assert "modes: RGB 3, L 2, P 1" in check_shards(index, workers=1).text(index)
