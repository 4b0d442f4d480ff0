"""Colors change as in the papers' pipelines, batched and reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as V
from PIL import ImageFilter, ImageOps
from shard_fixtures import photograph

from sslvit.data.color import COLUMNS, ORDERS, color_jitter, sample_colors
from sslvit.data.views import Views, jitter_views
from sslvit.settings.views import MultiCropSettings


def pixels(count: int = 4, side: int = 48, low: int = 70, high: int = 180) -> torch.Tensor:
    """Photographs of middling brightness, so that few values are cut at 0 and 255."""
    images = [np.asarray(photograph(side, side, seed)) for seed in range(count)]
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (low + stack * (high - low) / 255).round().to(torch.uint8)


def draws_of(count: int, **values: float) -> torch.Tensor:
    """Nothing changes but what is named."""
    table = torch.zeros(count, len(COLUMNS))
    table[:, :3] = 1
    for name, value in values.items():
        table[:, COLUMNS.index(name)] = value
    return table


def by_torchvision(images: torch.Tensor, change) -> torch.Tensor:
    changed = [np.asarray(change(V.to_pil_image(image))) for image in images]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).float()


def test_no_change_is_none() -> None:
    images = pixels()
    assert torch.equal(color_jitter(images, draws_of(4)), images.float())


@pytest.mark.parametrize(
    ("name", "value", "change", "tolerance"),
    [
        ("brightness", 1.3, V.adjust_brightness, 1.0),
        ("brightness", 0.6, V.adjust_brightness, 1.0),
        ("contrast", 1.4, V.adjust_contrast, 1.5),
        ("contrast", 0.6, V.adjust_contrast, 1.5),
        ("saturation", 0.8, V.adjust_saturation, 1.5),
        ("saturation", 1.2, V.adjust_saturation, 1.5),
    ],
)
def test_one_step_is_pils(name: str, value: float, change, tolerance: float) -> None:
    images = pixels()
    ours = color_jitter(images, draws_of(4, **{name: value}))
    assert (ours - by_torchvision(images, lambda image: change(image, value))).abs().max() <= tolerance


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.05, 0.1, 0.3])
def test_hue_is_that_of_hsv(turn: float) -> None:
    images = pixels(low=0, high=255)
    ours = color_jitter(images, draws_of(4, hue=turn))
    exact = V.adjust_hue(images.double() / 255, turn) * 255
    assert (ours - exact).abs().max() <= 0.51
    theirs = by_torchvision(images, lambda image: V.adjust_hue(image, turn))
    assert (ours - theirs).abs().mean() < 2  # PIL keeps the hue in 8 bits
    gray = torch.full((1, 3, 4, 4), 99, dtype=torch.uint8)
    assert torch.equal(color_jitter(gray, draws_of(1, hue=turn)), gray.float())


def test_steps_in_their_drawn_order_are_torchvisions_chain() -> None:
    images = pixels(1)
    steps = [V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue]
    factors = [1.2, 0.6, 0.7, 0.1]
    results = []
    for number, order in enumerate(ORDERS):
        chained = images.double() / 255
        for kind in order:
            chained = steps[kind](chained, factors[kind])
        draws = draws_of(1, **dict(zip(COLUMNS, factors, strict=False)), order=number)
        results.append(color_jitter(images, draws))
        assert (results[-1] - chained * 255).abs().max() <= 0.6, order
    assert max((a - results[0]).abs().max() for a in results) > 1  # the order matters, a little


@pytest.mark.parametrize("without", [None, *COLUMNS[:4], "is_gray", "sigma", "is_solarized"])
def test_the_same_draws_give_nearly_pils_pixels(without: str | None) -> None:
    """The whole chain against PIL's, draw by draw; leaving any step out is noticed.

    The chain here is cut to 0..255 twice instead of after each step, and rounded once.
    """
    settings = MultiCropSettings(jitter=1.0, gray=0.3, blur=[0.5] * 3, solarize=[0.3] * 3, saturation=0.4)
    images = pixels(8, side=40, low=0, high=255)
    rows = torch.arange(96) % 8
    draws = torch.from_numpy(sample_colors(settings, 0, (0, 0), np.arange(96)))
    steps = [V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue]
    theirs = []
    for image, drawn in zip(images[rows], draws.tolist(), strict=True):
        picture = V.to_pil_image(image)
        for kind in ORDERS[int(drawn[4])]:
            picture = steps[kind](picture, drawn[kind])
        picture = V.to_grayscale(picture, 3) if drawn[5] else picture
        picture = picture.filter(ImageFilter.GaussianBlur(drawn[6])) if drawn[6] else picture
        theirs.append(torch.from_numpy(np.array(ImageOps.solarize(picture) if drawn[7] else picture)).permute(2, 0, 1))
    reference = torch.stack(theirs).float()
    if without:
        draws[:, COLUMNS.index(without)] = 1.0 if without in COLUMNS[:3] else 0.0
    difference = color_jitter(images[rows], draws) - reference
    error = difference.abs().mean()
    if without:
        assert error > 4.0
    else:
        assert error < 3.0
        assert abs(difference.mean()) < 1.5


def test_no_color_is_pils_gray() -> None:
    images = pixels()
    ours = color_jitter(images, draws_of(4, is_gray=1.0))
    assert (ours - by_torchvision(images, lambda image: V.to_grayscale(image, 3))).abs().max() <= 1


def test_solarization_inverts_bright_pixels() -> None:
    images = pixels(low=0, high=255)
    ours = color_jitter(images, draws_of(4, is_solarized=1.0))
    assert torch.equal(ours, by_torchvision(images, lambda image: ImageOps.solarize(image, 128)))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_a_gaussian(sigma: float) -> None:
    images = pixels()
    ours = color_jitter(images, draws_of(4, sigma=sigma))
    reference = V.gaussian_blur(images.float(), [2 * int(np.ceil(3 * sigma)) + 1] * 2, [sigma] * 2)
    assert (ours - reference).abs().max() <= 0.51
    theirs = by_torchvision(images, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))
    inside = (slice(None), slice(None), slice(6, -6), slice(6, -6))  # borders are mirrored here, repeated in PIL
    assert (ours - theirs)[inside].abs().mean() < 1
    impulse = torch.zeros(1, 1, 33, 33)
    impulse[..., 16, 16] = 255
    spread = color_jitter(impulse, draws_of(1, sigma=sigma))
    assert torch.equal(spread, spread.flip(2).flip(3))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (20, 33), (4, 30), (1, 3), (1, 1)])
def test_rows_blurred_together_as_on_a_gpu_are_as_one_by_one(height: int, width: int) -> None:
    from sslvit.data.color import _blur_by_matrices, _blur_in_place

    sigma = torch.tensor([0.2, 2.0, 0.0, 0.7])
    one_by_one = pixels().float()[:, :, :height, :width].contiguous()
    together = _blur_by_matrices(one_by_one, sigma, min(height, width) - 1)
    assert torch.equal(together[2], one_by_one[2])
    _blur_in_place(one_by_one, sigma)
    torch.testing.assert_close(together, one_by_one, atol=1e-3, rtol=0)


def test_rows_are_changed_each_on_its_own() -> None:
    settings, images = MultiCropSettings(), pixels(6)
    draws = torch.from_numpy(sample_colors(settings, 0, (3, 1), np.arange(6)))
    together = color_jitter(images, draws)
    for i in range(6):
        assert (color_jitter(images[i : i + 1], draws[i : i + 1]) - together[i]).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_numbers_of_channels_pass(channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 12, 12), dtype=torch.uint8)
    draws = torch.from_numpy(sample_colors(MultiCropSettings(), 1, (0, 0), np.arange(5)))
    changed = color_jitter(images, draws)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 255
    brighter = color_jitter(images, draws_of(5, brightness=1.1, saturation=0.1, hue=0.3, is_gray=1.0))
    assert (brighter - (images * 1.1).clamp(max=255)).abs().max() <= 0.51  # color is for three channels


def test_draws_have_the_stated_probabilities_and_ranges() -> None:
    """Caron et al. 2021, section 3.1, after BYOL: the released recipe's numbers."""
    settings, samples = MultiCropSettings(), np.arange(20_000)
    for view, (blur, solarize) in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)]):
        draws = dict(zip(COLUMNS, sample_colors(settings, view, (0, 0), samples).T, strict=True))
        is_changed = draws["brightness"] != 1
        assert is_changed.mean() == pytest.approx(0.8, abs=0.01)
        assert draws["is_gray"].mean() == pytest.approx(0.2, abs=0.01)
        assert (draws["sigma"] > 0).mean() == pytest.approx(blur, abs=0.011)
        assert draws["is_solarized"].mean() == pytest.approx(solarize, abs=0.01)
        for name, reach in [("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)]:
            low, high = draws[name].min(), draws[name].max()
            assert (low, high) == (pytest.approx(1 - reach, abs=0.01), pytest.approx(1 + reach, abs=0.01))
        assert np.abs(draws["hue"]).max() == pytest.approx(0.1, abs=0.001)
        assert draws["sigma"].max() == pytest.approx(2.0, abs=0.01)
        assert sorted(set(draws["order"].astype(int))) == list(range(24))
    again = sample_colors(settings, 1, (0, 0), samples[5:7])
    assert np.array_equal(again, sample_colors(settings, 1, (0, 0), samples)[5:7])
    assert not np.array_equal(again, sample_colors(settings, 0, (0, 0), samples[5:7]))
    for view, epoch in ((0, 0), (2, 0), (1, 1)):  # each column, also of views that share their probabilities
        other = sample_colors(settings, view, (0, epoch), samples)
        one = sample_colors(settings, 1, (0, 0), samples)
        assert np.abs(np.corrcoef(one[:, :5].T, other[:, :5].T)[:5, 5:]).max() < 0.04


@pytest.mark.parametrize("view", [0, 1, 2, 5])
def test_what_is_drawn_for_an_image_is_drawn_independently(view: int) -> None:
    """Whether colors change, how, in which order, gray, blur and solarization say nothing of each other."""
    settings = MultiCropSettings(jitter=0.7, gray=0.3, blur=[0.5] * 3, solarize=[0.4] * 3, saturation=0.4)
    draws = dict(zip(COLUMNS, sample_colors(settings, view, (0, 0), np.arange(30_000)).T.astype(float), strict=True))
    is_changed, is_blurred = draws["brightness"] != 1, draws["sigma"] > 0
    assert np.array_equal(is_changed, draws["hue"] != 0)
    for of in (is_changed & is_blurred, is_changed):  # strengths where there are some
        strengths = [draws[name][of] for name in COLUMNS[:6]] + [draws["is_solarized"][of]]
        strengths += [draws["sigma"][of]] if of is not is_changed else [is_blurred[of]]
        assert np.abs(np.corrcoef(strengths) - np.eye(8)).max() < 0.035
    whether = [is_changed, is_blurred, draws["is_gray"], draws["is_solarized"], draws["order"]]
    assert np.abs(np.corrcoef(whether) - np.eye(5)).max() < 0.03
    sigma, (low, high) = draws["sigma"][is_blurred], settings.blur_sigma
    for values, start, stop in [
        (sigma, low, high), (draws["hue"][is_changed], -0.1, 0.1), (draws["contrast"][is_changed], 0.6, 1.4),
        (draws["saturation"][is_changed], 0.6, 1.4), (draws["brightness"][is_changed], 0.6, 1.4),
    ]:  # fmt: skip
        counts, _ = np.histogram(values, 10, (start, stop))
        assert counts.sum() == len(values)
        assert counts / len(values) == pytest.approx(0.1, abs=0.012)  # uniform
    counts = np.bincount(draws["order"].astype(int), minlength=24) / 30_000
    assert counts == pytest.approx(1 / 24, abs=0.006)


@pytest.mark.parametrize("other", ["seed", "epoch", "sample", "view"])
def test_draws_of_another_key_have_nothing_to_do_with_these(other: str) -> None:
    settings = MultiCropSettings(jitter=0.5, gray=0.5, blur=[0.5] * 3, solarize=[0.5] * 3)

    def drawn(seed: int = 1, epoch: int = 2, first: int = 0, views: tuple[int, ...] = (0, 2, 3)) -> list[np.ndarray]:
        views_drawn = Views(settings, [8, 8], "bicubic", seed).sample_colors(
            np.arange(5000) + first, np.full(5000, epoch)
        )
        return [views_drawn[view].numpy().T for view in views]

    changed = {"seed": {"seed": 3}, "epoch": {"epoch": 3}, "sample": {"first": 1}, "view": {"views": (1, 4, 2)}}[other]
    for one, two in zip(drawn(), drawn(**changed), strict=True):
        assert np.abs(np.corrcoef(one, two)[:8, 8:]).max() < 0.06
    assert all(np.array_equal(a, b) for a, b in zip(drawn(), drawn(), strict=True))


def test_every_setting_of_the_colors_has_its_effect() -> None:
    samples = np.arange(4000)

    def drawn(view: int = 0, **changes) -> dict[str, np.ndarray]:
        return dict(zip(COLUMNS, sample_colors(MultiCropSettings(**changes), view, (0, 0), samples).T, strict=True))

    assert (drawn(jitter=0.0)["hue"] == 0).all()
    assert (drawn(jitter=1.0)["contrast"] != 1).mean() > 0.99
    for name in ("brightness", "contrast", "saturation"):
        assert np.abs(drawn(**{name: 0.9})[name] - 1).max() == pytest.approx(0.9, abs=0.01)
    assert np.abs(drawn(hue=0.4)["hue"]).max() == pytest.approx(0.4, abs=0.01)
    assert drawn(gray=0.7)["is_gray"].mean() == pytest.approx(0.7, abs=0.03)
    for place, views in enumerate([(0,), (1,), (2, 3, 7)]):
        for view in views:
            one_of_three = [float(i == place) for i in range(3)]
            assert (drawn(view, blur=one_of_three)["sigma"] > 0).all()
            assert drawn(view, solarize=one_of_three)["is_solarized"].all()
            assert not drawn(view, blur=[1 - p for p in one_of_three])["sigma"].any()
            assert not drawn(view, solarize=[1 - p for p in one_of_three])["is_solarized"].any()
    sigma = drawn(blur_sigma=[3.0, 4.0])["sigma"]
    assert (sigma.min(), sigma.max()) == (pytest.approx(3, abs=0.01), pytest.approx(4, abs=0.01))


def test_each_view_gets_its_own_draws() -> None:
    settings = MultiCropSettings(local_crops=1, blur=[1.0, 0.0, 0.0], solarize=[0.0, 0.0, 1.0], jitter=0.0, gray=0.0)
    draws = Views(settings, [48, 48], "bicubic").sample_colors(np.arange(3), np.zeros(3, int))
    first, second, local = jitter_views([pixels(3)] * 3, draws)
    assert torch.equal(second, pixels(3).float())
    assert torch.equal(local, torch.where(pixels(3) >= 128, 255 - pixels(3), pixels(3)).float())
    assert not torch.equal(first, second)
    assert first.diff(dim=3).abs().mean() < second.diff(dim=3).abs().mean()


def test_views_of_one_size_change_together_as_each_alone() -> None:
    images = pixels(3)
    small = images[:, :, ::2, ::2]
    draws = [torch.from_numpy(sample_colors(MultiCropSettings(), v, (1, 0), np.arange(3))) for v in range(3)]
    together = jitter_views([images, images, small], draws)
    for view, changed, own in zip([images, images, small], together, draws, strict=True):
        assert (color_jitter(view, own) - changed).abs().max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_changes_colors_as_the_cpu_does() -> None:
    images = pixels(8)
    draws = torch.from_numpy(sample_colors(MultiCropSettings(), 1, (1, 0), np.arange(8)))
    there = color_jitter(images.cuda(), draws.cuda()).cpu()
    here = color_jitter(images, draws)
    assert (there - here).abs().max() <= 1 or ((there - here).abs() > 1).float().mean() < 1e-3  # ties of solarization
