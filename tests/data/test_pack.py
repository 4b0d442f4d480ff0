"""Images become shards that this library, tar and WebDataset all read, the same bytes every time."""

from __future__ import annotations

import errno
import gc
import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import contents, encoded, image_folder, numbered_shards, numbers_of, photograph

from sslvit.data.any_source import SourceOptions, read_source
from sslvit.data.arrays import array_samples
from sslvit.data.decode import IMAGE_SUFFIXES, decode, decode_pixels, read_header
from sslvit.data.folders import folder_source
from sslvit.data.index import load_index
from sslvit.data.inspect import describe_shards
from sslvit.data.open import open_shards
from sslvit.data.pack import PackJob, finish_packing, pack, pack_source
from sslvit.data.reader import ShardReader
from sslvit.data.remote import ShardCache
from sslvit.data.scan import index_shards
from sslvit.data.sources import FileImages, Sample, SampleTable, dataset_source, hold_out
from sslvit.data.store import PackSettings, TarWriter, store, tar_header
from sslvit.files import lock_folder

SMALL = PackSettings(shard_mb=0.005)


def checksums(folder: Path) -> list[str]:
    return [shard.sha256 for shard in load_index(folder).shards]


def test_a_packed_folder_comes_back_whole_and_labeled(tmp_path: Path) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in"), tmp_path / "out", SMALL)
    assert len(index.shards) > 2
    assert contents(index) == {(label, i): label for label in range(2) for i in range(10)}
    again = load_index(tmp_path / "out")
    assert again.classes == ["cat", "dog"]
    assert again.image_size == [6, 8]
    assert (again.channels, again.bits) == (3, 8)
    assert again.mean == pytest.approx([0.5 / 255, 4.5 / 255, 0], abs=1e-4)
    assert again.std == pytest.approx([0.5 / 255, np.arange(10).std() / 255, 0], abs=1e-4)
    assert "cat/im_003.png" in {again.key(i).split("/", 1)[1] for i in range(20)}
    assert not (tmp_path / "out" / "packing").exists()


def test_any_number_of_workers_and_parts_gives_the_same_bytes(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", count=25)
    for workers in (1, 3):
        pack_source(source, tmp_path / f"w{workers}", SMALL, workers=workers)
    for part in ("2/3", "1/3", "3/3"):
        assert pack_source(source, tmp_path / "parts", SMALL, part=part) == []
    with pytest.raises(FileNotFoundError, match="Packing was not finished there"):
        load_index(tmp_path / "parts")
    finish_packing(tmp_path / "parts")
    assert checksums(tmp_path / "w1") == checksums(tmp_path / "w3") == checksums(tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "w1").iterdir())
    index_files = [(tmp_path / name / "index.json").read_bytes() for name in ("w1", "w3", "parts")]
    assert len(set(index_files)) == 1


def test_parts_of_different_arrays_are_not_joined(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.full((30, 8, 8), ord(name), np.uint8))
    pack_source(tmp_path / "a.npy", tmp_path / "out", SMALL, part="1/2")
    with pytest.raises(ValueError, match="unfinished packing of something else .other source"):
        pack_source(tmp_path / "b.npy", tmp_path / "out", SMALL, part="2/2")


def test_every_part_keeps_to_the_boundaries_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in", count=25)
    settings = PackSettings(shard_mb=0.01, encode="webp")
    pack_source(source, tmp_path / "out", settings, part="1/2")
    monkeypatch.setattr(PackJob, "_stored_bytes", lambda job: np.full(len(job.order), 4000.0))  # another estimate
    pack_source(source, tmp_path / "out", settings, part="2/2")
    index = finish_packing(tmp_path / "out")
    keys = [index.key(i) for i in range(len(index))]
    assert len(set(keys)) == len(keys) == 50


def test_missing_parts_are_named(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    pack_source(source, tmp_path / "out", SMALL, part="1/2")
    with pytest.raises(ValueError, match=r"shards are not packed yet \(first: shard-000001.tar\)"):
        finish_packing(tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished packing of something else .other shard_mb"):
        pack_source(source, tmp_path / "out", PackSettings(shard_mb=1), part="2/2")
    for part in ("0/4", "5/4", "3", "a/b"):
        with pytest.raises(ValueError, match=f"--part {part}: expected a part"):
            pack_source(source, tmp_path / "new", part=part)
    with pytest.raises(ValueError, match="no packing to finish"):
        finish_packing(tmp_path / "new")


@pytest.mark.slow
def test_a_killed_packing_goes_on_where_it_was(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = image_folder(tmp_path / "in", count=100)
    pack_source(source, tmp_path / "whole", SMALL, workers=1)

    def slowly() -> None:
        os.setpgrp()
        import sslvit.data.pack as module

        original = module.store
        module.store = lambda *a: time.sleep(0.01) or original(*a)
        pack_source(source, tmp_path / "out", SMALL, workers=2)

    process = multiprocessing.get_context("fork").Process(target=slowly)
    process.start()
    folder = tmp_path / "out" / "packing"
    while len(list(folder.glob("shard-*.json"))) < 4:
        time.sleep(0.01)
        assert process.is_alive()
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    done = len(list(folder.glob("shard-*.json")))
    assert not (tmp_path / "out" / "index.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    pack_source(source, tmp_path / "out", SMALL, workers=1)
    assert f"going on; {len(kept)} of" in capfd.readouterr().out
    assert done < len(checksums(tmp_path / "whole"))
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_a_packing_stopped_while_it_moves_its_shards_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in", count=25)
    pack_source(source, tmp_path / "whole", SMALL, workers=1)
    replace, moved = os.replace, []

    def fail(old, new):
        if str(new).endswith(".tar") and Path(new).parent.name != "packing":
            moved.append(new)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        pack_source(source, tmp_path / "out", SMALL, workers=1)
    monkeypatch.undo()
    pack_source(source, tmp_path / "out", SMALL, workers=1)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    assert numbers_of(load_index(tmp_path / "out")) == numbers_of(load_index(tmp_path / "whole"))


def test_headers_are_tarfiles_own() -> None:
    for name, size in [("a/b.jpg", 12_345), ("é" * 40, 0), ("x" * 100, 8**11 - 1)]:
        about = tarfile.TarInfo(name)
        about.size = size
        assert tar_header(name, size) == about.tobuf(tarfile.USTAR_FORMAT, "utf-8")


def test_shards_mix_classes_and_keep_to_their_size(tmp_path: Path) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in", count=50), tmp_path / "out", PackSettings(shard_mb=0.03))
    changes = (np.diff(index.labels_of(slice(None))) != 0).sum()
    assert 30 < changes < 70
    assert len(index.shards) > 3
    assert all(shard.bytes <= 0.03 * 2**20 + tarfile.RECORDSIZE for shard in index.shards)


def test_a_held_out_share_is_the_last_of_each_class_and_in_no_other_part(tmp_path: Path) -> None:
    train, val = pack_source(image_folder(tmp_path / "in"), tmp_path / "out", holdout=0.2)
    assert set(contents(val)) == {(label, i) for label in range(2) for i in (8, 9)}
    assert set(contents(train)) == {(label, i) for label in range(2) for i in range(8)}


def test_a_class_of_one_image_stays_in_training(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    (source / "emu").mkdir()
    Image.fromarray(np.full((6, 8, 3), 2, np.uint8)).save(source / "emu" / "only.png")
    train, val = pack_source(source, tmp_path / "out", holdout=0.2)
    assert (len(train), len(val)) == (17, 4)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in") / "cat", tmp_path / "out")
    assert index.classes is None
    with pytest.raises(ValueError, match="have no labels"):
        index.labels_of(slice(None))


# ---- other sources -----------------------------------------------------------------------------------------------


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


def test_arrays_and_idx_files_are_packed(tmp_path: Path) -> None:
    images = np.repeat(np.arange(12, dtype=np.uint8), 36).reshape(12, 6, 6)
    labels = np.arange(12) % 3
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "b.npz", x=images, y=labels)
    header = struct.pack(">HBB", 0, 8, 3) + struct.pack(">III", 12, 6, 6)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    label_file = struct.pack(">HBBI", 0, 8, 1, 12) + labels.astype(np.uint8).tobytes()
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + images.tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(label_file)
    for name, has_labels in [
        ("a.npy", False), ("b.npz", True), ("train-images-idx3-ubyte", True), ("t10k-images-idx3-ubyte.gz", False),
    ]:  # fmt: skip
        (index,) = pack_source(tmp_path / name, tmp_path / f"out-{name}")
        numbers = numbers_of(index)
        assert sorted(numbers) == list(range(12))
        assert (index.classes is not None) == has_labels
        if has_labels:
            assert index.labels_of(slice(None)).tolist() == [number % 3 for number in numbers]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros((3, 5, 5), np.float32), "from 0 to 0, and images are uint8 or uint16.*--convert unit"),
        ("a.npy", np.zeros((3, 4), np.uint8), "expected one array of images"),
        ("a.npy", np.array([{}], object), "it holds Python objects, and loading those could run code"),
        ("a.npy", b"nonsense", "not a readable array"),
        ("x-idx3-ubyte", b"nonsense", "not an IDX file"),
        (
            "x-idx3-ubyte",
            struct.pack(">HBBIII", 0, 8, 3, 9, 9, 9),
            "12 bytes, but its header says|16 bytes, but its header says",
        ),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, name: str, content, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        pack_source(tmp_path / name, tmp_path / "out")


def test_a_torchvision_data_set_object_is_packed(tmp_path: Path) -> None:
    from torchvision.datasets import FakeData, ImageFolder

    found = dataset_source(ImageFolder(str(image_folder(tmp_path / "in"))))
    index = pack(found.samples, tmp_path / "out", found.classes)
    assert contents(index) == {(label, i): label for label in range(2) for i in range(10)}
    assert index.classes == ["cat", "dog"]
    with pytest.raises(ValueError, match="not a PIL image"):
        dataset_source([np.zeros(3)])
    fake = dataset_source(FakeData(4, (3, 8, 8), 2))
    assert len(pack(fake.samples, tmp_path / "fake", fake.classes)) == 4


@pytest.mark.parametrize("kind", ["n 1", "bool", "float", "text", "bytes"])
def test_labels_of_an_npz_are_read_in_every_form_that_people_store(tmp_path: Path, kind: str, capsys) -> None:
    images = np.repeat(np.arange(12, dtype=np.uint8), 3 * 36).reshape(12, 6, 6, 3)
    numbers = np.arange(12) % 2
    labels = {
        "n 1": numbers[:, None], "bool": numbers.astype(bool), "float": numbers.astype(np.float32),
        "text": np.array(["cat", "dog"])[numbers], "bytes": np.array([b"cat", b"dog"])[numbers],
    }[kind]  # fmt: skip
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, other=np.zeros(5))
    (index,) = pack_source(tmp_path / "a.npz", tmp_path / "out", workers=1)
    names = {"bool": ["false", "true"], "text": ["cat", "dog"], "bytes": ["cat", "dog"]}.get(kind, ["0", "1"])
    assert index.classes == names
    assert index.labels_of(slice(None)).tolist() == [number % 2 for number in numbers_of(index)]
    said = capsys.readouterr().out
    assert "labels: y_train" in said
    assert "arrays that are not used: other" in said


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.eye(3)[[0, 1, 2, 0]], "y is not used for labels: 3 values for each image"),
        (np.array([0.5, 1, 2, 3]), "y is not used for labels: float64 numbers that are not whole"),
        (np.array([1, 2, 3, 4_750_000]), "y is not used for labels: labels up to 4750000 for 4 images"),
        (np.array([-3, -1, 1, 2]), "y is not used for labels: a label of -3; classes count from 0"),
        (
            np.array([-1, 0, 1, -1]),
            "y is not used for labels: 2 of 4 labels are -1, which marks images without a class",
        ),
    ],
)
def test_what_could_be_labels_and_is_not_used_is_said(tmp_path: Path, labels: np.ndarray, said: str, capsys) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 6, 6), np.uint8), y=labels)
    (index,) = pack_source(tmp_path / "a.npz", tmp_path / "out", workers=1)
    assert index.classes is None
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="--labels y: "):
        pack_source(tmp_path / "a.npz", tmp_path / "again", options=SourceOptions(labels="y"))


def test_arrays_and_labels_of_an_npz_are_chosen_by_name(tmp_path: Path) -> None:
    arrays = {"a": np.full((4, 6, 6), 1, np.uint8), "b": np.full((4, 6, 6), 2, np.uint8)}
    np.savez(tmp_path / "a.npz", **arrays, p=np.arange(4), q=np.arange(4)[::-1])
    with pytest.raises(ValueError, match=r"expected one array of images, found a \(4, 6, 6\).*Choose: --images a"):
        read_source(tmp_path / "a.npz")
    found = read_source(tmp_path / "a.npz", SourceOptions(images="b"))
    assert (found.classes, found.notes) == (None, ["arrays that are not used: a, p, q (for labels: --labels a)"])
    found = read_source(tmp_path / "a.npz", SourceOptions(images="b", labels="q"))
    assert [sample.label for sample in found.samples] == [3, 2, 1, 0]
    np.save(tmp_path / "labels.npy", np.array([0, 0, 1, 1]))
    beside = SourceOptions(images="a", labels=str(tmp_path / "labels.npy"))
    assert [sample.label for sample in read_source(tmp_path / "a.npz", beside).samples] == [0, 0, 1, 1]
    for options, message in [
        ({"images": "z"}, "--images z: not in .*a.npz .it holds a, b"),
        ({"images": "a", "labels": "z"}, "--labels z: neither an array of"),
        ({"label_column": "y"}, "--label-column y: .*a.npz is an array. Omit the option"),
        ({"layout": "hwc"}, "--layout hwc: expected one of nhw, nhwc, nchw"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_source(tmp_path / "a.npz", SourceOptions(**options))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 3, 40, 40), "nchw"), ((5, 1, 28, 28), "nchw"), ((5, 40, 30, 3), "nhwc"), ((5, 28, 28, 1), "nhwc"),
        ((5, 13, 40, 50), "nchw"), ((5, 40, 50, 13), "nhwc"), ((5, 4, 30, 4), None), ((5, 3, 3, 3), None),
        ((5, 40, 40, 40), None),
    ],
)  # fmt: skip
def test_the_layout_of_an_array_is_seen_or_asked_for(tmp_path: Path, shape: tuple, layout: str | None) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    if layout is None:
        with pytest.raises(ValueError, match="could be 'n h w c' or 'n c h w'. Choose one: --layout nhwc"):
            read_source(tmp_path / "a.npy")
    for name in [layout] if layout else ["nhwc", "nchw"]:
        found = read_source(tmp_path / "a.npy", SourceOptions(layout=None if layout else name))
        image = array[2] if name == "nhwc" else array[2].transpose(1, 2, 0)
        header = read_header(found.samples[2].read())
        assert (header.height, header.width, header.channels) == image.shape
        assert np.array_equal(decode_pixels(found.samples[2].read(), image.shape[2]), image)
        assert ("'n c h w'" in " ".join(found.notes)) == (layout == "nchw")


def test_one_image_is_not_taken_for_many_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((40, 30, 3), np.uint8))
    with pytest.raises(ValueError, match="that of one image 'h w c'"):
        read_source(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "convert", "pixels"),
    [
        (np.array([0.0, 0.5, 1.0]), "unit", [0, 128, 255]),
        (np.array([-1.0, 0.0, 1.0]), "signed", [0, 128, 255]),
        (np.array([0, 100, 255], np.int64), "byte", [0, 100, 255]),
        (np.array([False, True, True]), "unit", [0, 255, 255]),
        (np.array([0, 1000, 65535], np.int32), "deep", [0, 1000, 65535]),
    ],
)
def test_values_that_are_no_pixels_are_converted_by_name(
    tmp_path: Path, array: np.ndarray, convert: str, pixels: list[int]
) -> None:
    np.save(tmp_path / "a.npy", np.broadcast_to(array[None, :, None], (5, 3, 8)))
    with pytest.raises(ValueError, match=rf"images are uint8 or uint16. Choose a conversion: .*--convert {convert}"):
        read_source(tmp_path / "a.npy")
    found = read_source(tmp_path / "a.npy", SourceOptions(convert=convert))
    bits = 16 if convert == "deep" else 8
    image = decode_pixels(found.samples[4].read(), 1, bits)[:, 0, 0]
    assert (image * (257 if bits == 16 else 1)).round().astype(int).tolist() == pixels


def test_a_value_outside_the_named_range_is_left_out_and_named(tmp_path: Path) -> None:
    array = np.zeros((3, 8, 8), np.float32)
    array[1] = 1.5
    np.save(tmp_path / "a.npy", array)
    (index,) = pack_source(tmp_path / "a.npy", tmp_path / "out", options=SourceOptions(convert="unit"), workers=1)
    assert index.skipped == {"000001.png": "values outside 0 to 1, which --convert unit takes"}


def test_arrays_that_promise_more_than_they_hold_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    header = struct.pack(">HBBIII", 0, 8, 3, 60_000, 1000, 1000)
    with gzip.open(tmp_path / "x-images-idx3-ubyte.gz", "wb") as file:
        file.write(header)
    with pytest.raises(ValueError, match=r"bytes, but its header says \(60000, 1000, 1000\)"):
        read_source(tmp_path / "x-images-idx3-ubyte.gz")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 999, 999)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="x.npy is shorter than it says"):
        read_source(tmp_path / "a.npz")
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="it is shorter than it says"):
        read_source(tmp_path / "a.npy")


def test_gzipped_idx_images_find_plain_labels(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, 4, 6, 6) + bytes(4 * 36))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 4) + bytes([0, 1, 1, 0]))
    found = read_source(tmp_path / "train-images-idx3-ubyte.gz")
    assert [sample.label for sample in found.samples] == [0, 1, 1, 0]


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
    assert "columns that are not used: kind (for labels: --label-column kind)" in said
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


# ---- folders as people have them ---------------------------------------------------------------------------------


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
    assert any(reason == "a link to a folder above it" for reason in found.skipped.values())
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


# ---- stored otherwise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["upright", "stored"])
def test_a_photograph_of_a_phone_is_packed_and_resized_the_right_way_up(tmp_path: Path, orientation: str) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(60, 200).save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    upright = np.asarray(photograph(60, 200).transpose(Image.Transpose.ROTATE_270), float)
    expected = upright if orientation == "upright" else np.asarray(photograph(60, 200), float)
    for resize, size in ((None, (60, 200)), (30, (30, 100))):
        settings = PackSettings(resize=resize, orientation=orientation, quality=95)
        (index,) = pack_source(tmp_path / "in", tmp_path / f"{resize}", settings, workers=1)
        assert load_index(tmp_path / f"{resize}").orientation == orientation
        reader = ShardReader(index)
        content = reader.read(0)
        found = decode_pixels(content, header=reader.header(content)).astype(float)
        assert found.shape[:2] == (size[::-1] if orientation == "upright" else size)
        step = 60 // size[0]
        averaged = expected.reshape(found.shape[0], step, found.shape[1], step, 3).mean((1, 3))
        assert np.abs(found - averaged).mean() < 10
        assert index.image_size == list(found.shape[:2])


def test_what_a_resized_image_keeps_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture = photograph(80, 80)
    picture.save(tmp_path / "in/mpo.jpg", format="MPO", save_all=True, append_images=[picture.resize((8, 8))])
    picture.convert("1").save(tmp_path / "in/bits.png")
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", PackSettings(resize=40), workers=1)
    kinds = {index.key(i).split("/")[1]: read_header(ShardReader(index).read(i)).channels for i in range(2)}
    assert kinds == {"mpo.jpg": 3, "bits.png": 1}


@pytest.mark.parametrize("decode", [False, True])
def test_a_cut_image_is_left_out_and_damage_inside_is_found_by_decoding(tmp_path: Path, decode: bool, capsys) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg", "c.png"):
        photograph(64, 48).save(tmp_path / "in" / name)
    whole = (tmp_path / "in/a.jpg").read_bytes()
    (tmp_path / "in/a.jpg").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray((tmp_path / "in/c.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "in/c.png").write_bytes(damaged)
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", PackSettings(decode=decode), workers=1)
    assert sorted(index.skipped) == (["a.jpg", "c.png"] if decode else ["a.jpg"])
    assert "damaged image" in index.skipped["a.jpg"]
    assert f"skipped {2 if decode else 1} of 3 images (first: " in capsys.readouterr().out


def test_a_packing_without_labels_and_a_constant_channel_cannot_be_overlooked(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3)).astype(np.uint8)
    images[..., 1] = 7
    index = pack(array_samples(images), tmp_path, workers=1)
    assert "NO LABELS" in describe_shards(index)
    assert "warning: channel 1 is the same everywhere" in describe_shards(index)
    labeled = pack(array_samples(images, [0, 1] * 4), tmp_path / "labeled", ["a", "b"], workers=1)
    assert "NO LABELS" not in describe_shards(labeled)
    assert "images per class: 4\n" in describe_shards(labeled)


def test_resized_and_encoded_images_are_so_and_the_index_says_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photograph(300, 200).save(tmp_path / "in" / "large.jpg", quality=95)
    photograph(90, 60).save(tmp_path / "in" / "small.jpg", quality=95)
    kept = (tmp_path / "in" / "small.jpg").read_bytes()
    settings = PackSettings(resize=100, quality=80)
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", settings)
    reader = ShardReader(index)
    found = {index.key(i).split("/")[1]: reader.read(i) for i in range(2)}
    assert found["small.jpg"] == kept
    assert decode(found["large.jpg"]).shape == (3, 150, 100)
    assert load_index(tmp_path / "out").encoding == settings.describe()
    assert "shorter side at most 100" in settings.describe()
    assert "quality 80" in settings.describe()
    (webp,) = pack_source(tmp_path / "in", tmp_path / "webp", PackSettings(encode="webp"))
    assert all(webp.key(i).endswith(".webp") for i in range(2))
    assert decode(ShardReader(webp).read(0)).shape[0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shard_mb": 0}, "--shard-mb 0"), ({"resize": 0}, "--resize 0"), ({"encode": "gif"}, "--encode gif"),
     ({"quality": 101}, "--quality 101")],
)  # fmt: skip
def test_impossible_ways_of_storing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackSettings(**options)


# ---- what is wrong -----------------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = image_folder(tmp_path / "in")
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "text.png").write_text("not an image")
    (source / "dog" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (index,) = pack_source(source, tmp_path / "out", workers=1)
    assert len(index) == 20
    assert index.skipped["cat/empty.jpg"] == "zero bytes"
    assert index.skipped["dog/text.png"] == "not an image (UnidentifiedImageError)"
    assert "No such file" in index.skipped["dog/nowhere.png"]
    assert "skipped 3 of 23" in capsys.readouterr().out


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


def test_keys_that_look_like_fallbacks_stay_unique(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("000000001.png", "000000001.jpg", "x.png", "x.jpg"):
        Image.new("RGB", (8, 8), 9).save(tmp_path / "in" / name)
    (index,) = pack_source(tmp_path / "in", tmp_path / "out")
    assert len({Path(index.key(i)).stem for i in range(4)}) == 4


def test_a_pipe_among_the_images_does_not_hang(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", count=2)
    os.mkfifo(source / "cat" / "pipe.jpg")
    assert len(pack_source(source, tmp_path / "out")[0]) == 4


def test_sixteen_bits_and_palettes_are_encoded_as_what_they_show(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "in" / "deep.png")
    (jpg,) = pack_source(tmp_path / "in", tmp_path / "jpg", PackSettings(encode="jpg", quality=95))
    shown = decode(ShardReader(jpg, 1).read(0), 1)[0].float().numpy()
    assert np.abs(shown - ramp / 257).mean() < 2
    (small,) = pack_source(tmp_path / "in", tmp_path / "small", PackSettings(resize=32))
    assert small.bits == 16
    half = decode(ShardReader(small, 1).read(0), 1, bits=16)[0].numpy()
    assert np.abs(half - ramp.reshape(32, 2, 32, 2).mean((1, 3)) / 257).mean() < 1
    (tmp_path / "palette").mkdir()
    picture = photograph(80, 80).quantize(64)
    picture.save(tmp_path / "palette" / "p.png")
    (index,) = pack_source(tmp_path / "palette", tmp_path / "p", PackSettings(resize=40))
    expected = np.asarray(picture.convert("RGB").resize((40, 40), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(decode(ShardReader(index).read(0)).permute(1, 2, 0).numpy() - expected).mean() < 0.5


def test_keys_never_lead_out_of_their_folder(tmp_path: Path) -> None:
    samples = array_samples(np.zeros((3, 4, 4), np.uint8))
    for sample, key in zip(samples, ("../up", "/etc/x", "a..b/c"), strict=True):
        sample.key = key
    index = pack(samples, tmp_path, workers=1)
    with tarfile.open(tmp_path / index.shards[0].name) as tar:
        names = tar.getnames()
    assert all(not name.startswith("/") and ".." not in name for name in names)


def test_overwriting_keeps_the_old_shards_until_the_new_are_whole(tmp_path: Path) -> None:
    (old,) = pack_source(image_folder(tmp_path / "in"), tmp_path / "out", SMALL)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("not an image")
    with pytest.raises(ValueError, match="none of 1 images is readable"):
        pack_source(tmp_path / "bad", tmp_path / "out", overwrite=True)
    assert load_index(tmp_path / "out").fingerprint() == old.fingerprint()
    assert not load_index(tmp_path / "out").missing_shards()
    (tmp_path / "out" / "note.txt").write_text("mine")
    shutil.rmtree(tmp_path / "in" / "dog")
    (new,) = pack_source(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert len(new) == 10
    assert not load_index(tmp_path / "out").missing_shards()
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(new.shards) < len(old.shards)
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"


def test_shards_are_not_overwritten_silently(tmp_path: Path) -> None:
    numbered_shards(tmp_path, 3)
    with pytest.raises(ValueError, match="already holds shards"):
        numbered_shards(tmp_path, 2)


def test_an_unreadable_class_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scandir = image_folder(tmp_path / "in"), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="dog: not readable .Permission denied.. Check its permissions"):
        folder_source(source)


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
    import sslvit.data.open as module

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
    monkeypatch.setattr("sslvit.data.first_rank.MAX_WAIT_SECONDS", 0.2)
    monkeypatch.setattr("sslvit.data.first_rank.os.getppid", lambda: 1)
    assert len(open_shards(source, cache)) == 21
    assert "waiting for the first process on this machine" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "list", "array"])
def test_a_packing_whose_files_were_changed_meanwhile_does_not_go_on(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    for i in range(30):
        Image.new("L", (6, 6), i).save(tmp_path / "in" / f"{i:02d}.bmp")
    source = changed = tmp_path / "in"
    if kind == "list":
        source = tmp_path / "a.csv"
        source.write_text("path\n" + "".join(f"in/{i:02d}.bmp\n" for i in range(30)))
    if kind == "array":
        source = changed = tmp_path / "a.npy"
        np.save(source, np.repeat(np.arange(2000, dtype=np.uint16), 25).reshape(2000, 5, 5))
    settings = PackSettings(shard_mb=1) if kind == "array" else SMALL
    pack_source(source, tmp_path / "out", settings, part="1/2")
    pack_source(source, tmp_path / "out", settings, part="1/2")  # of the same files: goes on
    if kind == "array":
        images = np.load(source)
        images[2] += 7  # one that is not among those that the digest looks at
        np.save(source, images)
    else:
        changed = tmp_path / "in" / "03.bmp"
        Image.new("L", (6, 6), 200).save(changed)
    about = os.stat(changed)
    os.utime(changed, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="unfinished packing of files that have other times now"):
        pack_source(source, tmp_path / "out", settings, part="2/2")


def test_channel_statistics_are_those_of_all_pixels_every_image_counting_the_same(tmp_path: Path) -> None:
    rng, images = np.random.default_rng(0), []
    (tmp_path / "in").mkdir()
    for number, side in enumerate((4, 30, 11)):
        images.append(rng.integers(0, 80 * (number + 1), (side, side + 3, 3)).astype(np.uint8))
        Image.fromarray(images[-1]).save(tmp_path / "in" / f"{number}.png")
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", workers=1)
    means = np.mean([image.mean((0, 1)) / 255 for image in images], 0)
    squares = np.mean([((image / 255) ** 2).mean((0, 1)) for image in images], 0)
    assert index.mean == pytest.approx(means, abs=6e-5)
    assert index.std == pytest.approx(np.sqrt(squares - means**2), abs=6e-5)
    assert index_shards(tmp_path / "out").mean == index.mean


def test_statistics_of_a_large_shard_are_spread_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslvit.data.scan.STATISTICS_SAMPLES", 10)
    images = np.repeat(np.arange(200, dtype=np.uint8), 16).reshape(200, 4, 4)
    index = pack(array_samples(images), tmp_path, workers=1)
    seen = np.array(numbers_of(index))[np.linspace(0, 199, 50).astype(int)]
    assert index.mean[0] == pytest.approx(seen.mean() / 255, abs=6e-5)


def test_a_set_is_of_16_bits_only_if_all_of_its_images_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, kind in enumerate((np.uint16, np.uint8, np.uint16)):
        Image.fromarray(np.full((6, 6), 50 * number, kind)).save(tmp_path / "in" / f"{number}.png")
    assert pack_source(tmp_path / "in", tmp_path / "mixed", workers=1)[0].bits == 8
    (tmp_path / "in" / "1.png").unlink()
    assert pack_source(tmp_path / "in", tmp_path / "deep", workers=1)[0].bits == 16


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer itself waits for the disk when it closes its file."""
    synced, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or original(handle))
    with TarWriter(tmp_path / "a.tar") as tar:
        tar.add("a.txt", b"hello")
    assert synced == [(tmp_path / "a.tar").stat().st_size]


def test_quality_and_the_side_of_resized_images_are_as_asked(tmp_path: Path) -> None:
    content = encoded(photograph(90, 120), "JPEG", quality=98)
    lengths = {}
    for quality in (20, 60, 95):
        stored, suffix = store(content, ".jpg", PackSettings(resize=45, quality=quality))
        image = Image.open(io.BytesIO(stored))
        assert (suffix, image.size) == (".jpg", (60, 45))
        expected = photograph_again(content).resize((60, 45), Image.Resampling.BICUBIC)
        assert stored == encoded(expected, "JPEG", quality=quality)
        lengths[quality] = len(stored)
    assert lengths[20] < lengths[60] < lengths[95]
    assert store(content, ".jpg", PackSettings(resize=90)) == (content, ".jpg")


def photograph_again(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_an_image_of_more_pixels_than_allowed_is_left_out(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", count=2)
    Image.new("RGB", (7, 8)).save(source / "cat" / "large.png")
    (index,) = pack_source(source, tmp_path / "out", PackSettings(max_pixels=48), workers=1)
    assert len(index) == 4
    assert list(index.skipped) == ["cat/large.png"]
    assert "7 x 8 pixels, more than 48" in index.skipped["cat/large.png"]


class Labeled:
    """A data set object of torchvision's kind."""

    def __init__(self, labels: list[int]) -> None:
        self.labels, self.classes = np.array(labels), ["airplane", "bird", "car"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int):
        return Image.new("L", (4, 4), number), int(self.labels[number])


@pytest.mark.parametrize(("labels", "said"), [([-1] * 4, "4 of 4"), ([-1, 0, 2, 1], "1 of 4")])
def test_labels_of_minus_one_are_no_labels_wherever_they_stand(tmp_path: Path, labels: list[int], said: str) -> None:
    """STL-10 marks its images without a class so."""
    words = f"{said} labels are -1, which marks images without a class"
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.new("L", (4, 4), number).save(tmp_path / "in" / f"{number}.png")
    lines = "".join(f"in/{number}.png,{label}\n" for number, label in enumerate(labels))
    (tmp_path / "a.csv").write_text(f"path,label\n{lines}")
    images = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(4, 4, 4)
    np.savez(tmp_path / "a.npz", x=images, y=np.array(labels))
    found = {
        "object": dataset_source(Labeled(labels)),
        "list": read_source(tmp_path / "a.csv"),
        "array": read_source(tmp_path / "a.npz"),
    }
    for name, source in found.items():
        assert source.classes is None, name
        assert words in " ".join(source.notes), name
        index = pack(source.samples, tmp_path / name, source.classes, workers=1)
        assert sorted(numbers_of(index)) == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="these images have no labels"):
            index.labels_of(slice(None))
    with pytest.raises(ValueError, match=f"--labels y: {words}.*Leave it out to pack them without labels"):
        read_source(tmp_path / "a.npz", SourceOptions(labels="y"))
    with pytest.raises(ValueError, match=f"{said[0]} of 4 samples have no label, and there are 3 classes"):
        pack(array_samples(images, labels), tmp_path / "direct", ["a", "b", "c"])
    assert dataset_source(Labeled([2, 0, 1, 1])).classes == ["airplane", "bird", "car"]


def test_integers_of_32_bits_are_refused_where_16_cannot_hold_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, low, high in (("fits", 0, 65_535), ("large", 0, 65_536), ("negative", -1, 5)):
        pixels = np.full((6, 6), low, np.int32)
        pixels[2:] = high
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.tif")
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", workers=1)
    assert [index.key(i) for i in range(len(index))] == ["shard-000000.tar/fits.tif"]
    assert index.skipped["large.tif"].startswith(
        "32-bit integers from 0 to 65536; images have 8 or 16 bits: scale them"
    )
    assert index.skipped["negative.tif"].startswith("32-bit integers from -1 to 5; images have 8 or 16 bits")
    deep = decode_pixels(ShardReader(index, 1).read(0), 1, 16)
    assert (deep.min(), deep.max()) == (0, 255)


def test_holding_out_takes_as_long_for_many_classes_as_for_few() -> None:
    """Ten times the classes of ImageNet-1k: the time grows with the images, not with images times classes."""
    source = FileImages()
    samples = [Sample(f"{i}", ".jpg", source, f"{i}", i % 10_000) for i in range(100_000)]

    def seconds(classes: int) -> float:
        for i, sample in enumerate(samples):
            sample.label = i % classes
        began = time.process_time()
        train, val = hold_out(samples, 0.2)
        assert len(val) == 20_000
        assert len(train) == 80_000
        return time.process_time() - began

    seconds(10)
    assert min(seconds(10_000) for _ in range(2)) < 8 * min(seconds(10) for _ in range(2)) + 0.05


@pytest.mark.parametrize(("share", "counts"), [(0.1, [1, 1, 0]), (0.25, [2, 2, 0]), (0.9, [9, 5, 0])])
def test_each_class_gives_its_last_images_and_keeps_one(share: float, counts: list[int]) -> None:
    labels = [0, 1] * 6 + [2] + [0] * 4
    samples = [Sample(f"{i}", ".jpg", FileImages(), f"{i}", label) for i, label in enumerate(labels)]
    train, val = hold_out(samples, share)
    for label, count in enumerate(counts):
        places = [i for i, known in enumerate(labels) if known == label]
        cut = len(places) - count
        assert [int(sample.key) for sample in train if sample.label == label] == places[:cut]
        assert [int(sample.key) for sample in val if sample.label == label] == places[cut:]


def private_bytes() -> int:
    """Memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private"))


def test_the_processes_of_a_packing_share_what_it_knows_of_its_samples(tmp_path: Path) -> None:
    """A list of a million samples was 400 MB in each process."""
    count, source = 20_000, FileImages()
    samples = [
        Sample(
            f"n{i % 50:08d}/n{i:08d}_{i}", ".jpeg", source, f"/data/in/n{i % 50:08d}/n{i:08d}_{i}.JPEG", i % 50, i, i
        )
        for i in range(count)
    ]
    job = PackJob(SampleTable(samples), tmp_path, PackSettings())
    assert (job.samples.nbytes + job.keys.nbytes) / count < 180
    for i in (0, 7, count - 1):
        assert job.samples[i] == samples[i]
        assert job.keys[i] == samples[i].key
    context = multiprocessing.get_context("fork")
    grown = context.Queue()

    def read_all() -> None:
        gc.disable()
        before = private_bytes()
        for i in job.order:
            assert job.samples[int(i)].label == i % 50
            assert job.keys[int(i)]
        grown.put(private_bytes() - before)

    process = context.Process(target=read_all)
    process.start()
    assert grown.get(timeout=60) / count < 40
    process.join()


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


# ---- several processes -------------------------------------------------------------------------------------------


def test_two_packings_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    with lock_folder(tmp_path / "out" / "packing", "pack", ".part-1-of-1.lock"):
        with pytest.raises(
            ValueError, match="another process is at work there. Wait until it has ended to pack into it"
        ):
            pack_source(source, tmp_path / "out", workers=1)
        assert not list((tmp_path / "out").rglob("*.tar"))
    assert len(pack_source(source, tmp_path / "out", workers=1)[0]) == 20


@pytest.mark.slow
def test_workers_end_when_their_packing_is_killed(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", count=100)

    def slowly() -> None:
        import sslvit.data.pack as module

        original = module.store
        module.store = lambda *a: time.sleep(0.2) or original(*a)
        pack_source(source, tmp_path / "out", SMALL, workers=2)

    process = multiprocessing.get_context("fork").Process(target=slowly)
    process.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := [int(word) for word in children.read_text().split()]) < 2:
        time.sleep(0.02)
    time.sleep(0.5)
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers stayed"
        time.sleep(0.05)


def test_a_full_disk_names_the_shard_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer, data) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sslvit.data.store.TarWriter._write", full)
    with pytest.raises(OSError, match="shard-000000.tar: could not be written .No space left on device.. Make room"):
        pack_source(image_folder(tmp_path / "in"), tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").rglob("*.part"))
