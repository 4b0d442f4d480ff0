"""Images are stored unchanged, or resized and encoded as asked."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import encoded, image_folder, photograph

from sslvit.data.decode import decode, decode_pixels
from sslvit.data.header import read_header
from sslvit.data.index import load_index
from sslvit.data.pack import pack_source
from sslvit.data.reader import ShardReader
from sslvit.data.store import PackSettings, TarWriter, store, tar_header


def test_headers_are_tarfiles_own() -> None:
    for name, size in [("a/b.jpg", 12_345), ("é" * 40, 0), ("x" * 100, 8**11 - 1)]:
        about = tarfile.TarInfo(name)
        about.size = size
        assert tar_header(name, size) == about.tobuf(tarfile.USTAR_FORMAT, "utf-8")


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
    [({"shard_mb": 0}, "--shard-mb 0"), ({"resize": 0}, "--resize 0"), ({"encode": "gif"}, "--encode: 'gif'"),
     ({"quality": 101}, "--quality 101")],
)  # fmt: skip
def test_impossible_ways_of_storing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackSettings(**options)


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


def test_a_full_disk_names_the_shard_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer, data) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sslvit.data.store.TarWriter._write", full)
    with pytest.raises(OSError, match="shard-000000.tar: could not be written .No space left on device.. Make room"):
        pack_source(image_folder(tmp_path / "in"), tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").rglob("*.part"))
