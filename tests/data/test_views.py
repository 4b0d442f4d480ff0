"""Views show the box that was drawn, and resampling is the usual one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shard_fixtures import smooth_images

from sslvit.data.resample import Boxes
from sslvit.data.views import Views, by_epoch, canvas_boxes, center_crops, random_crops, random_squares
from sslvit.settings.views import (
    AugmentSettings,
    CanvasSettings,
    CenterSettings,
    CropSettings,
    MultiCropSettings,
    SquareSettings,
)


def views_of(view: Views, images: torch.Tensor, samples: np.ndarray, epoch: int = 0) -> torch.Tensor:
    return view.crop_batch(images, samples, np.full(len(samples), epoch))[0]


@pytest.mark.parametrize("settings", [CropSettings(), CenterSettings(fraction=0.9), CanvasSettings(), SquareSettings()])
def test_one_image_at_a_time_and_all_at_once_agree(settings) -> None:
    view = Views(settings, [24, 24], "bicubic", seed=3)
    samples = np.arange(6)
    for height, width, bound in ((40, 56, 0.001), (140, 100, 0.2)):  # large ones: bytes are rounded after each axis
        images = smooth_images(6, height, width)
        drawn = view.sample_boxes(np.tile([height, width], (6, 1)), samples, np.full(6, 2))
        single = torch.stack([view.crop_image(image, drawn, i)[0] for i, image in enumerate(images)])
        difference = (views_of(view, images, samples, 2).float() - single.float()).abs()
        assert difference.mean() < bound
        assert difference.max() <= 1


def test_a_view_depends_on_seed_epoch_and_sample_and_not_on_its_neighbors() -> None:
    images, view = smooth_images(), Views(CropSettings(), [16, 16], "bicubic", seed=3)
    base = views_of(view, images, np.arange(6))
    assert torch.equal(views_of(view, images[[4, 1]], np.array([4, 1])), base[[4, 1]])
    assert not torch.equal(views_of(view, images, np.arange(6), 1), base)
    assert not torch.equal(views_of(view, images, np.arange(6) + 10), base)
    assert not torch.equal(views_of(Views(CropSettings(), [16, 16], "bicubic", seed=4), images, np.arange(6)), base)


def test_rows_of_several_epochs_draw_as_each_epoch_alone() -> None:
    images, view = smooth_images(), Views(CropSettings(), [16, 16], "bicubic", seed=3)
    epochs = np.array([0, 1, 0, 1, 1, 0])
    mixed = view.crop_batch(images, np.arange(6), epochs)[0]
    for epoch in (0, 1):
        assert torch.equal(mixed[epochs == epoch], views_of(view, images, np.arange(6), epoch)[epochs == epoch])
    assert by_epoch(lambda e, s: s * 10 + e, np.array([1, 2, 3]), np.array([4, 5, 4])).tolist() == [14, 25, 34]


@pytest.mark.parametrize(("scale", "ratio"), [([0.2, 1.0], [3 / 4, 4 / 3]), ([0.08, 0.5], [0.3, 1.5])])
def test_random_crops_are_distributed_as_torchvisions(scale: list[float], ratio: list[float]) -> None:
    """Sides and places, and what they have to do with each other: two samples of one distribution, each side of it."""
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    count, height, width = 6000, 400, 560
    uniform = np.random.default_rng(0).random((count, 23))
    ours = random_crops(scale, ratio, 0.5)(uniform, np.full(count, height), np.full(count, width), [16, 16])
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]).T

    def measures(top, left, tall, wide) -> list[np.ndarray]:
        bottom, right = height - top - tall, width - left - wide
        places = [
            top / (height - tall + 1),
            left / (width - wide + 1),
            bottom - top,
            right - left,
            top / 400 + left / 560,
        ]
        return [top, left, tall, wide, wide / tall, wide * tall, *places]

    for one, other in zip(measures(ours.top, ours.left, ours.height, ours.width), measures(*theirs), strict=True):
        assert ks_2samp(one, other).pvalue > 0.001
    assert abs(ours.is_mirrored.mean() - 0.5) < 0.02


def test_a_crop_is_the_first_of_ten_boxes_that_fits() -> None:
    """torchvision's rules, box by box, with the same uniform numbers; and the middle where none fits."""
    count, height, width = 3000, 40, 70
    uniform = np.random.default_rng(1).random((count, 23))
    scale, ratio = [0.6, 1.0], [0.5, 1.2]
    boxes = random_crops(scale, ratio, 0.3)(uniform, np.full(count, height), np.full(count, width), [8, 8])
    fallbacks = 0
    for i, row in enumerate(uniform):
        for trial in range(10):
            area = height * width * (scale[0] + row[trial] * (scale[1] - scale[0]))
            aspect = np.exp(np.log(ratio[0]) + row[10 + trial] * (np.log(ratio[1]) - np.log(ratio[0])))
            wide, tall = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if wide <= width and tall <= height:
                top, left = int(row[20] * (height - tall + 1)), int(row[21] * (width - wide + 1))
                break
        else:
            fallbacks += 1
            tall, wide = height, round(height * ratio[1])
            top, left = 0, (width - wide) // 2
        assert (boxes.top[i], boxes.left[i], boxes.height[i], boxes.width[i]) == (top, left, tall, wide)
        assert boxes.is_mirrored[i] == (row[22] < 0.3)
    assert 20 < fallbacks < 2500


def test_every_kind_of_view_obeys_its_settings() -> None:
    """Sides, proportions and mirroring of what each record of settings draws."""
    count = 3000
    sides, samples, epochs = np.tile([4000, 5000], (count, 1)), np.arange(count), np.zeros(count, int)

    def boxes_of_view(settings, number: int = 0) -> Boxes:
        return Views(settings, [64, 32], "bicubic", seed=5).sample_boxes(sides, samples, epochs)[number][1]

    drawn = {
        "crop": boxes_of_view(CropSettings(scale=[0.1, 0.2], ratio=[0.5, 0.8], flip=0.2)),
        "augment": boxes_of_view(AugmentSettings(scale=[0.1, 0.2], ratio=[0.5, 0.8], flip=0.2)),
    }
    multi = {"global_scale": [0.1, 0.2], "local_scale": [0.1, 0.2], "ratio": [0.5, 0.8], "flip": 0.2, "local_crops": 3}
    drawn |= {f"multi_crop {number}": boxes_of_view(MultiCropSettings(**multi), number) for number in range(5)}
    for name, boxes in drawn.items():
        shares, ratios = boxes.height * boxes.width / 20e6, boxes.width / boxes.height
        assert (shares.min(), shares.max()) == (pytest.approx(0.1, abs=1e-3), pytest.approx(0.2, abs=1e-3)), name
        assert shares.mean() == pytest.approx(0.15, abs=2e-3), name
        assert (ratios.min(), ratios.max()) == (pytest.approx(0.5, abs=3e-3), pytest.approx(0.8, abs=3e-3)), name
        assert np.log(ratios).mean() == pytest.approx(np.log(0.4) / 2, abs=0.01), name
        assert boxes.is_mirrored.mean() == pytest.approx(0.2, abs=0.025), name
        assert boxes.is_cut, name
    sizes = [size for size, _ in Views(MultiCropSettings(**multi, local_size=24), [64, 32], "bicubic").sample_boxes(
        sides[:1], samples[:1], epochs[:1])]  # fmt: skip
    assert sizes == [[64, 32], [64, 32], [24, 24], [24, 24], [24, 24]]
    canvas = boxes_of_view(CanvasSettings(side=[0.5, 0.75], flip=0.2))
    lengths = 5000 * 64 / canvas.height  # the longer side of the image, in pixels of the canvas
    assert (round(lengths.min()), round(lengths.max())) == (16, 24)  # of the shorter side of the canvas
    assert canvas.is_mirrored.mean() == pytest.approx(0.2, abs=0.025)
    square = boxes_of_view(SquareSettings(resize=[100, 100], crop=50, flip=0.2))
    assert set(square.height) == {5000 * 0.4}  # of twice the width: as high as wide were it 2 x 2
    assert set(square.width) == {1000}
    assert square.is_mirrored.mean() == pytest.approx(0.2, abs=0.025)


@pytest.mark.parametrize("other", ["seed", "epoch", "sample", "view"])
def test_boxes_of_another_key_have_nothing_to_do_with_these(other: str) -> None:
    """Not even a part of what is drawn: sides, place or mirroring."""
    settings, samples, sides = MultiCropSettings(local_crops=2), np.arange(2000), np.tile([900, 1000], (2000, 1))

    def columns(seed: int = 1, epoch: int = 4, first: int = 0, views: tuple = (0, 2)) -> list[np.ndarray]:
        drawn = Views(settings, [32, 32], "bicubic", seed).sample_boxes(sides, samples + first, np.full(2000, epoch))
        return [
            np.stack([b.height, b.width, b.top / (901 - b.height), b.left / (1001 - b.width), b.is_mirrored])
            for b in (drawn[view][1] for view in views)
        ]

    changed = {"seed": {"seed": 2}, "epoch": {"epoch": 5}, "sample": {"first": 7}, "view": {"views": (1, 3)}}[other]
    for one, two in zip(columns(), columns(**changed), strict=True):
        assert np.abs(np.corrcoef(one, two)[:5, 5:]).max() < 0.09
    assert all(np.array_equal(a, b) for a, b in zip(columns(), columns(), strict=True))


def test_narrow_and_wide_crops_are_drawn_alike_often() -> None:
    """The logarithm of width over height is uniform, also of crops that always fit."""
    uniform = np.random.default_rng(0).random((4000, 23))
    boxes = random_crops([0.05, 0.1], [1 / 4, 4.0], 0.5)(uniform, np.full(4000, 999), np.full(4000, 999), [16, 16])
    log_ratio = np.log(boxes.width / boxes.height)
    assert log_ratio.mean() == pytest.approx(0, abs=0.06)
    assert log_ratio.std() == pytest.approx(np.log(16) / 12**0.5, rel=0.05)


def test_crops_of_extreme_images_fall_back_to_the_largest_allowed_box() -> None:
    uniform = np.random.default_rng(0).random((2, 23))
    boxes = random_crops([1.0, 1.0], [3 / 4, 4 / 3], 0.5)(uniform, np.array([10, 1000]), np.array([1000, 10]), [8, 8])
    assert boxes.height.tolist() == [10, 13]
    assert boxes.width.tolist() == [13, 10]
    assert (boxes.top.tolist(), boxes.left.tolist()) == ([0, 493], [493, 0])  # in the middle


def test_canvas_holds_the_whole_drawing_within_its_borders() -> None:
    images = torch.full((500, 1, 8, 8), 255, dtype=torch.uint8)
    view = Views(CanvasSettings(side=[2 / 3, 1.0]), [12, 12], "bilinear")
    drawn = views_of(view, images, np.arange(500))[:, 0] == 255
    sides = drawn.any(1).sum(1)
    assert sorted(sides.unique().tolist()) == [8, 9, 10, 11, 12]
    assert torch.equal(sides, drawn.any(2).sum(1))
    first = drawn.any(1).int().argmax(1)
    assert sorted(first[sides == 8].unique().tolist()) == [0, 1, 2, 3, 4]


def test_canvas_sizes_are_whole_pixels_each_as_often_as_another() -> None:
    uniform = np.random.default_rng(0).random((5000, 4))
    boxes = canvas_boxes([2 / 3, 1.0], 0.5)(uniform, np.full(5000, 8), np.full(5000, 8), [12, 12])
    sizes, counts = np.unique(8 * 12 / boxes.height, return_counts=True)
    assert sizes.tolist() == pytest.approx([8, 9, 10, 11, 12])
    assert counts / 5000 == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("draw", [random_crops([0.2, 0.5], [3 / 4, 4 / 3], 0.5), random_squares([100, 200], 60, 0.5),
                                  canvas_boxes([0.3, 0.6], 0.5)])  # fmt: skip
def test_place_size_and_mirroring_say_nothing_of_each_other(draw) -> None:
    uniform = np.random.default_rng(0).random((4000, 23))
    boxes = draw(uniform, np.full(4000, 500), np.full(4000, 500), [400, 400])
    rooms = [500 - boxes.height, 500 - boxes.width]
    drawn = [boxes.top / rooms[0], boxes.left / rooms[1], boxes.height, boxes.is_mirrored]
    off_diagonal = np.corrcoef(np.stack(drawn)) - np.eye(4)
    assert np.abs(off_diagonal).max() < 0.06


def test_center_crop_keeps_the_middle_of_the_shorter_side() -> None:
    boxes = center_crops(0.875)(np.zeros((1, 1)), np.array([256]), np.array([320]), [224, 224])
    assert (boxes.top[0], boxes.left[0], boxes.height[0], boxes.width[0]) == (16, 48, 224, 224)


def test_a_square_is_the_crop_of_a_shorter_side_resized_to_each_length_as_often() -> None:
    """iGPT, section 4.1: 224 of a shorter side of 256 to 384."""
    count = 40_000
    settings = SquareSettings()
    uniform = np.random.default_rng(0).random((count, 23))
    draw = random_squares(settings.resize, settings.crop, settings.flip)
    boxes = draw(uniform, np.full(count, 20_000), np.full(count, 30_000), [32, 32])
    assert np.array_equal(boxes.height, boxes.width)
    lengths, counts = np.unique(np.round(224 * 20_000 / boxes.height), return_counts=True)
    assert lengths.tolist() == list(range(256, 385))
    assert counts / count == pytest.approx(1 / 129, abs=0.002)
    assert (boxes.height / 20_000).mean() == pytest.approx(np.mean(224 / np.arange(256, 385)), abs=0.001)  # 0.7097
    assert boxes.is_mirrored.mean() == pytest.approx(0.5, abs=0.01)
    for start, room in ((boxes.top, 20_000 - boxes.height), (boxes.left, 30_000 - boxes.width)):
        assert (start / room).mean() == pytest.approx(0.5, abs=0.01)
        assert (start / room).std() == pytest.approx(12**-0.5, abs=0.005)
        assert (start.min() >= 0, (start - room).max() <= 0) == (True, True)


@pytest.mark.parametrize("changes", [{"resize": [384, 256]}, {"resize": [256]}, {"crop": 257}, {"crop": 0}])
def test_impossible_squares_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"data.view.{next(iter(changes))}"):
        SquareSettings(**changes)


def test_multi_crop_gives_two_large_and_several_small_views() -> None:
    settings = MultiCropSettings(local_crops=4, local_size=12)
    view = Views(settings, [24, 24], "bicubic", seed=1)
    pictures = view.crop_batch(smooth_images(3), np.arange(3), np.zeros(3, int))
    assert [tuple(p.shape[1:]) for p in pictures] == [(3, 24, 24)] * 2 + [(3, 12, 12)] * 4
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[2], pictures[3])
    sides = np.tile([100, 120], (2000, 1))
    drawn = view.sample_boxes(sides, np.arange(2000), np.zeros(2000, int))
    shares = [(boxes.height * boxes.width / 12_000).mean() for _, boxes in drawn]
    assert 0.5 < shares[0] < 0.625  # 0.25 to 1, less those that do not fit
    assert shares[3] == pytest.approx(0.15, abs=0.01)  # 0.05 to 0.25


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (CropSettings, {"scale": [0.5, 0.2]}, "smallest, largest"),
        (CropSettings, {"scale": [0.5, 1.2]}, "whole image"),
        (CropSettings, {"flip": 2}, "probability"),
        (CenterSettings, {"fraction": 1.5}, "smallest, largest"),
        (MultiCropSettings, {"blur": [1.0]}, "first global, second global, local crops"),
        (MultiCropSettings, {"hue": 0.7}, "data.view.hue"),
        (MultiCropSettings, {"solarize": [0, 2, 0]}, "data.view.solarize"),
    ],
)
def test_impossible_views_are_refused(kind: type, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_a_crop_larger_than_the_image_draws_all_of_it_somewhere_on_black() -> None:
    settings = MultiCropSettings(
        global_scale=[2.25, 2.25], ratio=[1.0, 1.0], local_crops=1, local_size=4, local_scale=[0.25, 0.25], flip=0.0
    )
    views = Views(settings, [12, 12], "bilinear", seed=3)
    samples, epochs = np.arange(40), np.zeros(40, int)
    first, second, local = views.crop_batch(torch.full((40, 1, 8, 8), 200, dtype=torch.uint8), samples, epochs)
    for view in (first, second):
        assert (view == 200).sum((1, 2, 3)).tolist() == [64] * 40
        assert (view == 0).sum((1, 2, 3)).tolist() == [80] * 40
        tops = {int((picture[0] == 200).any(1).nonzero()[0]) for picture in view}
        assert tops == {0, 1, 2, 3, 4}
    assert (local == 200).all()  # a part of the image, as ever
    assert not torch.equal(first, second)
