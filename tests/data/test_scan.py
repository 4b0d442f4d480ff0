"""Shards that others wrote are indexed, and what is skipped is reported."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import contents, encoded, numbers_of, png, write_tar

from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index, unlisted_warning
from sslvit.data.inspect import check_shards, describe_shards
from sslvit.data.pack import pack
from sslvit.data.reader import ShardReader
from sslvit.data.scan import IndexOptions, index_shards


@pytest.mark.parametrize("compact", [True, False])
def test_shards_written_by_webdataset_are_indexed(tmp_path: Path, compact: bool) -> None:
    import webdataset

    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "theirs" / "x-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(10):
            pixels = np.full((6, 8, 3), (i % 2, i, 0), np.uint8)
            sample = {"__key__": f"s/{i:04d}", "png": Image.fromarray(pixels), "cls": i % 2, "json": {"i": i}}
            writer.write(sample if compact else sample | {"seg.png": Image.new("L", (4, 4), 200)})
    index = index_shards(tmp_path / "theirs")
    assert [shard.samples for shard in index.shards] == [3, 3, 3, 1]
    assert contents(index) == {(i % 2, i): i % 2 for i in range(10)}
    assert load_index(tmp_path / "theirs").classes == ["0", "1"]


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_dangerous_members_are_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = pickle.dumps(Harmful(tmp_path / "harmed"))
    write_tar(tmp_path / "a.tar", {
        "ok.png": png(5), "../up.png": png(6), "/root.png": png(7), "b.pyd": content, "c.pth": content,
        "c.png": png(8), "d.pkl": content,
    })  # fmt: skip
    index = index_shards(tmp_path, workers=1)
    assert sorted(numbers_of(index)) == [5, 8]
    assert index.skipped == {
        "a.tar/../up.png": "a path that leads out of its folder",
        "a.tar//root.png": "a path that leads out of its folder",
        "a.tar/b.pyd": "a pickle, which would run code", "a.tar/c.pth": "a pickle, which would run code",
        "a.tar/d.pkl": "a pickle, which would run code",
    }  # fmt: skip
    assert "skipped 5 entries" in capsys.readouterr().out
    assert not (tmp_path / "harmed").exists()
    assert load_index(tmp_path).skipped == index.skipped


@pytest.mark.parametrize(
    ("members", "message"),
    [({"a.txt": b"hello"}, "hold no images"), ({"a.png": b"nonsense"}, "hold no images .a.tar/a.png: not an image")],
)
def test_shards_without_images_are_refused(tmp_path: Path, members: dict, message: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        index_shards(tmp_path)


def test_odd_members_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {
        "a.png": png(1), "a.jpg": png(2), "a.cls": b"0", "b.png": png(3), "b.cls": b"dog",
        "c.png": png(4), "c.cls": b"-3",
    })  # fmt: skip
    index = index_shards(tmp_path)
    assert sorted(numbers_of(index)) == [1, 3, 4]
    assert index.classes is None
    assert index.skipped == {"a.tar/a.jpg": "a second image of its key"}
    assert "a label of -3; classes count from 0; they are not used" in capsys.readouterr().out


def test_labels_that_only_some_images_have_are_not_used_and_it_is_said(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "c.png": png(3)})
    assert index_shards(tmp_path).classes is None
    assert "2 of 3 images have no label (.cls), so the others' are not used either" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels cls: 2 of 3 images of .* have none"):
        index_shards(tmp_path, options=IndexOptions(labels="cls"))


def test_a_shard_without_labels_among_others_leaves_all_without_and_it_is_said(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"1"})
    write_tar(tmp_path / "b.tar", {f"{i}.png": png(i) for i in (3, 4, 5)})
    index = index_shards(tmp_path)
    assert (len(index), index.classes) == (5, None)
    assert index.records["label"].tolist() == [-1] * 5
    assert "3 of 5 images have no label (.cls), so the others' are not used either" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels cls: 3 of 5 images of .* have none"):
        index_shards(tmp_path, options=IndexOptions(labels="cls"))


def test_labels_of_all_shards_come_from_one_field(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in (0, 1)} | {f"{i}.cls": str(i).encode() for i in (0, 1)})
    captions = {f"{i}.txt": b"dog" for i in (2, 3, 4)}
    write_tar(tmp_path / "b.tar", {f"{i}.png": png(i) for i in (2, 3, 4)} | captions)
    assert index_shards(tmp_path, workers=1).classes is None
    printed = capsys.readouterr().out
    assert "3 of 5 images have no label (.cls), so the others' are not used either" in printed
    assert 'to use the .txt members: labels="txt"' in printed
    with pytest.raises(ValueError, match="--labels txt: 2 of 5 images of .* have none"):
        index_shards(tmp_path, workers=1, options=IndexOptions(labels="txt"))
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1), "0.txt": b"cat", "1.txt": b"cat", "0.cls": b"7"})
    index = index_shards(tmp_path, workers=1, options=IndexOptions(labels="txt"))
    assert (index.classes, index.labels_of(slice(None)).tolist()) == (["cat", "dog"], [0, 0, 1, 1, 1])


def test_captions_that_some_shards_lack_are_not_classes(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in (0, 1)} | {f"{i}.txt": b"dog" for i in (0, 1)})
    write_tar(tmp_path / "b.tar", {f"{i}.png": png(i) for i in (2, 3)} | {"2.txt": b"dog"})
    assert index_shards(tmp_path, workers=1).classes is None
    assert 'the .txt members are not used as labels; to use them: labels="txt"' in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels txt: 1 of 4 images of .* have none"):
        index_shards(tmp_path, workers=1, options=IndexOptions(labels="txt"))


def test_labels_of_minus_one_in_shards_of_others_are_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"-1", "b.png": png(2), "b.cls": b"-1"})
    assert index_shards(tmp_path).classes is None
    assert "2 of 2 labels are -1, which marks images without a class; they are not used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels cls: 2 of 2 labels are -1.*Leave it out to index them without"):
        index_shards(tmp_path, options=IndexOptions(labels="cls"))


def test_numbers_that_are_no_classes_are_not_taken_for_some(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"30000000"})
    assert index_shards(tmp_path).classes is None
    assert "labels up to 30000000 for 1 images are no class numbers" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["header", "cut at a member", "cut in a header", "cut in an image", "negative size"])
def test_a_truncated_tar_gives_what_is_readable_and_says_so(tmp_path: Path, harm: str) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(10)})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    each = 1024  # header and one block
    if harm == "header":
        content[5 * each + 150] ^= 0xFF
    elif harm == "negative size":
        about = tarfile.TarInfo("5.txt")
        about.size = -512
        content[5 * each : 5 * each + 512] = about.tobuf(tarfile.GNU_FORMAT)
    else:
        del content[5 * each + {"cut at a member": 0, "cut in a header": 100, "cut in an image": 530}[harm] :]
    (tmp_path / "a.tar").write_bytes(content)
    write_tar(tmp_path / "b.tar", {"x.png": png(200)})
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [0, 1, 2, 3, 4, 200]
    assert "truncated tar: 5 images read, what follows is lost" in index.skipped["a.tar"]


def test_programs_are_not_started_for_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "b.png": png(7)})
    index = index_shards(tmp_path)
    assert numbers_of(index) == [7]
    assert index.skipped == {"a.tar/a.png": "not an image (UnidentifiedImageError)"}


def test_unreadable_images_do_not_hide_in_statistics(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(100), "b.png": b"nonsense", "c.png": png(200)})
    index = index_shards(tmp_path)
    assert index.mean == pytest.approx([150 / 255], abs=1e-4)
    assert numbers_of(index) == [100, 200]
    assert index.skipped == {"a.tar/b.png": "not an image (UnidentifiedImageError)"}
    with open(tmp_path / "a.tar", "r+b") as file:  # damage that came later
        file.seek(index.locate(1)[1])
        file.write(bytes(16))
    assert ShardReader(index, 1).unreadable.keys() == {1}


@pytest.mark.parametrize("field_name", ["cls", "txt"])
def test_class_names_in_shards_become_classes_as_those_of_folders_do(tmp_path: Path, field_name: str) -> None:
    for number, names in enumerate((("cat", "dog"), ("ant", "cat"))):
        members = {f"{i}.png": png(10 * number + i) for i in range(2)}
        members |= {f"{i}.{field_name}": f"{name}\n".encode() for i, name in enumerate(names)}
        write_tar(tmp_path / f"{number}.tar", members | {f"x{number}.png": png(90), f"x{number}.{field_name}": b"cat"})
    index = index_shards(tmp_path, workers=1)
    assert index.classes == ["ant", "cat", "dog"]
    named = [index.classes[label] for label in index.labels_of(slice(None))]
    assert dict(zip(numbers_of(index), named, strict=True)) == {0: "cat", 1: "dog", 10: "ant", 11: "cat", 90: "cat"}
    assert load_index(tmp_path).classes == index.classes


def test_captions_are_not_classes_unless_asked_for_and_it_is_said(tmp_path: Path, capsys) -> None:
    members = {f"{i}.png": png(i) for i in range(4)} | {f"{i}.txt": f"a photo number {i}".encode() for i in range(4)}
    write_tar(tmp_path / "a.tar", members)
    assert index_shards(tmp_path, workers=1).classes is None
    assert "4 different texts (.txt) for 4 images are no classes; they are not used" in capsys.readouterr().out
    write_tar(tmp_path / "a.tar", members | {"0.txt": b"long " * 100, "1.json": b"{}"})
    assert index_shards(tmp_path, workers=1).classes is None
    assert 'the .txt members are not used as labels; to use them: labels="txt"' in capsys.readouterr().out
    write_tar(tmp_path / "a.tar", members)
    assert len(index_shards(tmp_path, workers=1, options=IndexOptions(labels="txt")).classes) == 4


def test_numbers_and_names_together_are_names_and_it_is_said(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"dog"})
    assert index_shards(tmp_path).classes == ["0", "dog"]
    assert "some labels are numbers, others names (dog); all are taken as names" in capsys.readouterr().out


def test_keys_with_dots_are_samples_and_other_fields_are_not(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {
        "photo.0001.jpg": png(1), "photo.0002.jpg": png(2), "photo.0001.cls": b"cat", "photo.0002.cls": b"dog",
        "photo.jpg": png(3), "photo.cls": b"cat", "x.seg.png": png(90), "x.png": png(4), "x.cls": b"dog",
        "y.edited.png": png(5), "y.cls": b"cat",
    })  # fmt: skip
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [1, 2, 3, 4, 5]
    assert index.labels_of(slice(None)).tolist() == [0, 1, 0, 1, 0]
    assert index.skipped == {
        "a.tar/*.seg.png": "1 images in another field of their keys (--image 'seg.png' takes these instead)"
    }
    assert [index.key(i) for i in range(2)] == ["a.tar/photo.0001.jpg", "a.tar/photo.0002.jpg"]


def test_a_mask_whose_image_is_missing_is_not_taken_for_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"7.png": png(7), "7.seg.png": png(1), "8.seg.png": png(2), "9.x.png": png(9)})
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [7, 9]
    assert index.skipped == {
        "a.tar/*.seg.png": "2 images in another field of their keys (--image 'seg.png' takes these instead)"
    }


def test_of_two_images_to_a_key_the_user_chooses(tmp_path: Path, capsys) -> None:
    pairs = {f"{i}.{side}.png": png(10 * i + (side == "right")) for i in range(3) for side in ("left", "right")}
    write_tar(tmp_path / "a.tar", pairs)
    with pytest.raises(ValueError, match=r"hold no images \(a.tar/0.\*: 2 images of one key \(left.png, right.png\): "
                                         r"choose one, as with --image left.png"):  # fmt: skip
        index_shards(tmp_path, workers=1)
    index = index_shards(tmp_path, workers=1, options=IndexOptions(image="right.png"))
    assert numbers_of(index) == [1, 11, 21]
    assert index.skipped.keys() == {"a.tar/*.left.png"}
    assert main(["shards", "index", str(tmp_path), "--image", "left.png"]) == 0
    assert numbers_of(load_index(tmp_path)) == [0, 10, 20]


def test_archives_put_one_behind_the_other_are_read_to_the_last(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.part", {f"{number}-{i}.png": png(10 * number + i) for i in range(2)})
    whole = b"".join((tmp_path / f"{number}.part").read_bytes() for number in range(3))
    (tmp_path / "a.tar").write_bytes(whole)
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [0, 1, 10, 11, 20, 21]
    assert not index.skipped


def test_links_in_a_tar_are_the_images_they_point_to(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        about = tarfile.TarInfo("d/a.png")
        about.size = len(png(7))
        tar.addfile(about, io.BytesIO(png(7)))
        for name, kind, target in [
            ("d/hard.png", tarfile.LNKTYPE, "d/a.png"), ("e/soft.png", tarfile.SYMTYPE, "../d/a.png"),
            ("lost.png", tarfile.SYMTYPE, "/etc/passwd"), ("pipe.png", tarfile.FIFOTYPE, ""),
        ]:  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [7, 7, 7]
    assert index.skipped == {
        "a.tar/lost.png": "a link to /etc/passwd, which is not before it in the tar",
        "a.tar/pipe.png": "not a regular file",
    }


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "a gzip file"), ("w:bz2", "a bzip2 file"), ("w:xz", "an xz file")])
def test_a_compressed_tar_is_called_one(tmp_path: Path, mode: str, kind: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        about = tarfile.TarInfo("a.png")
        about.size = len(png(7))
        tar.addfile(about, io.BytesIO(png(7)))
    with pytest.raises(ValueError, match=f"hold no images .a.tar: {kind}, not a plain tar. Unpack it once"):
        index_shards(tmp_path, workers=1)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(
        ValueError, match="no .tar files there, but 1 compressed ones .a.tar.gz, ....*--data.stream_samples"
    ):
        index_shards(tmp_path, workers=1)


def test_names_of_classes_stay_with_the_shards_that_they_are_of(tmp_path: Path) -> None:
    pack(array_samples(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]), tmp_path, ["cat", "dog"], workers=1)
    assert index_shards(tmp_path, workers=1).classes == ["cat", "dog"]
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    write_tar(tmp_path / "shard-000000.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"1"})
    assert index_shards(tmp_path, workers=1).classes == ["0", "1"]  # of another data set, whose names are not known


def test_a_compressed_tar_beside_others_is_skipped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1)})
    assert index_shards(tmp_path, workers=1).skipped == {}
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert load_index(tmp_path).unlisted() == ["b.tar.gz"]
    assert "To read them too: unpack them (gunzip), then sslvit shards index" in unlisted_warning(load_index(tmp_path))
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [1]
    assert index.skipped == {"b.tar.gz": "compressed tar file, which cannot be read by offset"}
    assert "skipped 1 compressed tar file (first: b.tar.gz), which cannot be read by offset." in capsys.readouterr().out
    assert load_index(tmp_path).unlisted() == []


def test_leftovers_of_macos_and_names_that_forge_a_line_do_no_harm(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", {
        "a.png": png(1), "._a.png": b"junk", "__MACOSX/a.png": b"junk", "b\nsslvit: done.png": b"nonsense",
        "\x1b[2Jc.png": b"nonsense",
    })  # fmt: skip
    index = index_shards(tmp_path, workers=1)
    assert numbers_of(index) == [1]
    assert len(index.skipped) == 4
    text = capsys.readouterr().out + describe_shards(index)
    assert "\x1b" not in text
    assert "\nsslvit: done" not in text


def test_shards_of_others_keep_their_pixels_as_stored_if_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_tar(tmp_path / "a.tar", {"a.png": encoded(Image.new("L", (8, 4), 9), "PNG", exif=exif)})
    assert index_shards(tmp_path).image_size == [8, 4]
    stored = index_shards(tmp_path, options=IndexOptions(orientation="stored"))
    assert (stored.image_size, load_index(tmp_path).orientation) == ([4, 8], "stored")
    assert index_shards(tmp_path).orientation == "stored"  # what was chosen once stays
    assert check_shards(stored).is_whole
