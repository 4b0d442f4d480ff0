"""RandAugment is timm's: its operations, their strengths, and how they are drawn."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded, photograph

from sslvit.data.augment import NAMES, augment_image, sample_operations
from sslvit.data.loader import make_batch
from sslvit.data.reader import MemoryReader
from sslvit.data.views import Views
from sslvit.settings.views import AugmentSettings, CropSettings

TIMM = [  # the set of "inc1", in the order of NAMES
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
]  # fmt: skip
MEAN = [0.485, 0.456, 0.406]


def tensor_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("magnitude", [3.3, 9.0, 10.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_operation_is_timms(magnitude: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    monkeypatch.setattr(random, "random", lambda: 0.75 if sign < 0 else 0.25)  # timm negates above a half
    image = photograph(48, 64)
    settings = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    assert set(TIMM) == set(timm._RAND_INCREASING_TRANSFORMS)
    for number, name in enumerate(TIMM):
        ours = augment_image(tensor_of(image), np.array([[number, magnitude / 10, sign]]), MEAN, "bicubic")
        if (name, magnitude) == ("PosterizeIncreasing", 10.0):  # no bits are kept, which newer versions of PIL refuse
            assert not ours.any()
            continue
        theirs = timm.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)(image)
        assert torch.equal(ours, tensor_of(theirs)), NAMES[number]


def test_strengths_at_magnitude_nine_are_those_of_maes_fine_tuning() -> None:
    def changed(name: str, image: np.ndarray, sign: int = 1) -> np.ndarray:
        drawn = np.array([[NAMES.index(name), 0.9, sign]])
        return augment_image(torch.from_numpy(image), drawn, [0.0], "bilinear").numpy()

    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    assert set(changed("posterize", ramp).ravel()) == {0, 128}  # one bit
    assert changed("solarize", ramp).ravel()[[25, 26]].tolist() == [25, 229]  # from 26 on
    assert changed("solarize_add", ramp).ravel()[[0, 127, 128]].tolist() == [99, 226, 128]
    assert changed("brightness", ramp, -1).max() == round(255 * 0.19)
    points = np.zeros((1, 101, 101), np.uint8)
    points[0, 50, 90] = 255
    _, row, column = np.argwhere(changed("rotate", points) == changed("rotate", points).max())[0]
    assert np.degrees(np.arctan2(50 - row, column - 50)) == pytest.approx(27, abs=1)  # counter-clockwise
    bars = np.zeros((1, 100, 100), np.uint8)
    bars[:, :, 50:] = 255
    assert int((changed("translate_x", bars) == 0).all(1).sum()) == 50  # 40.5 black columns come, as many white ones go


def test_operations_are_drawn_with_the_stated_probability_and_noise() -> None:
    settings = AugmentSettings()
    drawn = sample_operations(settings, (0, 0), np.arange(40_000))
    assert drawn.shape == (40_000, 2, 3)
    happens = drawn[:, :, 0] >= 0
    assert happens.mean() == pytest.approx(0.5, abs=0.005)
    assert happens.all(1).mean() == pytest.approx(0.25, abs=0.01)  # each on its own
    counts = np.bincount(drawn[:, :, 0][happens].astype(int), minlength=15) / happens.sum()
    assert counts == pytest.approx(1 / 15, abs=0.006)
    both = drawn[happens.all(1), :, 0]
    assert (both[:, 0] == both[:, 1]).mean() == pytest.approx(1 / 15, abs=0.01)  # with replacement
    magnitude = 10 * drawn[:, :, 1]
    assert magnitude.max() == 10
    assert (magnitude == 10).mean() == pytest.approx(0.02275, abs=0.003)  # two deviations above the mean
    free = (
        10 * sample_operations(replace(settings, magnitude=5.0, magnitude_std=1.0), (0, 0), np.arange(40_000))[:, :, 1]
    )
    assert free.mean() == pytest.approx(5, abs=0.02)
    assert free.std() == pytest.approx(1, abs=0.02)
    third_moment, fourth_moment = (((free - 5) ** power).mean() for power in (3, 4))
    assert (third_moment, fourth_moment) == (pytest.approx(0, abs=0.05), pytest.approx(3, abs=0.1))  # normal
    assert drawn[:, :, 2].mean() == pytest.approx(0, abs=0.01)
    assert set(np.unique(drawn[:, :, 2])) == {-1, 1}
    table = np.concatenate([np.where(happens, drawn[:, :, 0], 7), happens, drawn[:, :, 1], drawn[:, :, 2]], 1)
    assert np.abs(np.corrcoef(table.T) - np.eye(8)).max() < 0.03


def test_every_setting_changes_what_is_drawn() -> None:
    settings, samples = AugmentSettings(), np.arange(500)
    first = sample_operations(settings, (0, 0), samples)
    assert sample_operations(replace(settings, operations=5), (0, 0), samples).shape == (500, 5, 3)
    assert (sample_operations(replace(settings, probability=1.0), (0, 0), samples)[:, :, 0] >= 0).all()
    assert (sample_operations(replace(settings, probability=0.0), (0, 0), samples)[:, :, 0] == -1).all()
    assert (
        sample_operations(replace(settings, magnitude=2.0, magnitude_std=0.0), (0, 0), samples)[:, :, 1] == 0.2
    ).all()
    assert np.array_equal(sample_operations(settings, (0, 0), samples[[7, 3]]), first[[7, 3]])
    for key in ((1, 0), (0, 1)):
        assert (sample_operations(settings, key, samples)[:, :, 1] != first[:, :, 1]).mean() > 0.9


def test_what_comes_in_from_outside_has_the_encoders_mean_color() -> None:
    image = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    moved = augment_image(image, np.array([[NAMES.index("translate_y"), 1.0, 1]]), MEAN, "bicubic")
    assert moved[:, -1, 20].tolist() == [124, 116, 104]
    settings = AugmentSettings(operations=1, probability=1.0, scale=[1.0, 1.0], ratio=[1.0, 1.0])
    reader = MemoryReader({n: (str(n), encoded(Image.new("RGB", (40, 40), "white"), "PNG")) for n in range(200)}, 3)
    samples = np.arange(200)
    views = Views(settings, [40, 40], "bicubic", seed=1, fill=[0.1, 0.2, 0.3])
    seen = make_batch(reader, views, samples, np.zeros(200, int)).views[0]
    shifted = (sample_operations(settings, (1, 0), samples)[:, 0, 0] >= NAMES.index("translate_x")).nonzero()[0]
    corners = seen[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert len(shifted) > 10
    for row in shifted:
        assert [26, 51, 76] in corners[row].T.tolist()


def test_an_image_is_augmented_by_seed_epoch_and_sample_alone() -> None:
    """And is the crop of the same key, changed."""
    contents = {n: (str(n), encoded(photograph(50, 60, n), "PNG")) for n in range(40)}

    def seen(seed: int, epoch: int, samples: np.ndarray, **settings) -> torch.Tensor:
        views = Views(AugmentSettings(**settings), [40, 40], "bicubic", seed)
        return make_batch(MemoryReader(contents, 3), views, samples, np.full(len(samples), epoch)).views[0]

    samples, before = np.arange(40), torch.get_rng_state()
    first = seen(0, 0, samples)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seen(0, 0, samples[[9, 2]]), first[[9, 2]])
    for key in ((1, 0), (0, 1)):
        plain = Views(CropSettings(scale=[0.08, 1.0]), [40, 40], "bicubic", key[0])
        crops = make_batch(MemoryReader(contents, 3), plain, samples, np.full(40, key[1])).views[0]
        other, drawn = seen(*key, samples), sample_operations(AugmentSettings(), key, samples)
        for row in samples:
            assert torch.equal(other[row], augment_image(crops[row], drawn[row], [0.5] * 3, "bicubic"))
    untouched = seen(0, 0, samples, operations=0)
    assert 0.1 < float((untouched == first).flatten(1).all(1).float().mean()) < 0.45  # a quarter draws no operation


def test_gray_images_are_augmented_too() -> None:
    image = tensor_of(photograph(20, 30))[:1]
    for number in range(len(NAMES)):
        changed = augment_image(image, np.array([[number, 0.9, 1]]), [0.5], "bilinear")
        assert changed.shape == image.shape
        assert torch.equal(changed, image) == (NAMES[number] == "color")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnitude": 20}, "data.view.magnitude: 20 must be in .0, 10."),
        ({"magnitude_std": -1}, "data.view.magnitude_std: -1 must be 0 or more"),
        ({"probability": 1.5}, "data.view.probability: 1.5 must be a probability"),
        ({"operations": -1}, "data.view.operations: -1 must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentSettings(**changes)
