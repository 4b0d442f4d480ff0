"""Boxes of images are resampled as torch and PIL do."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from shard_fixtures import encoded, photograph, smooth_images

from sslvit.data import resample as resample_module
from sslvit.data.decode import decode
from sslvit.data.header import BadImage
from sslvit.data.loader import center_view, make_batch, view_of_image
from sslvit.data.reader import MemoryReader
from sslvit.data.resample import Boxes, crop_and_resize, normalize, resample
from sslvit.data.views import Views
from sslvit.settings import EncoderSettings
from sslvit.settings.views import (
    CenterSettings,
    CropSettings,
)


def boxes_of(top, left, height, width, mirrored=False) -> Boxes:
    return Boxes(*(np.array([float(v)]) for v in (top, left, height, width)), np.array([mirrored]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(0, 0, 40, 56), (3, 5, 17, 30), (10, 0, 9, 8)])
def test_matrix_resampling_is_torchs_antialiased_one(interpolation: str, box: tuple) -> None:
    image = smooth_images(1)
    top, left, height, width = box
    ours = resample(image, boxes_of(*box), [16, 20], interpolation)
    part = image[:, :, top : top + height, left : left + width]
    theirs = F.interpolate(part.float(), size=(16, 20), mode=interpolation, antialias=True).round().clamp(0, 255)
    assert (ours.float() - theirs).abs().max() <= 1


def test_the_whole_image_at_its_own_size_is_itself() -> None:
    image = smooth_images(1)
    assert torch.equal(resample(image, boxes_of(0, 0, 40, 56), [40, 56], "bicubic"), image)
    mirrored = resample(image, boxes_of(0, 0, 40, 56, mirrored=True), [40, 56], "bicubic")
    assert torch.equal(mirrored, image.flip(3))


def test_resampling_tables_of_many_resolutions_are_kept_up_to_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = resample_module._make_table
    tables = resample_module.WeightTables()
    monkeypatch.setattr(resample_module, "_tables", tables)
    monkeypatch.setattr(resample_module, "_make_table", lambda *key: made.append(key) or make(*key))
    images, boxes = smooth_images(1, 24, 24), boxes_of(3, 4, 12, 14)
    sizes = range(8, 20, 2)
    first = [resample(images, boxes, [size, size], "bicubic") for size in sizes]
    assert len(made) == 12  # rows and columns of each
    again = [resample(images, boxes, [size, size], "bicubic") for size in sizes]
    assert len(made) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    held = tables.nbytes
    monkeypatch.setattr(resample_module, "MAX_TABLES_BYTES", held)
    resample(images, boxes, [8, 8], "bicubic")
    resample(images, boxes, [20, 20], "bicubic")  # too much: those of 10 go, of 8 were just used
    assert len(made) == 14
    assert tables.nbytes <= held
    resample(images, boxes, [8, 8], "bicubic")
    assert len(made) == 14
    resample(images, boxes, [10, 10], "bicubic")
    assert len(made) == 16


def test_outside_of_the_image_is_black() -> None:
    image = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    view = resample(image, boxes_of(-2, -4, 8, 8), [8, 8], "bilinear")
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[2:6, 4:8] = 200
    assert torch.equal(view[0, 0], expected)


@pytest.mark.parametrize("side", [40, 140])
def test_a_mirrored_box_is_the_mirror_image_of_the_same_box(side: int) -> None:
    image = smooth_images(1, side, side + 16)[0]
    for box in ((3, 5, 30, 30), (2.5, 3.25, 30.5, 31.75), (-4, -4, side, side)):
        straight, mirrored = (crop_and_resize(image, boxes_of(*box, m), [20, 24], "bicubic") for m in (False, True))
        assert (straight.flip(2).float() - mirrored.float()).abs().max() <= 1
        assert not torch.equal(straight, mirrored)


def test_an_image_is_only_reduced_as_far_as_its_narrower_axis_allows() -> None:
    assert boxes_of(0, 0, 800, 100).zoom([100, 50]).tolist() == [2]
    assert boxes_of(0, 0, 100, 800).zoom([25, 100]).tolist() == [4]


def test_no_view_is_brighter_than_white_or_darker_than_black() -> None:
    image = torch.zeros(1, 200, 200)
    image[:, :, 100:] = 255.0  # beside an edge, bicubic weights overshoot
    for kind in (torch.float32, torch.uint8):
        view = crop_and_resize(image.to(kind), boxes_of(0, 0, 200, 200), [333, 333], "bicubic")
        assert (float(view.min()), float(view.max())) == (0, 255)
        assert view.dtype == kind


def test_normalize_is_mean_and_deviation_of_pixels_in_zero_to_one() -> None:
    view = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    torch.testing.assert_close(normalize(view, [0.5], [0.25]).flatten(), torch.tensor([-2.0, 2.0]))
    images, mean, std = smooth_images(2), [0.1, 0.4, 0.7], [0.2, 0.5, 0.3]
    expected = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(normalize(images, mean, std).double(), expected, atol=1e-5, rtol=1e-5)


def smooth_photograph(height: int, width: int, cells: int, seed: int = 0) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [224, 96, 32])
def test_a_random_crop_of_a_jpeg_decoded_at_reduced_scale_keeps_its_box(size: int) -> None:
    content = encoded(smooth_photograph(1203, 1605, 14), "JPEG", quality=95)
    reader = MemoryReader({number: (str(number), content) for number in range(6)}, 3)
    views = Views(CropSettings(), [size, size], "bicubic", seed=1)
    samples, epochs = np.arange(6), np.zeros(6, int)
    drawn = views.sample_boxes(np.tile([1203, 1605], (6, 1)), samples, epochs)
    assert (drawn[0][1].zoom([size, size]) >= 2).all()  # each is decoded at a half or less
    seen = make_batch(reader, views, samples, epochs).views[0]
    for row, view in enumerate(seen):
        exact = views.crop_image(decode(content), drawn, row)[0]
        assert (exact.float() - view.float()).abs().mean() < 0.5


@pytest.mark.parametrize("left", [100, 101])
def test_a_random_crop_sees_nothing_of_what_lies_beside_it(left: int) -> None:
    """Also between the pixels of an image decoded at half its size; a center view is smoothed at its border."""
    half = torch.zeros(3, 200, 200, dtype=torch.uint8)
    half[:, :, : left // 2] = 255
    half[:, :, 150:] = 255
    box = boxes_of(20, left, 100, 300 - left)
    assert crop_and_resize(half, box, [16, 16], "bicubic", reduction=2).max() == 0
    box.is_cut = False
    assert crop_and_resize(half, box, [16, 16], "bicubic", reduction=2).max() > 10


def pil_view(image: Image.Image, encoder: EncoderSettings) -> torch.Tensor:
    """The largest centered box with the proportions of image_size, or the image, times crop_fraction, by PIL alone."""
    height, width = encoder.image_size
    if encoder.crop_mode == "squash":
        tall, wide = float(image.height), float(image.width)
    else:
        wide = min(image.width, image.height * width / height)
        tall = min(image.height, image.width * height / width)
    tall, wide = tall * encoder.crop_fraction, wide * encoder.crop_fraction
    left, top = (image.width - wide) / 2, (image.height - tall) / 2
    resampling = Image.Resampling[encoder.interpolation.upper()]
    view = image.resize((width, height), resampling, box=(left, top, left + wide, top + tall))
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.37])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [64, [96, 160]])
def test_evaluation_sees_what_pil_makes_of_the_box(interpolation: str, fraction: float, mode: str, size) -> None:
    """Boxes between pixels, of images small and large, and of JPEGs that could be decoded at reduced scale."""
    encoder = EncoderSettings(
        image_size=size, patch=16, interpolation=interpolation, crop_mode=mode, crop_fraction=fraction
    )
    for height, width in ((61, 90), (97, 334), (803, 601), (640, 640)):
        for kind in ("PNG", "JPEG"):
            content = encoded(smooth_photograph(height, width, 13), kind)
            expected = pil_view(Image.open(io.BytesIO(content)), encoder)
            difference = (view_of_image(content, encoder).float() - expected.float()).abs()
            assert difference.mean() < 0.3
            assert (difference > 1).float().mean() < 0.001


def test_a_centered_crop_of_sharp_edges_is_pils_at_its_border_too() -> None:
    """What lies beside the box smooths its border, as where others resize before they crop."""
    rough = np.random.default_rng(0).integers(0, 256, (400, 600, 3)).astype(np.uint8)
    for side in (400, 90):
        image = Image.fromarray(rough[:side, : side * 3 // 2])
        encoder = EncoderSettings(image_size=32, patch=4, crop_fraction=0.8)
        difference = view_of_image(encoded(image, "PNG"), encoder).float() - pil_view(image, encoder).float()
        assert difference.abs().max() <= 2
        whole = view_of_image(encoded(image, "PNG"), EncoderSettings(image_size=32, patch=4)).permute(1, 2, 0)
        fitted = np.array(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC), int)
        assert np.abs(whole.numpy().astype(int) - fitted).max() <= 2


def test_floats_are_seen_as_bytes_are() -> None:
    image = smooth_images(1, 141, 200)[0]
    views = Views(CenterSettings(fraction=0.83), [48, 48], "bicubic")
    drawn = views.sample_boxes(np.array([[141, 200]]), np.array([0]), np.array([0]))
    floats, whole = (views.crop_image(of, drawn, 0)[0] for of in (image.float(), image))
    assert floats.dtype == torch.float32
    assert (floats - whole).abs().max() < 1  # bytes are rounded after each axis


@pytest.mark.parametrize(
    ("mode", "fraction", "height", "width"),
    [
        ("center", 1.0, 24.0, 24.0),
        ("center", 0.75, 18.0, 18.0),
        ("squash", 1.0, 24.0, 60.0),
        ("squash", 0.5, 12.0, 30.0),
    ],
)
def test_evaluation_sees_the_crop_that_the_encoder_names(mode, fraction, height, width):
    encoder = EncoderSettings(image_size=8, patch=4, crop_mode=mode, crop_fraction=fraction)

    view = Views(center_view(encoder), encoder.image_size, "bilinear")
    ((size, boxes),) = view.sample_boxes(np.array([[24, 60]]), np.array([0]), np.array([0]))

    assert size == [8, 8]
    assert (boxes.height[0], boxes.width[0]) == (height, width)
    assert (boxes.top[0], boxes.left[0]) == ((24 - height) / 2, (60 - width) / 2)


def test_one_encoded_image_is_seen_as_evaluation_sees_it() -> None:
    picture = photograph(40, 40)
    encoder = EncoderSettings(image_size=20, patch=4, crop_fraction=0.5, interpolation="bilinear")
    view = view_of_image(encoded(picture, "PNG"), encoder)
    assert view.dtype == torch.uint8
    assert torch.equal(view, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, 10:30, 10:30])
    with pytest.raises(BadImage, match="not an image"):
        view_of_image(b"no image at all", encoder)
