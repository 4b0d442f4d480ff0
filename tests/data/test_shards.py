"""Images become shards that this library, tar and WebDataset all read, and bad input is named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.data.decode import BadImage, decode
from sslvit.data.index import load_index
from sslvit.data.pack import array_samples, open_shards, pack, pack_folder
from sslvit.data.reader import ShardReader
from sslvit.data.scan import index_shards


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    """PNG images whose pixels say which they are: (class, number, 0)."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.zeros((6, 8, 3), np.uint8)
            pixels[:] = (label, i, 0)
            Image.fromarray(pixels).save(root / name / f"im.{i:03d}.png")
    return root


def contents(index) -> dict[tuple[int, int], int]:
    """(class, number) in the pixels -> label in the index, read by offset."""
    images, _ = ShardReader(index, memory_limit_mb=0).images(np.arange(len(index)))
    return {
        tuple(int(v) for v in image[:2, 0, 0]): int(label) for image, label in zip(images, index.labels, strict=True)
    }


def test_a_packed_folder_comes_back_whole_and_labelled(tmp_path: Path) -> None:
    (index,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out", shard_mb=0.005)
    assert len(index.shards) > 2
    assert contents(index) == {(label, i): label for label in range(2) for i in range(10)}
    again = load_index(tmp_path / "out")
    assert again.classes == ["cat", "dog"]
    assert again.image_size == [6, 8]
    assert again.channels == 3
    assert again.mean == pytest.approx([0.5 / 255, 4.5 / 255, 0], abs=1e-4)
    assert again.std == pytest.approx([0.5 / 255, np.arange(10).std() / 255, 0], abs=1e-4)
    assert "cat/im_003.png" in {again.key(i).split("/", 1)[1] for i in range(20)}


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    one, two = (pack_folder(source, tmp_path / name)[0] for name in ("a", "b"))
    assert [s.sha256 for s in one.shards] == [s.sha256 for s in two.shards]
    assert one.fingerprint() == two.fingerprint()


def test_shards_mix_classes(tmp_path: Path) -> None:
    (index,) = pack_folder(image_folder(tmp_path / "in", count=50), tmp_path / "out")
    changes = (np.diff(index.labels) != 0).sum()
    assert 30 < changes < 70


def test_a_held_out_share_is_the_last_of_each_class_and_in_no_other_part(tmp_path: Path) -> None:
    train, val = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out", holdout=0.2)
    assert set(contents(val)) == {(label, i) for label in range(2) for i in (8, 9)}
    assert set(contents(train)) == {(label, i) for label in range(2) for i in range(8)}


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (index,) = pack_folder(image_folder(tmp_path / "in") / "cat", tmp_path / "out")
    assert index.classes is None
    with pytest.raises(ValueError, match="have no labels"):
        _ = index.labels


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    (index,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out")
    found = webdataset.WebDataset(str(tmp_path / "out" / index.shards[0].name), shardshuffle=False).to_tuple(
        "png", "cls"
    )
    labels = {decode(png)[:2, 0, 0].numpy().tobytes(): int(cls) for png, cls in found}
    assert len(labels) == 20
    assert all(key[0] == label for key, label in labels.items())


def test_shards_written_by_webdataset_are_indexed(tmp_path: Path) -> None:
    import webdataset

    (tmp_path / "theirs").mkdir()
    with webdataset.TarWriter(str(tmp_path / "theirs" / "a.tar")) as writer:
        for i in range(5):
            pixels = np.full((6, 8, 3), (i % 2, i, 0), np.uint8)
            writer.write({"__key__": f"s/{i:04d}", "png": Image.fromarray(pixels), "cls": i % 2})
    index = index_shards(tmp_path / "theirs")
    assert contents(index) == {(i % 2, i): i % 2 for i in range(5)}
    assert load_index(tmp_path / "theirs").classes == ["0", "1"]


def test_the_index_is_plain_tar_arithmetic(tmp_path: Path) -> None:
    (index,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / index.shards[0].name) as tar:
        members = {m.offset_data: m for m in tar if m.name.endswith(".png")}
    sizes = {offset: member.size for offset, member in members.items()}
    assert {int(record["offset"]): int(record["size"]) for record in index.records} == sizes
    assert all(member.mtime == 0 for member in members.values())


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = image_folder(tmp_path / "in")
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "text.png").write_text("not an image")
    (index,) = pack_folder(source, tmp_path / "out")
    assert len(index) == 20
    assert index.skipped == {"cat/empty.jpg": "zero bytes", "dog/text.png": "not an image (UnidentifiedImageError)"}
    assert "left out 2 of 22" in capsys.readouterr().out


def test_small_equal_images_are_kept_decoded_and_equal_to_reading(tmp_path: Path) -> None:
    (index,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out")
    kept, read = ShardReader(index), ShardReader(index, memory_limit_mb=0)
    assert kept.decoded is not None
    assert read.decoded is None
    chosen = np.array([3, 17, 3])
    assert torch.equal(kept.images(chosen)[0], torch.stack(read.images(chosen)[0]))


@pytest.mark.parametrize("kept", [True, False])
def test_a_damaged_sample_is_replaced_and_named(tmp_path: Path, kept: bool) -> None:
    (index,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out")
    path, offset, size = index.locate(4)
    with open(path, "r+b") as file:
        file.seek(offset + 8)
        file.write(bytes(size - 8))
    reader = ShardReader(index, memory_limit_mb=1024 if kept else 0)
    images, bad = reader.images(np.array([3, 4, 5]))
    assert list(bad) == [1]
    assert torch.equal(images[1], images[2])
    assert torch.equal(reader.images(np.array([3, 4]))[0][1], images[0])
    alone, bad = reader.images(np.array([4, 4]))
    assert list(bad) == [0, 1]
    assert all((image == 0).all() for image in alone)


def test_images_of_other_modes_are_converted() -> None:
    import io

    def encoded(image: Image.Image, kind: str) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    grey = Image.fromarray(np.full((4, 4), 77, np.uint8))
    assert (decode(encoded(grey, "PNG")) == 77).all()
    assert (decode(encoded(grey.convert("CMYK"), "JPEG")).float() - 77).abs().max() <= 3
    assert (decode(encoded(grey.convert("P"), "PNG"), 1) == 77).all()
    deep = Image.fromarray(np.full((4, 4), 77 * 256 + 5, np.uint16))
    assert (decode(encoded(deep, "PNG"), 1) == 77).all()
    assert decode(encoded(grey.convert("RGBA"), "PNG"), 4).shape == (4, 4, 4)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(BadImage, match=r"60000 x 60000 pixels|DecompressionBomb"):
        decode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + b"\xaeB`\x82")


def test_bad_sources_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "no images there"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_folder(source, tmp_path / "out")
    mixed = image_folder(tmp_path / "mixed")
    Image.new("RGB", (4, 4)).save(mixed / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png.*beside folders \(cat"):
        pack_folder(mixed, tmp_path / "out")
    with pytest.raises(ValueError, match="share between 0 and 1"):
        pack_folder(mixed, tmp_path / "out", holdout=1.5)
    assert not (tmp_path / "out").exists()


def test_other_fields_of_a_sample_are_not_its_image(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(4):
            image, mask = (Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (i, 200))
            writer.write({"__key__": f"{i:04d}", "png": image, "seg.png": mask})
    images, _ = ShardReader(index_shards(tmp_path)).images(np.arange(4))
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslvit.data.reader.OPEN_SHARDS", 2)
    (index,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out", shard_mb=0.002)
    assert len(index.shards) > 5
    reader = ShardReader(index, memory_limit_mb=0)
    for samples in (np.arange(20), np.arange(20)[::-1]):
        reader.images(samples)
        assert len(reader.files) == 2


def test_an_image_folder_is_packed_once_and_another_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    one, other = image_folder(tmp_path / "one"), image_folder(tmp_path / "other", count=3)
    assert len(open_shards(one, tmp_path / "beside")) == 20
    assert len(open_shards(one, tmp_path / "beside")) == 20
    with pytest.raises(ValueError, match="shards of other images"):
        open_shards(other, tmp_path / "beside")
    with pytest.raises(FileNotFoundError, match="no data given"):
        open_shards("", tmp_path / "beside")


def test_a_class_of_one_image_stays_in_training(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    (source / "emu").mkdir()
    Image.fromarray(np.full((6, 8, 3), 2, np.uint8)).save(source / "emu" / "only.png")
    train, val = pack_folder(source, tmp_path / "out", holdout=0.2)
    assert len(train) == 17
    assert len(val) == 4


def test_overwriting_keeps_the_old_shards_until_the_new_are_whole(tmp_path: Path) -> None:
    (old,) = pack_folder(image_folder(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("not an image")
    with pytest.raises(ValueError, match="none of 1 images is readable"):
        pack_folder(tmp_path / "bad", tmp_path / "out", overwrite=True)
    assert load_index(tmp_path / "out").fingerprint() == old.fingerprint()


def test_an_unreadable_class_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    source, scandir = image_folder(tmp_path / "in"), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="dog: not readable .Permission denied.. Check its permissions"):
        pack_folder(source, tmp_path / "out")


def test_shards_are_not_overwritten_silently(tmp_path: Path) -> None:
    pack(array_samples(np.zeros((3, 4, 4), np.uint8)), tmp_path)
    with pytest.raises(ValueError, match="already holds shards"):
        pack(array_samples(np.zeros((2, 4, 4), np.uint8)), tmp_path)
    assert len(pack(array_samples(np.zeros((2, 4, 4), np.uint8)), tmp_path, overwrite=True)) == 2


def test_a_damaged_index_or_shard_is_named(tmp_path: Path) -> None:
    index = pack(array_samples(np.zeros((3, 4, 4), np.uint8)), tmp_path)
    with pytest.raises(FileNotFoundError, match="sslvit shards pack"):
        load_index(tmp_path / "elsewhere")
    shard = tmp_path / index.shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1024])
    with pytest.raises(ValueError, match=r"shard-000000.tar: .* bytes, index.json says"):
        load_index(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="missing, though index.json lists it"):
        load_index(tmp_path)
    shard.write_bytes(whole)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"samples": 4}))
    with pytest.raises(ValueError, match="does not fit index.npy"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="Make it again"):
        load_index(tmp_path)
