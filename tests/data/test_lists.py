"""Lists name images and labels by column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shard_fixtures import contents, image_folder

from sslvit.data.any_source import SourceOptions, read_source
from sslvit.data.pack import pack_source
from sslvit.data.scan import index_shards


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_list_names_images_and_labels(tmp_path: Path, kind: str) -> None:
    image_folder(tmp_path / "in")
    rows = [(f"in/{name}/im.{i:03d}.png", name) for name in ("dog", "cat") for i in (1, 2)]
    if kind == "jsonl":
        text = "".join(json.dumps({"file_name": path, "label": label}) + "\n" for path, label in rows)
    else:
        text = "".join({"csv": ",", "tsv": "\t"}[kind].join(row) + "\n" for row in [("path", "class"), *rows])
    (tmp_path / f"list.{kind}").write_text(text)
    (index,) = pack_source(tmp_path / f"list.{kind}", tmp_path / "out")
    assert index.classes == ["cat", "dog"]
    assert contents(index) == {(0, 1): 0, (0, 2): 0, (1, 1): 1, (1, 2): 1}


@pytest.mark.parametrize("name", ["photo", "photo.dat", "photo.cls", "photo.caf\udce9"])
def test_images_of_any_ending_are_found_in_their_shards_again(tmp_path: Path, name: str) -> None:
    image_folder(tmp_path / "in")
    (tmp_path / "in" / "cat" / "im.001.png").rename(tmp_path / name)
    rows = [{"path": name, "label": "cat"}, {"path": "in/dog/im.002.png", "label": "dog"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (index,) = pack_source(tmp_path / "a.jsonl", tmp_path / "out")
    assert contents(index) == {(0, 1): 0, (1, 2): 1}
    assert contents(index_shards(tmp_path / "out", workers=1)) == contents(index)


def test_numbers_in_a_list_stay_class_numbers_and_labels_may_be_absent(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    (tmp_path / "a.csv").write_text("path,label\nin/cat/im.001.png,3\nin/dog/im.002.png,0\n")
    found = read_source(tmp_path / "a.csv")
    assert [sample.label for sample in found.samples] == [3, 0]
    assert found.classes == ["0", "1", "2", "3"]
    (tmp_path / "b.csv").write_text("image\nin/cat/im.001.png\n")
    assert read_source(tmp_path / "b.csv").classes is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\nnone.png,1\n", r"a.csv, line 2: .*none.png does not exist"),
        ("a.csv", "picture,label\nx,1\n", "no column of paths among picture, label"),
        ("a.csv", "path,label\nin/cat/im.001.png,\n", "line 2: no label given"),
        ("a.csv", "", "an empty list"),
        ("a.jsonl", '{"path": "in/cat/im.001.png"}\n{"path\n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.csv", "path\nin/cat/im.001.png,extra\n", "line 2: more fields than the 1 columns"),
        ("a.csv", "path,label\nin/cat/im.001.png,-2\n", "a.csv: a label of -2; classes count from 0"),
        ("a.csv", "path,label\nin/cat/im.001.png,99999\n", "labels up to 99999 for 1 images are no class numbers"),
        ("a.txt", "", "neither a folder, nor a list"),
        ("a.tar", "", "an archive. Unpack it.*needs no packing: sslvit shards index"),
    ],
)
def test_a_wrong_list_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    image_folder(tmp_path / "in")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        pack_source(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["labels", " label", "species", "Class", "class_name"])
def test_columns_with_the_usual_names_are_labels(tmp_path: Path, column: str, capsys) -> None:
    image_folder(tmp_path / "in")
    text = f"path,{column},note\nin/cat/im.001.png, cat,x\nin/dog/im.002.png, dog,y\n"
    (tmp_path / "a.csv").write_text(text)
    (index,) = pack_source(tmp_path / "a.csv", tmp_path / "out", workers=1)
    assert index.classes == ["cat", "dog"]
    said = capsys.readouterr().out
    assert f"labels: column {column.strip()}" in said
    assert "columns that are not used: note" in said


def test_a_column_of_another_name_is_said_and_taken_by_name(tmp_path: Path, capsys) -> None:
    image_folder(tmp_path / "in")
    (tmp_path / "a.csv").write_text("path,kind\nin/cat/im.001.png,cat\nin/dog/im.002.png,dog\n")
    (index,) = pack_source(tmp_path / "a.csv", tmp_path / "out", workers=1)
    said = capsys.readouterr().out
    assert index.classes is None
    assert 'columns that are not used: kind (for labels: label_column="kind")' in said
    found = read_source(tmp_path / "a.csv", SourceOptions(label_column="kind"))
    assert found.classes == ["cat", "dog"]
    with pytest.raises(ValueError, match="--label-column none: not a column of .*a.csv .path, kind"):
        read_source(tmp_path / "a.csv", SourceOptions(label_column="none"))


def test_a_list_whose_first_row_has_no_label_names_it(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    rows = [{"path": "in/cat/im.001.png"}, {"path": "in/cat/im.002.png", "label": "cat"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="a.jsonl, line 1: no label given"):
        read_source(tmp_path / "a.jsonl")
