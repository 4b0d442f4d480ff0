"""Images become shards that this library, tar and WebDataset all read, the same bytes every time."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import contents, image_folder, numbered_shards, numbers_of

from sslvit.data import pack_job
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.inspect import describe_shards
from sslvit.data.pack import pack, pack_source
from sslvit.data.pack_job import PackJob
from sslvit.data.scan import index_shards
from sslvit.data.sources import FileImages, Sample, SampleTable, hold_out
from sslvit.data.store import PackSettings
from sslvit.data.unfinished import finish_packing
from sslvit.files import REMEDIES
from sslvit.locks import lock_folder

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
        import sslvit.data.pack_job as module

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


SLOW_FROM_THE_THIRD_SHARD = """
import os, signal, sys, threading, time
from sslvit.cli import main
from sslvit.data.pack_job import PackJob
call = PackJob.__call__
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(self, number, tick):
    if number > 1:
        time.sleep(100)
    return call(self, number, tick)

PackJob.__call__ = slow
if os.environ.get("WAKES_ANOTHER_THREAD"):  # as if the signal arrived just before the main thread begins to wait
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["terminal", "parent", "another thread of the parent"])
def test_a_packing_that_is_interrupted_keeps_what_is_finished(tmp_path: Path, capfd, whom: str) -> None:
    source, folder = image_folder(tmp_path / "in", count=25), tmp_path / "out" / "packing"
    pack_source(source, tmp_path / "whole", SMALL, workers=1)
    words = ["shards", "pack", str(source), str(tmp_path / "out"), "--shard-mb", "0.005", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_FROM_THE_THIRD_SHARD, *words], start_new_session=True, stderr=subprocess.PIPE,
        text=True, env=os.environ | ({"WAKES_ANOTHER_THREAD": "1"} if "thread" in whom else {}),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shard-*.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if whom == "terminal" else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == (
        "sslvit: interrupted; shards that are finished are kept: the same command goes on with the others\n"
    )
    pack_source(source, tmp_path / "out", SMALL, workers=1)
    assert "going on; 2 of" in capfd.readouterr().out
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


@pytest.mark.parametrize("at", ["before val", "in val", "before train is tidied", "before val is tidied"])
def test_a_packing_killed_between_its_two_folders_goes_on(tmp_path: Path, capfd, at: str) -> None:
    source, out = image_folder(tmp_path / "in", count=25), tmp_path / "out"
    pack_source(source, tmp_path / "whole", SMALL, holdout=0.2, workers=1)

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def until_killed() -> None:
        import sslvit.data.pack as packing
        import sslvit.data.unfinished as unfinished

        pack_one, remove, save = packing.pack, unfinished.remove_packing, pack_job.save_report
        if at == "before val":
            packing.pack = lambda samples, folder, *a: (kill if folder.name == "val" else pack_one)(samples, folder, *a)
        elif at == "in val":
            pack_job.save_report = lambda folder, *a: (kill if folder.parent.name == "val" else save)(folder, *a)
        else:
            unfinished.remove_packing = lambda one: (kill if one.parent.name in at else remove)(one)
        pack_source(source, out, SMALL, holdout=0.2, workers=1)

    process = multiprocessing.get_context("fork").Process(target=until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (out / "train").glob("*.tar")}
    pack_source(source, out, SMALL, holdout=0.2, workers=1)
    assert "train: the same images are packed there already; overwrite=True packs them again" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("train", "val"):
        assert checksums(out / name) == checksums(tmp_path / "whole" / name)
        assert not (out / name / "packing").exists()


def test_only_a_packing_of_the_same_images_is_taken_for_done(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    (first,) = pack_source(source, tmp_path / "out", SMALL)
    (again,) = pack_source(source, tmp_path / "out", SMALL)
    assert again.fingerprint() == first.fingerprint()
    with pytest.raises(ValueError, match="already holds shards"):
        pack_source(source, tmp_path / "out", PackSettings(shard_mb=1))
    (tmp_path / "out" / first.shards[0].name).unlink()
    with pytest.raises(ValueError, match="already holds shards"):
        pack_source(source, tmp_path / "out", SMALL)
    pack_source(source, tmp_path / "out", SMALL, overwrite=True)
    Image.new("RGB", (8, 6)).save(source / "cat" / "im_003.png")
    with pytest.raises(ValueError, match="already holds shards"):
        pack_source(source, tmp_path / "out", SMALL)


def test_a_data_set_object_is_not_taken_for_packed_because_some_of_its_images_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 4, 4)).astype(np.uint8)
    pack_source([Image.fromarray(image) for image in pixels], tmp_path, workers=1)
    with pytest.raises(ValueError, match="already holds shards"):
        pack_source([Image.fromarray(image) for image in pixels], tmp_path, workers=1)


def test_packing_leaves_files_alone_whose_names_resemble_its_own(tmp_path: Path) -> None:
    (tmp_path / "out" / "packing").mkdir(parents=True)
    others = [tmp_path / "out" / name for name in ("index.html", "packing/shopping.txt")]
    for other in others:
        other.write_text("mine")
    pack_source(image_folder(tmp_path / "in"), tmp_path / "out", workers=1)
    pack_source(tmp_path / "in", tmp_path / "out", PackSettings(encode="webp"), overwrite=True, workers=1)
    assert [other.read_text() for other in others] == ["mine", "mine"]
    assert sorted(path.name for path in (tmp_path / "out" / "packing").iterdir()) == ["shopping.txt"]


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


def test_a_packing_without_labels_and_a_constant_channel_cannot_be_overlooked(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3)).astype(np.uint8)
    images[..., 1] = 7
    index = pack(array_samples(images), tmp_path, workers=1)
    assert "NO LABELS" in describe_shards(index)
    assert "warning: channel 1 is the same everywhere" in describe_shards(index)
    labeled = pack(array_samples(images, [0, 1] * 4), tmp_path / "labeled", ["a", "b"], workers=1)
    assert "NO LABELS" not in describe_shards(labeled)
    assert "images per class: 4\n" in describe_shards(labeled)


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


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ESTALE])
def test_a_fault_of_the_machine_ends_a_packing_and_no_image_is_lost(tmp_path: Path, monkeypatch, code: int) -> None:
    source = image_folder(tmp_path / "in")
    read = FileImages.read

    def failing(images: FileImages, item: str) -> bytes:
        if item.endswith("im.007.png"):
            raise OSError(code, os.strerror(code))
        return read(images, item)

    monkeypatch.setattr(FileImages, "read", failing)
    with pytest.raises(RuntimeError, match=rf"im.007.png: could not be read .{os.strerror(code)}.*resumes") as error:
        pack_source(source, tmp_path / "out", SMALL, workers=1)
    assert REMEDIES[code] in str(error.value)
    monkeypatch.undo()
    assert len(pack_source(source, tmp_path / "out", SMALL, workers=1)[0]) == 20


def test_keys_that_look_like_fallbacks_stay_unique(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("000000001.png", "000000001.jpg", "x.png", "x.jpg"):
        Image.new("RGB", (8, 8), 9).save(tmp_path / "in" / name)
    (index,) = pack_source(tmp_path / "in", tmp_path / "out")
    assert len({Path(index.key(i)).stem for i in range(4)}) == 4


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


def test_statistics_of_images_with_and_without_alpha_are_those_of_all(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4), "black").save(tmp_path / "in" / f"{number}.png")
        Image.new("RGBA", (4, 4), (255, 255, 255, 128)).save(tmp_path / "in" / f"white-{number}.png")
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", workers=1)
    assert (index.channels, index.mean, index.std) == (3, [0.5] * 3, [0.5] * 3)


def test_statistics_of_a_large_shard_are_spread_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslvit.data.measure.STATISTICS_SAMPLES", 10)
    images = np.repeat(np.arange(200, dtype=np.uint8), 16).reshape(200, 4, 4)
    index = pack(array_samples(images), tmp_path, workers=1)
    seen = np.array(numbers_of(index))[np.linspace(0, 199, 50).astype(int)]
    assert index.mean[0] == pytest.approx(seen.mean() / 255, abs=6e-5)


def test_statistics_of_dim_images_of_16_bits_are_not_rounded_to_zero(tmp_path: Path) -> None:
    images = np.random.default_rng(0).poisson(3, (20, 8, 8, 2)).astype(np.uint16)
    index = pack(array_samples(images), tmp_path, workers=1)
    assert index.mean == pytest.approx(images.mean((0, 1, 2)) / 65535, rel=0.01)
    assert index.std == pytest.approx(images.std((0, 1, 2)) / 65535, rel=0.01)
    assert "the same everywhere" not in describe_shards(index)
    images[..., 1] = 60_001
    assert pack(array_samples(images), tmp_path, overwrite=True, workers=1).std[1] == 0


def test_files_that_are_read_in_part_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "green")]
    for suffix in ("tif", "gif", "png", "webp"):
        frames[0].save(tmp_path / "in" / f"several.{suffix}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / "in" / f"one.{suffix}")
    frames[0].save(tmp_path / "in" / "one.jpg")
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "in" / "deep.png")
    (tmp_path / "in" / "deep.ppm").write_bytes(b"P6 6 6 65535\n" + bytes(6 * 6 * 3 * 2))
    with caplog.at_level("INFO"):
        pack_source(tmp_path / "in", tmp_path / "out", workers=1)
        index_shards(tmp_path / "out", workers=1)
    assert caplog.text.count("4 images: only the first of their pages or frames is read") == 2
    assert caplog.text.count("1 image: only 8 of 16 bits of their colors are read") == 2


def test_a_set_is_of_16_bits_only_if_all_of_its_images_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, kind in enumerate((np.uint16, np.uint8, np.uint16)):
        Image.fromarray(np.full((6, 6), 50 * number, kind)).save(tmp_path / "in" / f"{number}.png")
    assert pack_source(tmp_path / "in", tmp_path / "mixed", workers=1)[0].bits == 8
    (tmp_path / "in" / "1.png").unlink()
    assert pack_source(tmp_path / "in", tmp_path / "deep", workers=1)[0].bits == 16


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
    assert len(pickle.dumps((job.samples, job.keys))) / count < 180
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
        import sslvit.data.pack_job as module

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


def test_a_shard_is_half_done_when_it_is_copied_and_done_when_it_is_measured(tmp_path: Path, monkeypatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8)).astype(np.uint8)
    job = PackJob(SampleTable.of(array_samples(pixels)), tmp_path, PackSettings())
    job.cut()
    done: list[int] = []
    at_half: list[int] = []
    measure = pack_job.measure_shard
    monkeypatch.setattr(pack_job, "measure_shard", lambda *a, **k: (at_half.append(sum(done)), measure(*a, **k))[1])
    job(0, done.append)
    assert at_half == [4]
    assert sum(done) == 9
    done.clear()
    job(0, done.append)  # there already
    assert done == [9]
