"""Measures without labels, against closed forms and against each other; and pictures of what attention does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.data.plan import evenly_spaced
from sslvit.evaluate import health
from sslvit.evaluate.attention import attention_measures, receptive_field
from sslvit.evaluate.health import alignment, alpha_of_spectrum, feature_std, label_free, rankme, uniformity
from sslvit.evaluate.label_free import measure_health
from sslvit.evaluate.sources import LabeledSet
from sslvit.models import ViTEncoder
from sslvit.reports.show import middle_patch
from sslvit.settings import EncoderSettings, ProbeSettings


def make(**changes) -> ViTEncoder:
    torch.manual_seed(0)
    small = {"image_size": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2}
    encoder = ViTEncoder(EncoderSettings(**small | changes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_decay_of_a_known_spectrum(alpha: float) -> None:
    source = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, 101, dtype=torch.float64) ** (-alpha / 2)
    basis = torch.linalg.qr(torch.randn(400, 100, generator=source, dtype=torch.float64))[0]
    features = (basis - basis.mean(0)) * deviations
    assert alpha_of_spectrum(features.float()) == pytest.approx(alpha, abs=0.1)
    assert math.isnan(alpha_of_spectrum(torch.zeros(10, 4)))
    assert math.isnan(alpha_of_spectrum(torch.full((10, 4), float("nan"))))


def test_the_first_eigenvalues_do_not_decide_the_decay() -> None:
    """The tenth part of them, at most ten: a few strong directions say little of how the rest falls off."""
    source = torch.Generator().manual_seed(0)
    for count, ignored in ((40, 4), (300, 10)):
        values = torch.randn(600, count, generator=source, dtype=torch.float64)
        basis = torch.linalg.qr(values - values.mean(0))[0]
        deviations = torch.arange(1, count + 1, dtype=torch.float64) ** -0.5
        deviations[:ignored] *= 20
        assert alpha_of_spectrum(basis * deviations) == pytest.approx(1, abs=1e-3)


def test_the_images_that_are_measured_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 10).tolist() == [0, 1, 2]
    monkeypatch.setattr(health, "MAX_PAIRED", 10)
    features = torch.randn(25, 6)
    features[:10] = 1.0  # alike at the beginning, as where a set is sorted by class
    assert uniformity(features) == pytest.approx(uniformity(features[::3]))
    assert uniformity(features) < -0.1


def test_alignment_and_uniformity_by_hand() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    other = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert alignment(one, one) == 0
    assert alignment(one, other) == pytest.approx((2 + 0) / 2)
    assert uniformity(one) == pytest.approx(-4)  # one pair at squared distance 2
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert set(label_free(torch.randn(3, 4))) <= {"feature_std", "rankme", "alpha", "uniformity"}


def test_even_attention_looks_as_far_as_patches_lie_apart() -> None:
    encoder = make()
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    distance, entropy = attention_measures(encoder, torch.randn(2, 3, 16, 16))
    centers = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2) * 4.0
    apart = np.linalg.norm(centers[:, None] - centers[None], axis=2).mean()
    torch.testing.assert_close(distance, torch.full((2, 2), apart, dtype=distance.dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy, torch.full((2, 2), math.log(17)), atol=1e-5, rtol=0)


def test_distances_are_those_of_the_encoders_own_attention() -> None:
    encoder, images = make(), torch.randn(3, 3, 16, 16)
    distance, entropy = attention_measures(encoder, images)
    with torch.no_grad():
        (block,) = encoder.intermediates(images, [2], attention=True)
    weights = block.attention
    assert entropy[1, 0] == pytest.approx(float(-(weights * weights.log()).sum(3)[:, 0].mean()), rel=1e-4)
    patches = weights[:, 1, 1:, 1:] / weights[:, 1, 1:, 1:].sum(2, keepdim=True)
    expected = 0.0
    for i in range(16):
        for j in range(16):
            expected += float(patches[:, i, j].mean()) * 4 * math.dist(divmod(i, 4), divmod(j, 4)) / 16
    assert distance[1, 1] == pytest.approx(expected, rel=1e-4)


def test_a_receptive_field_is_where_gradients_come_from() -> None:
    convolution = torch.nn.Conv2d(3, 2, 3, padding=1)
    field = receptive_field(lambda images: convolution(images)[:, :, 4, 5], torch.randn(4, 3, 9, 9))
    reached = torch.zeros(9, 9, dtype=torch.bool)
    reached[3:6, 4:7] = True
    assert torch.equal(field > 0, reached)
    assert field.max() == 1
    encoder = make()
    assert (receptive_field(middle_patch(encoder, 1), torch.randn(2, 3, 16, 16)) > 0).all()  # attention reaches all
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.fixture
def here(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3)).astype(np.uint8)
    pack(array_samples(images), tmp_path / "plain")
    save_encoder(make(), tmp_path / "encoder")
    return tmp_path


def test_health_needs_no_labels(here: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["health", str(here / "encoder"), str(here / "plain"), "--images", "12"]
    assert main([*words, "-o", str(here / "health.json")]) == 0
    found = json.loads((here / "health.json").read_text())
    assert (found["about"]["images"], found["about"]["data"]) == (12, str(here / "plain"))
    rows = found["rows"]
    assert list(rows) == ["raw pixels", "untrained encoder", "encoder"]
    assert 0 < rows["encoder"]["alignment"] < 4
    assert 1 <= rows["encoder"]["rankme"] <= 12
    assert "on 12 images" in capsys.readouterr().out
    assert main(["health", str(here / "encoder"), str(here / "plain"), "--images", "1"]) == 1


def test_the_pictures_of_an_encoder(here: Path, capsys: pytest.CaptureFixture) -> None:
    for what in ("attention", "distance", "field"):
        out = here / f"{what}.png"
        assert main(["show", what, str(here / "encoder"), str(here / "plain"), "--images", "3", "-o", str(out)]) == 0
        assert out.stat().st_size > 5_000
    numbers = json.loads((here / "distance.json").read_text())
    assert np.array(numbers["trained"]["distance_pixels"]).shape == (2, 2)
    capsys.readouterr()
    assert main(["show", "field", str(here / "encoder"), str(here / "plain"), "-o", str(here / "field.png")]) == 1
    assert "already exists" in capsys.readouterr().err
    pixels = make(tokens="pixel", patch=1, image_size=4, class_token=False, pooling="mean", causal=True)
    save_encoder(pixels, here / "pixels")
    assert main(["show", "field", str(here / "pixels"), str(here / "plain"), "-o", str(here / "f.png")]) == 1
    assert "no gradient reaches the pixels" in capsys.readouterr().err
    assert main(["show", "distance", str(here / "pixels"), str(here / "plain"), "-o", str(here / "d.png")]) == 0


def test_effective_rank_and_deviation_are_their_formulas() -> None:
    """RankMe (Garrido et al. 2023, equation 1) from numpy, and the deviation of features of one length."""
    source = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=source) * torch.logspace(0, -2, 6) + 0.3
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    array = features.double().numpy() * np.linspace(0.1, 9, 50)[:, None]  # the lengths must not count
    unit = array / np.sqrt((array**2).mean(1, keepdims=True))
    assert feature_std(torch.from_numpy(array).float()) == pytest.approx(unit.std(0).mean(), rel=1e-4)
    found = label_free(features)
    assert (found["rankme"], found["feature_std"]) == (rankme(features), feature_std(features))


def test_the_crops_that_should_agree_are_drawn_by_seed(here: Path) -> None:
    data = LabeledSet(load_index(here / "plain"), 3)
    one, same, other = (
        measure_health({"encoder": make()}, data, ProbeSettings("", "", seed=seed))["encoder"] for seed in (0, 0, 1)
    )
    assert one == same
    assert other["alignment"] != one["alignment"]
    assert other["rankme"] == one["rankme"]  # of center views
