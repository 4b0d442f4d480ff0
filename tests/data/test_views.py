"""Views show the box that was drawn, and resampling is the usual one."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from shard_fixtures import encoded, photograph

from sslvit.data import resample as resample_module
from sslvit.data.decode import BadImage, decode
from sslvit.data.loader import MemoryReader, center_view, make_batch, view_of_image
from sslvit.data.resample import Boxes, crop_and_resize, normalize, resample
from sslvit.data.views import Views, by_epoch, canvas_boxes, center_crops, random_crops, random_squares
from sslvit.settings import EncoderSettings
from sslvit.settings.views import (
    AugmentSettings,
    CanvasSettings,
    CenterSettings,
    CropSettings,
    MultiCropSettings,
    SquareSettings,
)


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


def test_resampling_tables_of_many_resolutions_are_kept_up_to_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = resample_module._make_table
    monkeypatch.setattr(resample_module, "_tables", {})
    monkeypatch.setattr(resample_module, "_make_table", lambda *key: made.append(key) or make(*key))
    images, boxes = smooth_images(1, 24, 24), boxes_of(3, 4, 12, 14)
    sizes = range(8, 20, 2)
    first = [resample(images, boxes, [size, size], "bicubic") for size in sizes]
    assert len(made) == 12  # rows and columns of each
    again = [resample(images, boxes, [size, size], "bicubic") for size in sizes]
    assert len(made) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    held = sum(tensor.nbytes for table in resample_module._tables.values() for tensor in table)
    monkeypatch.setattr(resample_module, "MAX_TABLES_BYTES", held)
    resample(images, boxes, [8, 8], "bicubic")
    resample(images, boxes, [20, 20], "bicubic")  # too much: those of 10 go, of 8 were just used
    assert len(made) == 14
    assert sum(tensor.nbytes for table in resample_module._tables.values() for tensor in table) <= held
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


def test_no_view_is_brighter_than_white_or_darker_than_black() -> None:
    image = torch.zeros(1, 200, 200)
    image[:, :, 100:] = 255.0  # beside an edge, bicubic weights overshoot
    for kind in (torch.float32, torch.uint8):
        view = crop_and_resize(image.to(kind), boxes_of(0, 0, 200, 200), [333, 333], "bicubic")
        assert (float(view.min()), float(view.max())) == (0, 255)
        assert view.dtype == kind


def test_center_crop_keeps_the_middle_of_the_shorter_side() -> None:
    boxes = center_crops(0.875)(np.zeros((1, 1)), np.array([256]), np.array([320]), [224, 224])
    assert (boxes.top[0], boxes.left[0], boxes.height[0], boxes.width[0]) == (16, 48, 224, 224)


def test_normalize_is_mean_and_deviation_of_pixels_in_zero_to_one() -> None:
    view = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    torch.testing.assert_close(normalize(view, [0.5], [0.25]).flatten(), torch.tensor([-2.0, 2.0]))
    images, mean, std = smooth_images(2), [0.1, 0.4, 0.7], [0.2, 0.5, 0.3]
    expected = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(normalize(images, mean, std).double(), expected, atol=1e-5, rtol=1e-5)


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
