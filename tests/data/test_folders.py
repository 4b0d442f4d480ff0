"""A folder of images is read as a person would expect, and what is skipped is reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from shard_fixtures import contents, image_folder

from sslvit.data.folders import folder_source
from sslvit.data.header import IMAGE_SUFFIXES
from sslvit.data.index import load_index
from sslvit.data.inspect import describe_shards
from sslvit.data.pack import pack_source


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in") / "cat", tmp_path / "out")
    assert index.classes is None
    with pytest.raises(ValueError, match="have no labels"):
        index.labels_of(slice(None))


def test_what_systems_and_archives_leave_behind_is_no_class_and_is_said(tmp_path: Path, capsys) -> None:
    source = image_folder(tmp_path / "in", count=3)
    for junk in ("__MACOSX/cat", ".cache", "cat/.ipynb_checkpoints", "dog/@eaDir", "empty", "notes"):
        (source / junk).mkdir(parents=True)
        shutil.copy(source / "cat/im.001.png", source / junk / "copy.png")
    (source / "empty/copy.png").unlink()
    (source / "notes/copy.png").rename(source / "notes/a.txt")
    for name in ("b.HEIF_", "c.xcf", "d.xcf"):
        (source / "dog" / name).write_text("x")
    (index,) = pack_source(source, tmp_path / "out", workers=1)
    assert index.classes == ["cat", "dog"]
    assert contents(index) == {(label, i): label for label in range(2) for i in range(3)}
    said = capsys.readouterr().out
    assert "not read as images: 2 x .xcf, 1 x .HEIF_, 1 x .txt" in said
    assert "hidden or system files: 1 x .cache, 1 x __MACOSX, 1 x .ipynb_checkpoints, 1 x @eaDir" in said
    assert "folders without images, which are no classes: empty, notes" in said
    assert index.skipped["*.xcf"] == "2 files that are not read as images"
    assert load_index(tmp_path / "out").skipped["empty/"] == "a folder without images"


def test_endings_that_an_extra_would_read_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in", count=1)
    shutil.copy(source / "cat/im.000.png", source / "cat/a.jfif")
    (source / "cat/b.HEIC").write_bytes(b"x")
    monkeypatch.setattr("sslvit.data.folders.IMAGE_SUFFIXES", IMAGE_SUFFIXES - {".heic"})
    found = folder_source(source)
    assert {sample.key + sample.suffix for sample in found.samples} == {
        "cat/im.000.png", "cat/a.jfif", "dog/im.000.png",
    }  # fmt: skip
    assert found.notes == ["not read as images: 1 x .HEIC (to read them: pip install 'sslvit[heif]')"]


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test", "valid"), ("train",)])
def test_splits_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        image_folder(tmp_path / "in" / name, count=1)
    with pytest.raises(
        ValueError, match=r"look like splits, not classes. Take each by itself: sslvit shards pack .*in/"
    ):
        pack_source(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_called_train_among_others_is_one_and_said(tmp_path: Path) -> None:
    found = folder_source(image_folder(tmp_path / "in", ("bus", "car", "train")))
    assert found.classes == ["bus", "car", "train"]
    assert found.notes == ["train is taken for classes like the others"]


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    source, elsewhere = image_folder(tmp_path / "in", count=2), image_folder(tmp_path / "else", ("a",), 2)
    (source / "cat" / "more").symlink_to(elsewhere / "a")
    (source / "dog" / "up").symlink_to(source)
    found = folder_source(source)
    keys = [sample.key for sample in found.samples if sample.label == 0]
    assert keys == ["cat/im.000", "cat/im.001", "cat/more/im.000", "cat/more/im.001"]
    assert [sample.key for sample in found.samples if sample.label == 1] == ["dog/im.000", "dog/im.001"]
    assert found.skipped == {"dog/up": "a link to a folder above it"}
    assert any("skipped" in note for note in found.notes)


def test_numbers_as_class_names_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    found = folder_source(image_folder(tmp_path / "in", tuple(str(n) for n in range(11)), 1))
    assert found.classes == [str(n) for n in range(11)]
    assert [sample.key.split("/")[0] for sample in found.samples] == found.classes


def test_names_that_are_not_utf8_are_packed_and_named(tmp_path: Path, capsys) -> None:
    source = image_folder(tmp_path / "in", count=2)
    os.rename(source / "cat/im.000.png", os.fsencode(source / "cat") + b"/caf\xe9.png")
    os.mkdir(os.fsencode(source) + b"/\xff")
    shutil.copy(source / "dog/im.000.png", os.fsencode(source) + b"/\xff/a.png")
    os.rename(source / "dog/im.001.png", os.fsencode(source) + b"/\xff/b\xfe.png")
    with open(os.fsencode(source) + b"/\xff/bad\xe9.png", "wb") as file:
        file.write(b"nonsense")
    (index,) = pack_source(source, tmp_path / "out", workers=1)
    assert len(index) == 5
    again = load_index(tmp_path / "out")
    assert again.classes == ["cat", "dog", "\udcff"]
    assert list(again.skipped) == ["\udcff/bad\udce9.png"]
    describe_shards(again).encode()
    assert "first: \\xff/bad\\xe9.png: not an image" in capsys.readouterr().out


def test_bad_sources_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "no images there"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_source(source, tmp_path / "out")
    mixed = image_folder(tmp_path / "mixed")
    Image.new("RGB", (4, 4)).save(mixed / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png.*beside folders of images \(cat"):
        pack_source(mixed, tmp_path / "out")
    with pytest.raises(ValueError, match="must be in .0, 1."):
        pack_source(mixed, tmp_path / "out", holdout=1.5)
    assert not (tmp_path / "out").exists()


def test_a_pipe_among_the_images_does_not_hang(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", count=2)
    os.mkfifo(source / "cat" / "pipe.jpg")
    assert len(pack_source(source, tmp_path / "out")[0]) == 4


def test_an_unreadable_class_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scandir = image_folder(tmp_path / "in"), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="dog: not readable .Permission denied.. Check its permissions"):
        folder_source(source)
