"""A frozen encoder sees images at another size than it was trained at, and everything beside it does, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sslvit
from sslvit.checkpoint import fingerprint, save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate.encoders import open_encoder
from sslvit.evaluate.sources import FrozenEncoder, RawPixels
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import ROTARY
from sslvit.settings.probe import read_size
from sslvit.tasks.start import begin_with

SMALL = {"image_size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
KINDS = ["none", "learned_1d", "learned_2d", "sincos_2d", "rotary_2d", "relative_bias"]


def make(**changes: object) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(**SMALL | changes))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 16 x 16 pixels in train/ and val/, and an encoder of 8 x 8."""
    folder = tmp_path_factory.mktemp("size")
    for seed, (name, count) in enumerate((("train", 24), ("val", 12))):
        pack(array_samples(pixels(count, seed), np.arange(count) % 2), folder / name, ["a", "b"])
    save_encoder(make(), folder / "encoder")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("positions", KINDS)
def test_features_are_those_of_the_encoder_at_that_size(here: Path, positions: str) -> None:
    encoder = make(pos_embed=positions)
    found = sslvit.embed(encoder, here / "val", size=16)
    stored = pixels(12, 1)[[int(Path(key).stem) for key in found.keys]]  # shards are shuffled
    images = (torch.from_numpy(stored).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.from_numpy(found.features), encoder.features(images))
    assert found.to_dict()["image_size"] == [16, 16]
    assert "resized to 16 x 16" in str(found)
    assert encoder.settings.image_size == [8, 8]
    smaller = sslvit.embed(encoder, here / "val")
    assert smaller.to_dict()["image_size"] == [8, 8]
    assert not np.allclose(smaller.features, found.features, atol=1e-3)


def test_the_table_says_the_size_and_baselines_see_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for kind in (FrozenEncoder, RawPixels):
        real = kind.features_at

        def watched(self: object, images: torch.Tensor, readouts: object, real=real) -> object:
            seen.add((type(self).__name__, tuple(images.shape[2:])))
            return real(self, images, readouts)

        monkeypatch.setattr(kind, "features_at", watched)
    table = sslvit.probe(here / "encoder", here / "train", here / "val", size="16x8", cache=None, neighbors=[3])
    assert seen == {("FrozenEncoder", (16, 8)), ("RawPixels", (16, 8))}
    assert list(table.rows) == ["raw pixels", "untrained encoder", "encoder"]
    assert table.about["image_size"] == [16, 8]
    assert "resized to 16 x 8 (bicubic)" in str(table)
    layers = sslvit.probe(here / "encoder", here / "train", here / "val", size=16, cache=None, layers="all")
    assert "resized to 16 x 16" in str(layers)


def test_cached_features_are_those_of_one_size(here: Path, tmp_path: Path) -> None:
    def features(size: int | None, cache: Path | None) -> object:
        more = {"neighbors": [1, 3], "cache": None if cache is None else str(cache)}
        return sslvit.knn(here / "encoder", here / "train", here / "val", size=size, **more).rows

    fresh = {size: features(size, None) for size in (None, 16, 12)}
    for _ in range(2):
        assert {size: features(size, tmp_path / "cache") for size in (None, 16, 12)} == fresh
    assert features(8, tmp_path / "cache") == fresh[None]
    assert fresh[16] != fresh[None]


def test_turning_encoders_of_two_sizes_are_not_taken_for_one_another() -> None:
    natively = make(pos_embed="rotary_2d", image_size=16)
    stretched = make(pos_embed="rotary_2d")
    assert fingerprint(open_encoder(stretched, size=16)) != fingerprint(natively)
    images = torch.randn(1, 3, 16, 16)
    assert not torch.allclose(stretched(images), natively(images), atol=1e-3)


@pytest.mark.parametrize(
    ("size", "expected"), [("16", [16, 16]), (16, [16, 16]), ("12x8", [12, 8]), ((8, 12), [8, 12]), ("12X8", [12, 8])]
)
def test_a_size_is_a_side_or_height_and_width(size: object, expected: list[int]) -> None:
    assert read_size(size, make().settings) == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (18, r"size=18: cannot be cut into patches of 4 pixels\. The nearest sides: 16 or 20\."),
        ("12x18", r"The nearest sides: 12 x 16 or 20\."), (3, "The nearest sides: 4"), ("0", "expected a side"),
        ("big", "size=.?big.?: expected a side in pixels, such as 64, or both, such as 48x64"),
        ([8, 8, 8], "expected a side"), (-8, "expected a side"), ("8.5", "expected a side"),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_is_refused_with_the_nearest(here: Path, size: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sslvit.knn(here / "encoder", here / "train", here / "val", size=size)


PIXELS = {"tokens": "pixel", "patch": 1, "class_token": False, "pooling": "mean", "image_size": 4, "causal": True}


def test_a_pixel_sequence_whose_positions_are_made_for_one_size_keeps_it() -> None:
    encoder = make(**PIXELS, pos_embed="learned_1d")
    assert open_encoder(encoder, size=4).settings.image_size == [4, 4]
    tied = r"--size 8: a pixel sequence with encoder.pos_embed learned_1d is tied to its size \(4x4\)"
    with pytest.raises(ValueError, match=tied):
        open_encoder(encoder, size=8)


@torch.no_grad()
@pytest.mark.parametrize("positions", ROTARY)
def test_a_pixel_sequence_of_any_size_has_the_features_of_training_at_that_size(here: Path, positions: str) -> None:
    encoder = make(**PIXELS, pos_embed=positions)
    found = sslvit.embed(encoder, here / "val", size=16)
    stored = pixels(12, 1)[[int(Path(key).stem) for key in found.keys]]
    images = (torch.from_numpy(stored).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.from_numpy(found.features), encoder.features(images))
    larger = ViTEncoder(replace(encoder.settings, image_size=[16, 16]))  # as fine-tuning at that size makes it
    begin_with(larger, encoder, "trained", besides=("image_size",))
    torch.testing.assert_close(larger.eval().features(images), encoder.features(images))


def test_every_command_takes_a_size(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder, val, labeled = str(here / "encoder"), str(here / "val"), ["--train", str(here / "train"), "--val"]
    assert main(["probe", encoder, *labeled, val, "--size", "16", "--cache", "none", "--neighbors", "3"]) == 0
    found = capsys.readouterr().out
    assert "resized to 16 x 16" in found
    assert "images are seen in 4 x 4 patches; positions are interpolated from 2 x 2" in found
    assert main(["knn", encoder, *labeled, val, "--size", "8x16", "--cache", "none", "--neighbors", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["about"]["image_size"] == [8, 16]
    assert main(["health", encoder, val, "--size", "16", "--batch", "4"]) == 0
    assert "resized to 16 x 16" in capsys.readouterr().out
    assert main(["embed", encoder, val, "--size", "16", "-o", str(tmp_path / "f.npz")]) == 0
    torch.testing.assert_close(
        np.load(tmp_path / "f.npz")["features"], sslvit.embed(here / "encoder", val, size=16).features
    )
    for what in ("neighbors", "attention"):
        words = ["show", what, encoder, val, "--size", "16", "--images", "2", "-o", str(tmp_path / f"{what}.png")]
        assert main(words) == 0
    assert main(["show", "attention", encoder, val, "--size", "9", "-o", str(tmp_path / "x.png")]) == 1
    assert "--size 9: cannot be cut into patches of 4 pixels. The nearest sides: 8 or 12." in capsys.readouterr().err


def test_a_bench_scores_frozen_encoders_at_a_size(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = {
        "data": {"toy": {"train": str(here / "train"), "val": str(here / "val")}},
        "encoders": {"A": str(here / "encoder")}, "columns": {"kNN": {"kind": "knn", "neighbors": 3}},
        "baselines": ["pixels", "untrained"], "device": "cpu",
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    scores = {}
    for size in (None, 16):
        more = [] if size is None else ["--size", str(size)]
        out = str(tmp_path / f"{size}")
        assert main(["bench", str(tmp_path / "toy.yaml"), "--out", out, *more, "--json"]) == 0
        table = json.loads(capsys.readouterr().out)
        scores[size] = {cell["row"]: cell["mean"] for cell in table["cells"]}
        knn = sslvit.knn(here / "encoder", here / "train", here / "val", neighbors=[3], size=size, cache=None)
        capsys.readouterr()
        assert list(scores[size].values()) == [row["kNN, k = 3"] for row in knn.rows.values()]
        assert all(f"resized to {size or 8} x {size or 8}" in cell["about"]["view"] for cell in table["cells"])
    assert scores[None] != scores[16]
    assert main(["bench", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "no"), "--size", "9"]) == 1
    assert "--size 9: cannot be cut" in capsys.readouterr().err
