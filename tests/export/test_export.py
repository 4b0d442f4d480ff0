"""What is exported opens in the library that it is for, with the same features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.export import export_encoder
from sslvit.export import timm as timm_format
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

SMALL = {"image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2}


def saved(folder: Path, **changes) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(**SMALL | changes))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_encoder(encoder, folder)
    return encoder.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "mean"},
        {"pooling": "mean", "fc_norm": True, "final_norm": False},
        {"class_token": False, "pooling": "mean", "prefix_positions": "none"},
        {"registers": 2, "prefix_positions": "all"},
        {"registers": 2, "prefix_positions": "none", "layer_scale": 0.1, "qk_norm": True},
        {"positions": "sincos_2d", "channels": 1, "image_size": [16, 24]},
        {"mask_token": True, "mlp_ratio": 2.0},
    ],
)
def test_timm_gives_the_features_of_the_checkpoint(tmp_path: Path, options: dict) -> None:
    encoder = saved(tmp_path / "e", **options)
    verdict = export_encoder(tmp_path / "e", tmp_path / "timm", "timm")
    assert verdict["passed"]
    assert len(verdict["shapes"]) == 2  # another size and batch too
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    height, width = encoder.settings.image_size
    images = torch.randn(3, encoder.settings.channels, height + 4, width)
    with torch.no_grad():
        torch.testing.assert_close(model(images), encoder.features(images), atol=1e-5, rtol=1e-5)
    config = model.pretrained_cfg
    assert config["input_size"] == (encoder.settings.channels, height, width)
    assert list(config["mean"]) == encoder.settings.mean
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"positions": "relative_bias"}, "positions: relative_bias"),
        ({"positions": "rotary_2d"}, "positions: rotary_2d"),
        ({"norm": "rms"}, "norm: rms"),
        ({"causal": True}, "causal: true"),
        ({"locality": True}, "locality: true"),
        ({"tokens": "conv_stem"}, "tokens: conv_stem"),
        ({"pooling": "attention"}, "pooling: attention"),
        ({"registers": 2}, "prefix_positions"),
        ({"mlp": "swiglu"}, "mlp: swiglu"),
        ({"interpolate_antialias": False}, "interpolate_antialias: false"),
        ({"feature_layer": 1}, "feature_layer: 1"),
    ],
)
def test_what_timm_cannot_hold_is_refused_with_the_reason(tmp_path: Path, options: dict, reason: str) -> None:
    saved(tmp_path / "e", **options)
    with pytest.raises(ValueError, match=reason):
        export_encoder(tmp_path / "e", tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


def test_safetensors_hold_every_encoder(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e", positions="rotary_2d", norm="rms", registers=2)
    assert export_encoder(tmp_path / "e", tmp_path / "out", "safetensors")["largest_difference"] == 0
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder(tmp_path / "out").features(images), encoder.features(images))


def test_a_wrong_export_fails_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "e")
    reopen = timm_format.reopen
    monkeypatch.setattr(timm_format, "reopen", lambda folder: lambda images: reopen(folder)(images) + 1e-3)
    with pytest.raises(RuntimeError, match="not written, because the reopened encoder differs by 1.0e-03"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    assert json.loads((tmp_path / "out.part" / "verdict.json").read_text())["passed"] is False
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(timm_format, "reopen", lambda folder: lambda images: reopen(folder)(images) * float("nan"))
    with pytest.raises(RuntimeError, match="differs by inf"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")


def test_exports_are_not_overwritten_silently(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "out", "safetensors")
    with pytest.raises(ValueError, match="already exists"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    export_encoder(tmp_path / "e", tmp_path / "out", "timm", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="leaves it alone"):
        export_encoder(tmp_path / "e", tmp_path / "mine", "timm", overwrite=True)
