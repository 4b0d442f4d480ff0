"""`data.limit` and `data.limit_per_class`: which images they leave, by the seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_fixtures import numbered_shards, numbers_of, two_classes

from sslvit.data.index import ShardIndex, load_index
from sslvit.data.open import open_data
from sslvit.data.plan import EpochPlan
from sslvit.data.python_data import python_index
from sslvit.data.subset import draw_per_class, limit_samples
from sslvit.settings import DataSettings


def limited(index: ShardIndex, seed: int = 0, **limits: int) -> ShardIndex:
    return limit_samples(index, DataSettings(**limits), seed)


def test_a_limit_draws_by_the_seed_and_a_larger_one_holds_the_smaller(tmp_path: Path) -> None:
    whole = numbered_shards(tmp_path, 40, shard_mb=0.02)
    assert len(whole.shards) > 3
    drawn = {limit: set(numbers_of(limited(whole, limit=limit))) for limit in (5, 20, 39, 40)}
    assert [len(numbers) for numbers in drawn.values()] == [5, 20, 39, 40]
    assert drawn[5] < drawn[20] < drawn[39] < drawn[40] == set(range(40))
    assert set(numbers_of(limited(whole, seed=1, limit=20))) != drawn[20]
    assert numbers_of(limited(whole, limit=20)) == [n for n in numbers_of(whole) if n in drawn[20]]  # in their order
    assert len(open_data(DataSettings(str(tmp_path), global_batch_size=4), 0)[0]) == 40
    assert len(open_data(DataSettings(str(tmp_path), global_batch_size=4, limit=7), 0)[0]) == 7


def test_labels_names_and_shards_stay_those_of_the_images(tmp_path: Path) -> None:
    whole = numbered_shards(tmp_path, 40, shard_mb=0.02)
    part = limited(whole, limit=3)
    assert part.labels_of(slice(None)).tolist() == [number % 2 for number in numbers_of(part)]
    assert {part.key(sample) for sample in range(3)} <= {whole.key(sample) for sample in range(40)}
    assert part.fingerprint() == whole.fingerprint()
    assert part.shard_samples.sum() == 3
    needed = {part.locate(sample)[0] for sample in range(3)}
    plan = EpochPlan(part.shard_samples, 3)
    assert set(plan.shards_near(0)) == needed  # and no other is fetched from the network
    assert plan.shards_at_once() == len(needed)
    lanes = EpochPlan(part.shard_samples, 3, lanes=1, window_shards=1)
    assert set(lanes.shards_near(0)) <= needed
    assert sorted(lanes.batch(0)[0]) == [0, 1, 2]


def test_a_limit_per_class_draws_from_each_class(tmp_path: Path) -> None:
    labels = np.array([0] * 20 + [2] * 3 + [1] * 17)
    for seed in (0, 1):
        chosen = draw_per_class(labels, 5, seed)
        assert np.bincount(labels[chosen]).tolist() == [5, 5, 3]
        assert len(set(chosen.tolist())) == 13
        assert set(draw_per_class(labels, 2, seed).tolist()) < set(chosen.tolist())
    assert set(draw_per_class(labels, 5, 0).tolist()) != set(draw_per_class(labels, 5, 1).tolist())


def test_a_limit_is_said_and_part_of_the_order_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = numbered_shards(tmp_path, 40)
    settings = DataSettings(str(tmp_path), global_batch_size=4, limit=10)
    index, plan = open_data(settings, 7)
    assert (len(index), plan.steps_per_epoch) == (10, 2)
    assert f"{tmp_path}: data.limit: 10 of 40 images, drawn by the seed (7)" in capsys.readouterr().out
    index, _ = open_data(replace(settings, limit=None, limit_per_class=20), 7)
    assert len(index) == len(whole)
    open_data(replace(settings, limit=None, limit_per_class=30), 7)
    said = capsys.readouterr().out
    assert "data.limit_per_class: 40 of 40 images of 2 classes, drawn" in said
    assert "data.limit_per_class: 40 of 40 images of 2 classes (2 of which have fewer), drawn" in said


def test_a_data_set_from_python_is_limited_alike() -> None:
    images = [np.full((4, 4), n, np.uint8) for n in range(40)]
    whole = python_index([(image, n % 2) for n, image in enumerate(images)])
    part = limited(whole, limit_per_class=3)
    numbers = [int(np.asarray(part.read(sample))[0, 0]) for sample in range(6)]
    assert [part.key(sample) for sample in range(6)] == [f"list[{number}]" for number in numbers]
    assert [number % 2 for number in numbers] == part.labels_of(slice(None)).tolist()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"limit": 41}, r"data.limit: 41 is more than the 40 images of .*\. Leave it out"),
        ({"limit": 0}, "data.limit: 0 must be 1 or more"),
        ({"limit_per_class": 0}, "data.limit_per_class: 0 must be 1 or more"),
        ({"limit": 3, "limit_per_class": 3}, "exclude each other"),
        ({"limit": 3, "shards": None, "mixture": {"a": 1.0}}, "draw from one data set .data.shards., not from"),
        ({"limit": 3, "shards": "x.tar.gz"}, "data.limit: a stream cannot be drawn from"),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_are_refused(tmp_path: Path, limits: dict, message: str) -> None:
    numbered_shards(tmp_path, 40)
    with pytest.raises(ValueError, match=message):
        open_data(DataSettings(**{"shards": str(tmp_path), "global_batch_size": 4} | limits), 0)


def test_a_limit_per_class_needs_labels(tmp_path: Path) -> None:
    index = load_index(two_classes(tmp_path, train=12) / "train")
    index.classes = None
    with pytest.raises(ValueError, match="these images have no labels"):
        limited(index, limit_per_class=3)
