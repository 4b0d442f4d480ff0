"""Images that are both trained on and scored: found by their bytes, whatever set they are in."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from sslvit.data.array_images import array_samples
from sslvit.data.index import ShardIndex
from sslvit.data.overlap import check_same_data, count_shared, stored
from sslvit.data.pack import pack
from sslvit.data.store import PackSettings

IMAGES = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3)).astype(np.uint8)


def packed(folder: Path, images: np.ndarray, **settings) -> ShardIndex:
    index = pack(array_samples(images), folder, settings=PackSettings(**settings))
    assert index is not None
    return index


def shared(one: ShardIndex, other: ShardIndex) -> tuple[int, int]:
    with stored(one) as train, stored(other) as val:
        return count_shared(train, val)


def test_shared_images_are_counted_in_any_order_and_shards(tmp_path: Path) -> None:
    train = packed(tmp_path / "train", IMAGES[:40], shard_mb=0.003)
    assert len(train.shards) > 2
    assert shared(train, packed(tmp_path / "val", IMAGES[40:])) == (0, 20)
    assert shared(train, packed(tmp_path / "some", IMAGES[33:53])) == (7, 20)
    assert shared(train, packed(tmp_path / "again", IMAGES[:40])) == (40, 40)


def test_of_large_sets_a_sample_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = packed(tmp_path / "train", IMAGES), packed(tmp_path / "val", IMAGES[:30])
    monkeypatch.setattr("sslvit.data.overlap.MAX_COMPARED", 12)
    assert shared(train, val) == (12, 12)
    monkeypatch.setattr("sslvit.data.overlap.MAX_READ", 0)  # more bytes than anybody waits for
    assert shared(train, val) == (0, 0)


def test_the_same_data_is_refused_unless_it_is_allowed_and_common_images_are_said(tmp_path: Path, caplog) -> None:
    train, val = packed(tmp_path / "train", IMAGES[:40]), packed(tmp_path / "val", IMAGES[33:53])
    with pytest.raises(ValueError, match="train and .*train: the same images. .*--holdout 0.1., or pass --so.$"):
        check_same_data(train, train, False, "--so")
    with caplog.at_level(logging.WARNING, "sslvit"):
        check_same_data(train, train, True, "--so")
        check_same_data(train, val, False, "--so")
        check_same_data(train, packed(tmp_path / "other", IMAGES[40:]), False, "--so")
    same, some = (record.getMessage() for record in caplog.records)
    assert same.endswith("train: the same images, so these scores say nothing of others")
    assert some.endswith("val: 7 of 20 images to be scored that were compared are in both")
