"""Images that are both trained on and scored: found by their bytes, whatever set they are in."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslvit.data.array_images import array_samples
from sslvit.data.index import ShardIndex
from sslvit.data.open import open_shards
from sslvit.data.overlap import check_same_data, check_same_source, count_shared, stored
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


def test_one_folder_as_both_is_refused_before_it_is_packed(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "train")
    for train, val in (("train", "train"), ("train", "link")):
        with pytest.raises(ValueError, match=r"the same images\. .*pass --so"):
            check_same_source(str(tmp_path / train), str(tmp_path / val), False, "--so")
    check_same_source(str(tmp_path / "train"), str(tmp_path / "val"), False, "--so")
    check_same_source(str(tmp_path / "train"), str(tmp_path / "train"), True, "--so")


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


@pytest.mark.parametrize(("names", "is_said"), [(["cat_{}", "cat_{}"], True), (["cat_{}", "dog_{}"], False),
                                                (["{}", "{}"], False)])  # fmt: skip
def test_copies_that_were_encoded_anew_are_known_by_their_names(
    names: list[str], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, name, kind in zip(("train", "val"), names, ("png", "bmp"), strict=True):
        (tmp_path / folder).mkdir()
        for number, pixels in enumerate(IMAGES[:12]):
            Image.fromarray(pixels).save(tmp_path / folder / f"{name.format(number)}.{kind}")
    train, val = (open_shards(tmp_path / folder) for folder in ("train", "val"))
    with caplog.at_level(logging.WARNING, "sslvit"):
        check_same_data(train, val, False, "--so")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["12 images of the same names in both" in text for text in said] == [True] * is_said
