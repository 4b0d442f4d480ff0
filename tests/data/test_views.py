"""Views show the box that was drawn, and resampling is the usual one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslvit.data.views import Boxes, View, centre_crops, normalise, random_crops, resample
from sslvit.settings import ViewSettings


def smooth_images(count: int = 6, height: int = 40, width: int = 56) -> torch.Tensor:
    rough = torch.rand(count, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(rough, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


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


def test_outside_of_the_image_is_black() -> None:
    image = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    view = resample(image, boxes_of(-2, -4, 8, 8), [8, 8], "bilinear")
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[2:6, 4:8] = 200
    assert torch.equal(view[0, 0], expected)


@pytest.mark.parametrize("kind", ["crop", "centre", "canvas"])
def test_one_image_at_a_time_and_all_at_once_agree(kind: str) -> None:
    view = View(ViewSettings(kind=kind, centre_fraction=0.9), [24, 24], "bicubic", seed=3)
    for height, width, bound in ((40, 56, 0.001), (140, 100, 0.6)):  # large images are cut at whole pixels
        images = smooth_images(6, height, width)
        together, single = (view(batch, np.arange(6), 2).float() for batch in (images, list(images)))
        assert (together - single).abs().mean() < bound


def test_a_view_depends_on_seed_epoch_and_sample_and_not_on_its_neighbours() -> None:
    images, view = smooth_images(), View(ViewSettings(), [16, 16], "bicubic", seed=3)
    base = view(images, np.arange(6), 0)
    assert torch.equal(view(images[[4, 1]], np.array([4, 1]), 0), base[[4, 1]])
    assert not torch.equal(view(images, np.arange(6), 1), base)
    assert not torch.equal(view(images, np.arange(6) + 10, 0), base)
    assert not torch.equal(View(ViewSettings(), [16, 16], "bicubic", seed=4)(images, np.arange(6), 0), base)


def test_random_crops_have_torchvisions_statistics() -> None:
    from torchvision.transforms import RandomResizedCrop

    count, settings = 4000, ViewSettings(scale=[0.2, 1.0])
    uniform = np.random.default_rng(0).random((count, 23))
    ours = random_crops(settings, uniform, np.full(count, 40), np.full(count, 56), [16, 16])
    torch.manual_seed(0)
    image = smooth_images(1)[0]
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    for name, column in zip(("top", "left", "height", "width"), theirs.T, strict=True):
        values = getattr(ours, name)
        error = np.hypot(values.std(), column.std()) / np.sqrt(count)
        assert abs(values.mean() - column.mean()) < 4 * error, name
        assert values.std() == pytest.approx(column.std(), rel=0.06), name
    assert abs(ours.is_mirrored.mean() - 0.5) < 0.03


def test_crops_of_extreme_images_fall_back_to_the_largest_allowed_box() -> None:
    uniform = np.random.default_rng(0).random((2, 23))
    boxes = random_crops(ViewSettings(scale=[1.0, 1.0]), uniform, np.array([10, 1000]), np.array([1000, 10]), [8, 8])
    assert boxes.height.tolist() == [10, 13]
    assert boxes.width.tolist() == [13, 10]


def test_canvas_holds_the_whole_drawing_within_its_borders() -> None:
    images = torch.full((500, 1, 8, 8), 255, dtype=torch.uint8)
    view = View(ViewSettings(kind="canvas", scale=[2 / 3, 1.0], flip=0.0), [12, 12], "bilinear")
    drawn = view(images, np.arange(500), 0)[:, 0] == 255
    sides = drawn.any(1).sum(1)
    assert sorted(sides.unique().tolist()) == [8, 9, 10, 11, 12]
    assert torch.equal(sides, drawn.any(2).sum(1))
    first = drawn.any(1).int().argmax(1)
    assert sorted(first[sides == 8].unique().tolist()) == [0, 1, 2, 3, 4]


def test_centre_crop_keeps_the_middle_of_the_shorter_side() -> None:
    boxes = centre_crops(
        ViewSettings(kind="centre", centre_fraction=0.875),
        np.zeros((1, 1)),
        np.array([256]),
        np.array([320]),
        [224, 224],
    )
    assert (boxes.top[0], boxes.left[0], boxes.height[0], boxes.width[0]) == (16, 48, 224, 224)


def test_normalise_is_mean_and_deviation_of_pixels_in_zero_to_one() -> None:
    view = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    torch.testing.assert_close(normalise(view, [0.5], [0.25]).flatten(), torch.tensor([-2.0, 2.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": [0.5, 0.2]}, "smallest, largest"),
        ({"scale": [0.5, 1.2]}, "whole image"),
        ({"flip": 2}, "probability"),
    ],
)
def test_impossible_views_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewSettings(**changes)
