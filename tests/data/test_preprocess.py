"""An image in Python and the same image in an evaluation become the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_fixtures import TINY
from shard_fixtures import encoded, photograph

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.data.loader import evaluation_loader, normalized_view
from sslvit.data.module import ShardDataModule
from sslvit.data.open import open_shards
from sslvit.data.preprocess import preprocess
from sslvit.data.reader import ShardReader
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.load import load_recipe

SMALL = {"image_size": 32, "patch": 8, "width": 16, "depth": 1, "heads": 2, "crop_fraction": 0.875}


def files_in(folder: Path, kinds: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, content in kinds.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def photographs(folder: Path) -> list[Path]:
    """JPEGs, one of them turned by EXIF and one gray, PNGs with a palette and with transparency, and a CMYK JPEG."""
    turned = Image.Exif()
    turned[0x0112] = 6
    first = photograph(97, 143)
    return files_in(
        folder,
        {
            "a.jpg": encoded(first, "JPEG", quality=90),
            "b.jpg": encoded(photograph(160, 61, 1), "JPEG", exif=turned),
            "c.jpg": encoded(photograph(40, 52, 2).convert("L"), "JPEG"),
            "d.png": encoded(first.convert("P"), "PNG"),
            "e.png": encoded(first.convert("RGBA"), "PNG"),
            "f.jpg": encoded(first.convert("CMYK"), "JPEG"),
        },
    )


def seen_in_evaluation(folder: Path, encoder: EncoderSettings) -> torch.Tensor:
    """All images, by name."""
    index = open_shards(folder)
    reader = ShardReader(index, encoder.channels, memory_limit_mb=0)
    order = np.argsort([index.key(number) for number in range(len(index))])
    (batch,) = evaluation_loader(reader, encoder, subset=order)
    return normalized_view(batch, encoder, torch.device("cpu"))[batch.valid]


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_pictures_and_arrays_are_seen_as_evaluation_sees_them(tmp_path: Path, mode: str, channels: int) -> None:
    statistics = {"mean": [0.4] * channels, "std": [0.3] * channels}
    encoder = EncoderSettings(**SMALL, crop_mode=mode, channels=channels, **statistics)
    files = photographs(tmp_path / "photos")
    expected = seen_in_evaluation(tmp_path / "photos", encoder)
    assert expected.shape == (6, channels, 32, 32)
    assert torch.equal(preprocess(files, encoder), expected)
    assert torch.equal(preprocess([str(file) for file in files], encoder), expected)
    assert torch.equal(preprocess([Image.open(file) for file in files], encoder), expected)
    assert torch.equal(preprocess(np.asarray(Image.open(files[0])), encoder), expected[:1])
    assert torch.equal(preprocess(np.asarray(Image.open(files[2])), encoder), expected[2:3])  # 'h w'


def test_sixteen_bits_lose_nothing(tmp_path: Path) -> None:
    encoder = EncoderSettings(**SMALL, channels=1, mean=[0.5], std=[0.25])
    values = np.random.default_rng(0).integers(0, 2**16, (50, 70), np.uint16)
    (file,) = files_in(tmp_path / "deep", {"a.png": encoded(Image.fromarray(values), "PNG")})
    expected = seen_in_evaluation(tmp_path / "deep", encoder)
    assert torch.equal(preprocess(file, encoder), expected)
    assert torch.equal(preprocess(Image.open(file), encoder), expected)
    assert torch.equal(preprocess(values, encoder), expected)
    assert not torch.equal(preprocess((values >> 8).astype(np.uint8), encoder), expected)


@pytest.mark.parametrize(("mode", "like"), [("HSV", "RGB"), ("RGBX", "RGB"), ("PA", "RGBA"), ("LAB", "RGB")])
def test_modes_that_no_format_of_files_has_are_converted(mode: str, like: str) -> None:
    encoder = EncoderSettings(**SMALL)
    colors = np.random.default_rng(0).integers(0, 256, (50, 70, 4), np.uint8)
    image = Image.fromarray(colors[:, :, : len(Image.new(mode, (1, 1)).getbands())].copy(), mode)
    expected = image.convert(like)
    assert torch.equal(preprocess(image, encoder), preprocess(expected, encoder))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_integers_of_pil_are_images_of_16_bits(mode: str) -> None:
    encoder = EncoderSettings(**SMALL, channels=1, mean=[0.5], std=[0.25])
    values = np.random.default_rng(0).integers(0, 2**16, (50, 70), np.uint16)
    stored = values.astype({"I": np.int32, "I;16B": ">u2"}.get(mode, "<u2"))
    image = Image.frombytes(mode, (70, 50), stored.tobytes())
    assert torch.equal(preprocess(image, encoder), preprocess(values, encoder))
    if mode == "I":
        above = Image.fromarray(stored + 2**16)
        with pytest.raises(ValueError, match="image 0: 32-bit integers from .* scale them to 0 to 65535"):
            preprocess(above, encoder)


def test_an_encoder_from_a_file_takes_a_photograph_in_one_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_encoder(ViTEncoder(EncoderSettings(**SMALL)), tmp_path / "encoder")
    file = photographs(tmp_path / "photos")[0]
    encoder = sslvit.load_encoder(tmp_path / "encoder").double()
    features = encoder.features(encoder.preprocess(file))
    assert features.shape == (1, 16)
    assert features.dtype == torch.float64
    embedded = sslvit.embed(tmp_path / "encoder", file.parent)
    (row,) = embedded.features[[str(key).endswith("a.jpg") for key in embedded.keys]]
    np.testing.assert_allclose(features.detach()[0], row, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((8, 8, 3), np.float32), "image 0: holds float32 values, and nothing says which value is white"),
        (Image.new("F", (8, 8)), r"image 0: holds floating-point values \(mode F\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"uint8 and shape \(2, 8, 8, 3\); an image is .* several are a list"),
        (np.zeros((8, 8, 5), np.uint8), "image 0: an array of 5 channels, but 3 are expected"),
        (torch.zeros(3, 8, 8), "image 0: a Tensor. Give a path"),
        ([], "no images given"),
        (b"bytes", "image 0: a int"),
    ],
    ids=["float", "F", "batch", "channels", "tensor", "none", "bytes"],
)
def test_what_is_no_image_is_refused(image: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preprocess(image, EncoderSettings(**SMALL))


def test_pictures_of_a_run_show_images_as_evaluation_sees_them(tmp_path: Path) -> None:
    """The encoder's own crop: here the whole image at another aspect ratio, and not its middle."""
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 255  # the middle of the image is white, and its sides are black
    (tmp_path / "images").mkdir()
    Image.fromarray(wide).save(tmp_path / "images" / "wide.png")
    changes = {"data.shards": str(tmp_path / "images"), "encoder.crop_mode": "squash", "data.global_batch_size": 1}
    module = ShardDataModule.from_settings(load_recipe("mae/digits", TINY | changes))
    seen = module.whole_images(1)
    assert seen.min() < 0 < seen.max()
