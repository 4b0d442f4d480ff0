"""Images become shards that this library, tar and WebDataset all read, the same bytes every time."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import contents, encoded, image_folder, numbered_shards, numbers_of, photograph

from sslvit.data.decode import decode
from sslvit.data.index import load_index
from sslvit.data.open import open_shards
from sslvit.data.pack import PackJob, finish_packing, pack, pack_source
from sslvit.data.reader import ShardReader
from sslvit.data.sources import array_samples, dataset_samples, folder_samples, read_source
from sslvit.data.store import PackSettings, tar_header

SMALL = PackSettings(shard_mb=0.005)


def checksums(folder: Path) -> list[str]:
    return [shard.sha256 for shard in load_index(folder).shards]


def test_a_packed_folder_comes_back_whole_and_labelled(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"shards are not packed yet \(the first: shard-000001.tar\)"):
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
    samples, classes = read_source(tmp_path / "a.csv")
    assert [sample.label for sample in samples] == [3, 0]
    assert classes == ["0", "1", "2", "3"]
    (tmp_path / "b.csv").write_text("image\nin/cat/im.001.png\n")
    assert read_source(tmp_path / "b.csv")[1] is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\nnone.png,1\n", r"a.csv, line 2: .*none.png does not exist"),
        ("a.csv", "picture,label\nx,1\n", r"no column of paths among \['picture', 'label'\]"),
        ("a.csv", "path,label\nin/cat/im.001.png,\n", "line 2: no label given"),
        ("a.csv", "", "an empty list"),
        ("a.jsonl", '{"path": "in/cat/im.001.png"}\n{"path\n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.csv", "path\nin/cat/im.001.png,extra\n", "line 2: more fields than the 1 columns"),
        ("a.csv", "path,label\nin/cat/im.001.png,-1\n", "a.csv: a label of -1; classes count from 0"),
        ("a.csv", "path,label\nin/cat/im.001.png,99999\n", "labels up to 99999 for 1 images are no class numbers"),
        ("a.txt", "", "neither a folder, nor a list"),
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
        ("a.npy", np.zeros((3, 4, 4), np.float32), "images are uint8 or uint16"),
        ("a.npy", np.zeros((3, 4), np.uint8), "expected one array of images"),
        ("a.npy", np.array([{}], object), "Object arrays cannot be loaded|not a readable array"),
        ("a.npy", b"nonsense", "not a readable array"),
        ("x-idx3-ubyte", b"nonsense", "not an IDX file"),
        ("x-idx3-ubyte", struct.pack(">HBBIII", 0, 8, 3, 9, 9, 9), "0 values, but its header says"),
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

    samples, classes = dataset_samples(ImageFolder(str(image_folder(tmp_path / "in"))))
    index = pack(samples, tmp_path / "out", classes)
    assert contents(index) == {(label, i): label for label in range(2) for i in range(10)}
    assert index.classes == ["cat", "dog"]
    with pytest.raises(ValueError, match="not a PIL image"):
        dataset_samples([np.zeros(3)])
    fake = dataset_samples(FakeData(4, (3, 8, 8), 2))
    assert len(pack(fake[0], tmp_path / "fake", fake[1])) == 4


# ---- stored otherwise --------------------------------------------------------------------------------------------


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
    assert "left out 3 of 23" in capsys.readouterr().out


def test_bad_sources_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "no images there"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_source(source, tmp_path / "out")
    mixed = image_folder(tmp_path / "mixed")
    Image.new("RGB", (4, 4)).save(mixed / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png.*beside folders \(cat"):
        pack_source(mixed, tmp_path / "out")
    with pytest.raises(ValueError, match="share between 0 and 1"):
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
    assert not load_index(tmp_path / "out").absent()
    (tmp_path / "out" / "note.txt").write_text("mine")
    shutil.rmtree(tmp_path / "in" / "dog")
    (new,) = pack_source(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert len(new) == 10
    assert not load_index(tmp_path / "out").absent()
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
        folder_samples(source)


def test_an_image_folder_is_packed_once_and_another_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    one, other = image_folder(tmp_path / "one"), image_folder(tmp_path / "other", count=3)
    assert len(open_shards(one, tmp_path / "beside")) == 20
    assert len(open_shards(one, tmp_path / "beside")) == 20
    changed = one / "cat" / "im.001.png"
    changed.write_bytes(encoded(Image.new("RGB", (6, 8), (9, 9, 9)), "PNG") + b"more")
    with pytest.raises(ValueError, match="shards of other images"):
        open_shards(one, tmp_path / "beside")
    with pytest.raises(ValueError, match="shards of other images"):
        open_shards(other, tmp_path / "beside")
    with pytest.raises(FileNotFoundError, match="no data given"):
        open_shards("", tmp_path / "beside")
