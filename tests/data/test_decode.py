"""Bytes become pixels, whatever the format says they are; what cannot be used is named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded, photograph

from sslvit.data import decode as module
from sslvit.data.decode import BadImage, decode, read_header, reduction_for


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_images_of_other_modes_are_converted() -> None:
    grey = Image.fromarray(np.full((4, 4), 77, np.uint8))
    assert (decode(encoded(grey, "PNG")) == 77).all()
    assert (decode(encoded(grey.convert("CMYK"), "JPEG")).float() - 77).abs().max() <= 3
    assert (decode(encoded(grey.convert("P"), "PNG"), 1) == 77).all()
    assert decode(encoded(grey.convert("RGBA"), "PNG"), 4).shape == (4, 4, 4)
    assert (decode(encoded(grey.convert("LA"), "PNG"), 3) == 77).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_or_kept(kind: str) -> None:
    content = encoded(Image.fromarray(np.full((4, 4), 77 * 257 + 100, np.uint16)), kind)
    assert read_header(content).bits == 16
    assert (decode(content, 1) == 77).all()
    kept = decode(content, 1, bits=16)
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, torch.full((1, 4, 4), 77 + 100 / 257))


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_arrays_of_any_number_of_channels_come_back(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    header = read_header(npy(pixels))
    assert (header.height, header.width, header.channels, header.mode) == (5, 7, channels, "array")
    assert torch.equal(decode(npy(pixels), channels), torch.from_numpy(pixels).permute(2, 0, 1))
    deep = pixels.astype(np.uint16) * 256 + 3
    expected = torch.from_numpy(deep / np.float32(257)).permute(2, 0, 1)
    torch.testing.assert_close(decode(npy(deep), channels, bits=16), expected)
    with pytest.raises(BadImage, match=f"an array of {channels} channels, but 3 are wanted"):
        decode(npy(pixels), 3)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("L", 1), ("RGB", 1), ("CMYK", 3)])
def test_the_fast_jpeg_decoder_gives_pils_pixels(mode: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    content = encoded(photograph(120, 90).convert(mode), "JPEG", quality=85)
    fast = decode(content, channels)
    half = decode(content, channels, reduction=2)
    monkeypatch.setattr(module, "simplejpeg", None)
    assert torch.equal(fast, decode(content, channels))
    if mode == "RGB" and channels == 3:
        assert half.shape == (3, 60, 45)
        assert torch.equal(half, decode(content, channels, reduction=2))


@pytest.mark.parametrize("has_fast", [True, False])
def test_reduced_decoding_shows_the_same_picture(has_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_fast:
        monkeypatch.setattr(module, "simplejpeg", None)
    odd = encoded(photograph(402, 299), "JPEG")
    picture = photograph(400, 304)
    content = encoded(picture, "JPEG", quality=95)
    for reduction in (2, 4, 8):
        assert decode(odd, reduction=reduction).shape[1:] == (-(-402 // reduction), -(-299 // reduction))
        small = decode(content, reduction=reduction)
        expected = np.asarray(picture.resize((small.shape[2], small.shape[1]), Image.Resampling.BOX), np.float32)
        assert np.abs(small.permute(1, 2, 0).numpy() - expected).mean() < 3
    assert decode(encoded(picture, "PNG"), reduction=4).shape == (3, 400, 304)


def test_the_reduction_leaves_every_view_its_pixels() -> None:
    assert [reduction_for(zoom) for zoom in (0.3, 1.0, 1.99, 2.0, 3.9, 4.0, 7.9, 8.0, 50.0)] == [
        1, 1, 1, 2, 2, 4, 4, 8, 8,
    ]  # fmt: skip


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(BadImage, match=r"60000 x 60000 pixels|DecompressionBomb"):
        decode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + b"\xaeB`\x82")
    jpeg = bytearray(encoded(photograph(64, 64), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadImage, match="60000 x 60000 pixels"):
        decode(bytes(jpeg))


def test_what_is_no_image_is_named() -> None:
    whole = encoded(photograph(64, 64), "JPEG")
    for content, reason in [
        (b"", "zero bytes"),
        (b"hello", "not an image"),
        (whole[: len(whole) // 2], "damaged image"),
        (whole[:20], "not an image|damaged"),
        (npy(np.zeros((4, 4, 3), np.float32)), "float32"),
        (npy(np.zeros((4,), np.uint8)), r"shape \(4,\)"),
        (npy(np.zeros((4, 4), np.uint8))[:-3], "ends early"),
        (npy(np.array([[{"a": 1}]], object), allow_pickle=True), "object"),
        (b"\x93NUMPY\x01\x00garbage", "damaged array"),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode(content)


def test_a_damaged_jpeg_never_does_more_than_fail() -> None:
    whole, rng = encoded(photograph(48, 48), "JPEG"), np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        cut = int(rng.integers(1, len(damaged) + 1)) if rng.random() < 0.3 else len(damaged)
        try:
            outcomes.add(decode(bytes(damaged[:cut])).dim())
        except BadImage:
            outcomes.add("bad")
    assert outcomes == {3, "bad"}
