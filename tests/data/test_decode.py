"""Bytes become pixels, whatever the format says they are; what cannot be used is named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from shard_fixtures import encoded, photograph

from sslvit.data import decode as module
from sslvit.data import header as header_module
from sslvit.data.decode import check_whole, decode, reduction_for
from sslvit.data.header import BadImage, Header, has_end_marker, read_header
from sslvit.data.orientation import exif_orientation, turn


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def turned(image: Image.Image, kind: str, orientation: int, **options) -> bytes:
    """The image with a note of how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [
        ("RGB", "PNG", 3), ("RGB", "WEBP", 3), ("RGB", "BMP", 3), ("RGB", "PNG", 1), ("P", "PNG", 3), ("P", "PNG", 1),
        ("P", "GIF", 3), ("RGBA", "PNG", 3), ("RGBA", "PNG", 4), ("LA", "PNG", 3), ("L", "PNG", 3), ("L", "PNG", 1),
        ("1", "PNG", 3), ("CMYK", "JPEG", 3), ("CMYK", "TIFF", 3), ("L", "JPEG", 3), ("YCbCr", "JPEG", 3),
    ],
)  # fmt: skip
def test_images_of_other_modes_are_converted(mode: str, kind: str, channels: int) -> None:
    """As PIL converts them: the colors of a colored image, in the order red, green, blue."""
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(photograph(20, 30).convert(mode), kind, **options)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(20, 30, channels)
    found = decode(content, channels).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)
    if mode not in ("L", "LA", "1") and channels > 1:
        source = np.array(photograph(20, 30)).astype(int)
        assert np.abs(found[:, :, :3] - source).mean() < 30
        assert np.abs(found[:, :, :3] - source[:, :, ::-1]).mean() > 30  # blue is not red


def test_a_photograph_with_a_video_behind_it_is_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """As phones write them; markers of scans are counted up to the end of the image."""
    photograph = encoded(Image.fromarray(np.zeros((40, 50, 3), np.uint8)), "JPEG")
    video = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes() + b"\xff\xda" * 200
    assert read_header(photograph + video).width == 50
    start = photograph.index(b"\xff\xda")
    many = photograph[:start] + photograph[start:-2] * 120 + photograph[-2:]
    with pytest.raises(BadImage, match="a JPEG of 120 scans"):
        read_header(many)
    thumbnail = b"\xff\xe1" + (len(photograph) + 2).to_bytes(2, "big") + photograph  # ends before the image does
    with pytest.raises(BadImage, match="a JPEG of 120 scans"):
        read_header(many[:2] + thumbnail + many[2:])


def test_images_with_alpha_of_other_modes_keep_their_grays() -> None:
    gray = Image.fromarray(np.full((4, 4), 77, np.uint8))
    assert (decode(encoded(gray, "PNG")) == 77).all()
    assert (decode(encoded(gray.convert("CMYK"), "JPEG")).float() - 77).abs().max() <= 3
    assert decode(encoded(gray.convert("RGBA"), "PNG"), 4)[3].eq(255).all()
    assert (decode(encoded(gray.convert("LA"), "PNG"), 3) == 77).all()


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
    with pytest.raises(BadImage, match=f"an array of {channels} channels, but 3 are expected"):
        decode(npy(pixels), 3)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("L", 1), ("RGB", 1), ("CMYK", 3)])
def test_the_fast_jpeg_decoder_gives_pils_pixels(mode: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    content = encoded(photograph(120, 90).convert(mode), "JPEG", quality=85)
    fast = decode(content, channels)
    half = decode(content, channels, reduction=2)
    monkeypatch.setattr(module, "simplejpeg", None)
    monkeypatch.setattr(header_module, "simplejpeg", None)
    assert torch.equal(fast, decode(content, channels))
    if mode == "RGB" and channels == 3:
        assert half.shape == (3, 60, 45)
        assert torch.equal(half, decode(content, channels, reduction=2))


@pytest.mark.parametrize("has_fast", [True, False])
def test_reduced_decoding_shows_the_same_picture(has_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_fast:
        monkeypatch.setattr(module, "simplejpeg", None)
        monkeypatch.setattr(header_module, "simplejpeg", None)
    odd = encoded(photograph(402, 299), "JPEG")
    picture = photograph(400, 304)
    content = encoded(picture, "JPEG", quality=95)
    for reduction in (2, 4, 8):
        assert decode(odd, reduction=reduction).shape[1:] == (-(-402 // reduction), -(-299 // reduction))
        small = decode(content, reduction=reduction)
        expected = np.asarray(picture.resize((small.shape[2], small.shape[1]), Image.Resampling.BOX), np.float32)
        assert np.abs(small.permute(1, 2, 0).numpy() - expected).mean() < 3
    assert decode(encoded(picture, "PNG"), reduction=4).shape == (3, 400, 304)


@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_one_row_or_column_are_turned_too(sides: tuple[int, int], orientation: int) -> None:
    content = turned(Image.new("RGB", sides, (9, 9, 9)), "PNG", orientation)
    assert decode(content).shape[1:] == (sides if orientation >= 5 else sides[::-1])


@pytest.mark.parametrize("has_fast", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_narrow_photographs_are_decoded_at_any_reduction(
    has_fast: bool, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_fast:
        monkeypatch.setattr(module, "simplejpeg", None)
        monkeypatch.setattr(header_module, "simplejpeg", None)
    for reduction in (2, 4, 8):
        assert decode(encoded(photograph(300, 3), "JPEG"), channels, reduction=reduction).shape[0] == channels


def test_the_reduction_leaves_every_view_its_pixels() -> None:
    header = Header(401, 303, "RGB", 3, is_jpeg=True)
    assert [reduction_for(zoom, header) for zoom in (0.3, 1.0, 1.99, 2.0, 3.9, 4.0, 7.9, 8.0, 50.0)] == [
        1, 1, 1, 2, 2, 4, 4, 8, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_upright_as_every_viewer_shows_them(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not header_module.HAS_AVIF:
        pytest.skip("Pillow was built without AVIF")
    content = turned(photograph(40, 24), kind, orientation)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    header = read_header(content)
    assert (header.height, header.width) == expected.shape[:2] == ((24, 40) if orientation >= 5 else (40, 24))
    assert np.array_equal(decode(content).permute(1, 2, 0).numpy(), expected)
    stored = read_header(content, upright=False)
    assert (stored.height, stored.width) == (40, 24)
    without = np.asarray(Image.open(io.BytesIO(turned(photograph(40, 24), kind, 1))).convert("RGB"))
    assert np.array_equal(decode(content, header=stored).permute(1, 2, 0).numpy(), without)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("has_fast", [True, False])
def test_a_reduced_image_is_turned_to_the_pixels_of_one_that_was_turned_first(
    orientation: int, has_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_fast:
        monkeypatch.setattr(module, "simplejpeg", None)
        monkeypatch.setattr(header_module, "simplejpeg", None)
    picture = photograph(400, 304)
    content = turned(picture, "JPEG", orientation, quality=90)
    plain = decode(turned(picture, "JPEG", 1, quality=90), reduction=4).permute(1, 2, 0).numpy()
    reduced = decode(content, reduction=4)
    assert np.array_equal(reduced.permute(1, 2, 0).numpy(), turn(plain, orientation))
    assert reduction_for(8.0, read_header(content)) == 8
    odd = turned(photograph(402, 300), "JPEG", orientation)
    assert reduction_for(8.0, read_header(odd)) == 2  # 4 does not divide 402: its last row would come first


def test_nonsense_about_the_orientation_is_no_orientation() -> None:
    whole, rng = turned(photograph(24, 16), "JPEG", 6), np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for place in rng.integers(2, 120, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        assert 1 <= exif_orientation(bytes(damaged[: rng.integers(4, len(damaged))])) <= 8
    assert exif_orientation(turned(photograph(24, 16), "JPEG", 9)) == 1


def test_an_array_with_its_channels_first_is_refused() -> None:
    with pytest.raises(BadImage, match=r"shape \(3, 20, 30\): images are 'h w c', and this looks like 'c h w'"):
        read_header(npy(np.zeros((3, 20, 30), np.uint8)))


def test_a_tiff_of_many_channels_is_read_through_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    for kind in (np.uint8, np.uint16):
        pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 6)).astype(kind)
        for planar in ("contig", "separate"):
            buffer = io.BytesIO()
            stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
            tifffile.imwrite(buffer, stored, photometric="minisblack", planarconfig=planar, compression="deflate")
            header = read_header(buffer.getvalue())
            assert (header.height, header.width, header.channels, header.bits) == (20, 30, 6, 8 * kind().itemsize)
            found = decode(buffer.getvalue(), 6, header.bits).permute(1, 2, 0).numpy()
            assert np.allclose(found, pixels if kind == np.uint8 else pixels / np.float32(257))
    with pytest.raises(BadImage):
        decode(buffer.getvalue()[:200], 6)
    monkeypatch.setattr(header_module, "HAS_TIFFFILE", False)
    with pytest.raises(BadImage, match=r"needs tifffile.*pip install 'sslvit\[tiff\]'"):
        read_header(buffer.getvalue())


@pytest.mark.parametrize(
    ("channels", "kind", "options"),
    [
        (2, np.uint8, {"photometric": "minisblack", "planarconfig": "contig"}),
        (3, np.uint16, {"photometric": "rgb", "planarconfig": "separate"}),
        (4, np.uint8, {"photometric": "rgb", "planarconfig": "contig", "extrasamples": ["unspecified"]}),
        (4, np.uint16, {"photometric": "rgb", "planarconfig": "contig", "extrasamples": ["unspecified"]}),
        (4, np.uint16, {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unspecified"]}),
    ],
)
def test_a_tiff_that_pil_misreads_keeps_every_channel(channels: int, kind: type, options: dict) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (20, 30, channels)).astype(kind)
    for orientation in (1, 6):
        buffer = io.BytesIO()
        stored = pixels if options["planarconfig"] == "contig" else pixels.transpose(2, 0, 1)
        tifffile.imwrite(buffer, stored, extratags=[(274, "H", 1, orientation, True)], **options)
        header = read_header(buffer.getvalue())
        assert (header.channels, header.bits) == (channels, 8 * kind().itemsize)
        upright = pixels if orientation == 1 else np.rot90(pixels, -1)
        assert (header.height, header.width) == upright.shape[:2]
        found = decode(buffer.getvalue(), channels, header.bits).permute(1, 2, 0).numpy()
        assert np.allclose(found, upright if kind == np.uint8 else upright / np.float32(257))


def test_a_heic_photograph_of_a_phone_is_read() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photograph(64, 48)).save(buffer, quality=95)
    found = decode(buffer.getvalue()).permute(1, 2, 0).numpy().astype(float)
    assert np.abs(found - np.asarray(photograph(64, 48))).mean() < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_a_file_that_is_cut_is_told_from_a_whole_one(kind: str) -> None:
    content = encoded(photograph(64, 48), kind)
    check_whole(content, read_header(content))
    check_whole(content + bytes(5000), read_header(content))  # padding is no damage
    for length in (len(content) // 2, len(content) - 100):
        cut = content[:length]
        with pytest.raises(BadImage):  # of its header or of its pixels
            check_whole(cut, read_header(cut))


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photograph() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 3000
    thumbnail = encoded(photograph(30, 30), "JPEG")
    whole = encoded(photograph(64, 48), "JPEG", exif=b"Exif\0\0" + exif.tobytes()[6:] + thumbnail)
    assert has_end_marker(whole)
    assert not has_end_marker(whole[: len(whole) - 100])


def test_damage_inside_a_whole_file_is_found_by_decoding_it() -> None:
    content = bytearray(encoded(photograph(64, 48), "PNG"))
    content[len(content) // 2] ^= 0xFF
    header = read_header(bytes(content))
    check_whole(bytes(content), header)
    with pytest.raises(BadImage, match="damaged image"):
        check_whole(bytes(content), header, fully=True)


def test_few_bytes_that_promise_many_pixels_are_damaged() -> None:
    content = encoded(Image.new("1", (4000, 4000)), "PNG")
    assert len(content) < 8000
    with pytest.raises(BadImage, match=r"damaged image \(4000 x 4000 pixels in \d+ bytes\)"):
        read_header(content)
    assert read_header(encoded(Image.new("RGB", (4000, 4000), (255, 255, 255)), "JPEG")).width == 4000  # a blank page
    with pytest.raises(BadImage, match=r"64 x 48 pixels, more than 3000 \(data.max_pixels\)"):
        read_header(encoded(photograph(48, 64), "JPEG"), max_pixels=3000)
    with pytest.raises(BadImage, match="400000000 pixels, more than"):
        read_header(encoded(Image.new("L", (20_000, 20_000)), "GIF"))


def test_a_jpeg_of_hundreds_of_scans_is_damaged() -> None:
    content = encoded(photograph(64, 48), "JPEG", progressive=True)
    assert read_header(content).is_jpeg
    start = content.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="a JPEG of [0-9]+ scans"):
        read_header(content[:-2] + content[start:-2] * 100 + content[-2:])


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(BadImage, match="3600000000 pixels, more than"):
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
