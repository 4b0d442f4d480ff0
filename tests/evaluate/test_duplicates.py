"""Near-duplicates are found in blocks, named, and left out by packing what is kept; nothing is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse.csgraph import connected_components
from shard_fixtures import photograph, png, write_tar

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.folders import folder_source
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.data.scan import index_shards
from sslvit.evaluate import duplicates
from sslvit.evaluate.duplicates import connect, find_near_duplicates, groups_of
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

THRESHOLD = "0.98"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, some of them twice or three times, in train/; two more in val/, one of them a copy; an encoder."""
    folder = tmp_path_factory.mktemp("duplicates")
    for name in ("train", "val"):
        (folder / "images" / name).mkdir(parents=True)

    def save(name: str, image: Image.Image, quality: int) -> None:
        image.save(folder / "images" / name, quality=quality)

    for seed in range(6):
        save(f"train/a{seed}.jpg", photograph(40, 48, seed), 95)
    save("train/b0.jpg", photograph(40, 48, 0), 70)
    save("train/c0.jpg", photograph(40, 48, 0).resize((96, 80)), 97)  # the largest file
    save("train/b1.jpg", photograph(40, 48, 1), 70)
    save("val/x.jpg", photograph(40, 48, 5), 80)
    save("val/y.jpg", photograph(40, 48, 9), 80)
    for name in ("train", "val"):
        pack(folder_source(folder / "images" / name).samples, folder / name, workers=1)
    torch.manual_seed(0)
    save_encoder(
        ViTEncoder(EncoderSettings(32, patch=8, width=32, depth=1, heads=2, pooling="mean")), folder / "encoder"
    )
    return folder


def short(names: list[str]) -> list[str]:
    return sorted(Path(name).stem for name in names)


# ---- comparing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "first"), [(3, 40), (7, 25), (64, 40), (16, 16)])
def test_blocks_connect_what_the_whole_matrix_connects(block: int, first: int) -> None:
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 3), dim=1)
    similar = features @ features.T >= 0.95
    similar[first:, first:] = False  # pairs of later rows do not count
    count, labels = connected_components(similar.numpy())
    found = connect(features, 0.95, first, block=block)
    assert len(np.unique(found)) == count
    assert 5 < count < 35
    for label in range(count):
        rows = np.flatnonzero(labels == label)
        assert set(found[rows]) == {rows[0]}


def test_thousands_of_equal_images_are_one_group_and_compared_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.nn.functional.normalize(torch.ones(3000, 4), dim=1)
    features[1::3] *= -1
    largest = []
    real = torch.Tensor.nonzero
    monkeypatch.setattr(
        torch.Tensor, "nonzero", lambda self, **more: largest.append(self.numel()) or real(self, **more)
    )
    groups = groups_of(connect(features, 1.0, 3000, block=500))
    assert [len(group) for group in groups] == [2000, 1000]
    assert max(largest) == 500 * 500


def test_a_threshold_and_a_number_of_images_that_cannot_be_are_refused(here: Path, monkeypatch) -> None:
    encoder, index = sslvit.load_encoder(here / "encoder"), load_index(here / "train")
    for threshold in (0.0, 1.1, -0.5):
        with pytest.raises(ValueError, match=r"--threshold .*: must be in \(0, 1\]"):
            find_near_duplicates(encoder, index, threshold)
    monkeypatch.setattr(duplicates, "MAX_IMAGES", 10)
    with pytest.raises(ValueError, match="11 images are more than the 10 that are compared"):
        find_near_duplicates(encoder, index, 0.9, load_index(here / "val"))


# ---- the command ---------------------------------------------------------------------------------------------


def test_groups_and_leaks_are_named_and_what_is_kept_is_packed(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        "shards",
        "check",
        str(here / "train"),
        "--near-duplicates",
        str(here / "encoder"),
        "--threshold",
        THRESHOLD,
    ]
    keep, before = tmp_path / "keep.txt", (here / "train" / "index.json").read_bytes()
    files = ["--write", str(keep), "--figure", str(tmp_path / "groups.png")]
    assert main([*words, "--against", str(here / "val"), *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["near_duplicates"]
    assert [short(names) for names in found["groups"]] == [["a0", "b0", "c0"], ["a1", "b1"]]
    assert [(short(one["images"]), short(one["against"])) for one in found["leaks"]] == [(["a5"], ["x"])]
    assert short(keep.read_text().splitlines()) == ["a1", "a2", "a3", "a4", "c0"]  # largest files; a5 is val's
    assert found["kept"] == 5
    assert (tmp_path / "groups.png").stat().st_size > 1000
    assert (here / "train" / "index.json").read_bytes() == before
    assert main(["shards", "pack", str(here / "train"), str(tmp_path / "kept"), "--only", str(keep)]) == 0
    kept = load_index(tmp_path / "kept")
    assert short([kept.key(number) for number in range(len(kept))]) == ["a1", "a2", "a3", "a4", "c0"]
    capsys.readouterr()
    words[2] = str(tmp_path / "kept")
    assert main([*words, "--against", str(here / "val")]) == 0
    printed = capsys.readouterr().out
    assert "0 groups of 0 images" in printed
    assert "leaks: 0 images are near-duplicates of 0 of" in printed


def test_the_text_names_groups_and_without_another_set_nothing_leaks(here: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "shards",
        "check",
        str(here / "train"),
        "--near-duplicates",
        str(here / "encoder"),
        "--threshold",
        THRESHOLD,
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "near-duplicates (cosine similarity of features 0.98 or more): 2 groups of 5 images, 3 more than" in printed
    assert "leaks" not in printed
    assert "damaged shards: 0" in printed  # what it checks otherwise, it still does
    encoder = sslvit.load_encoder(here / "encoder")
    found = find_near_duplicates(encoder, load_index(here / "train"), float(THRESHOLD), cache=None)
    assert short(found.kept()) == ["a1", "a2", "a3", "a4", "a5", "c0"]
    assert found.text() in printed
    assert "<td>3</td>" in found._repr_html_()


def test_a_group_with_a_leak_keeps_none_of_its_images(here: Path) -> None:
    encoder, val = sslvit.load_encoder(here / "encoder"), load_index(here / "val")
    found = find_near_duplicates(encoder, val, float(THRESHOLD), load_index(here / "train"), cache=None)
    assert short(found.kept()) == ["y"]
    assert found.within == []  # pairs of the other set alone are not its groups
    assert [(short(inside), short(outside)) for inside, outside in found.leaks] == [(["x"], ["a5"])]


def test_an_image_that_cannot_be_read_is_not_kept(here: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "s" / "0.tar" if (tmp_path / "s").mkdir() is None else tmp_path,
              {"a.png": png(1), "b.png": png(200), "c.png": png(9)[:40]})  # fmt: skip
    index = index_shards(tmp_path / "s", 1)
    encoder = sslvit.load_encoder(here / "encoder")
    found = find_near_duplicates(encoder, index, 1.0, cache=None)
    assert short(found.kept()) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--write", "x.txt"], "--against, --write and --figure are for --near-duplicates ENCODER"),
        (["--near-duplicates", "ENCODER", "--threshold", "2"], "--threshold 2: must be in (0, 1]"),
        (["--near-duplicates", "nowhere"], "nowhere: no such file or folder"),
        (["--near-duplicates", "ENCODER", "--figure", "x.jpg"], "a picture is written as PNG"),
        (["--near-duplicates", "ENCODER", "--write", "."], "already exists"),
    ],
)
def test_what_cannot_be_is_said(here: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    given = [str(here / "encoder") if word == "ENCODER" else word for word in words]
    assert main(["shards", "check", str(here / "train"), *given]) == 1
    assert message in capsys.readouterr().err


# ---- packing shards again ------------------------------------------------------------------------------------


def test_shards_are_packed_again_with_their_labels_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for seed in range(3):
            photograph(30, 30, seed + 10 * (name == "dog")).save(tmp_path / "images" / name / f"{name}.{seed}.jpg")
    (tmp_path / "images" / "dog" / "dog.2.jpg").unlink()
    sslvit.pack(tmp_path / "images", tmp_path / "first", workers=1)
    again = sslvit.pack(tmp_path / "first", tmp_path / "again", workers=1).indices[0]
    first = load_index(tmp_path / "first")

    def contents(index) -> dict[bytes, tuple[str, str]]:
        from sslvit.data.shard_images import ShardImages

        labels = index.labels_of(slice(None))
        return {ShardImages(index).read(number): (index.classes[labels[number]], index.key(number).rpartition("/")[2])
                for number in range(len(index))}  # fmt: skip

    assert contents(again) == contents(first)
    assert len(contents(first)) == 5
    keep = tmp_path / "keep.txt"
    keep.write_text(f"{first.key(3)}\r\n\n{first.key(0)}\n")
    some = sslvit.pack(tmp_path / "first", tmp_path / "some", only=keep, workers=1).indices[0]
    assert contents(some).keys() == {one for one, about in contents(first).items()
                                     if about[1] in {Path(first.key(n)).name for n in (0, 3)}}  # fmt: skip
    assert some.classes == first.classes
    for text, source, message in (
        ("nothing/of/it.jpg\n", "first", "1 of its 1 names are not in"), ("\n", "first", "names no images"),
        ("a\n", "images", "holds none. Give the checked shards"),
    ):  # fmt: skip
        keep.write_text(text)
        assert main(["shards", "pack", str(tmp_path / source), str(tmp_path / "no"), "--only", str(keep)]) == 1
        assert message in capsys.readouterr().err
    words = ["shards", "pack", str(tmp_path / "first"), str(tmp_path / "no"), "--only", str(keep)]
    assert main([*words, "--holdout", "0.5"]) == 1
    assert "--only and --holdout exclude each other" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "none.txt")]) == 1
    assert "none.txt: no such file" in capsys.readouterr().err


def test_shards_that_are_read_as_stored_are_packed_as_stored(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    photograph(30, 40).save(tmp_path / "images" / "a.jpg")
    sslvit.pack(tmp_path / "images", tmp_path / "first", orientation="stored", workers=1)
    with pytest.raises(ValueError, match="packing them so takes orientation=.?stored"):
        sslvit.pack(tmp_path / "first", tmp_path / "again")
    assert (
        sslvit.pack(tmp_path / "first", tmp_path / "again", orientation="stored", workers=1).indices[0].orientation
        == "stored"
    )
