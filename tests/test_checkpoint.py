"""Encoders go into folders and come back; files that are something else are refused with the reason."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from golden_fixtures import Golden
from safetensors.torch import save_file

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.compatibility import settings_difference
from sslvit.models import ViTEncoder, preset
from sslvit.settings import EncoderSettings
from sslvit.weight_files import read_torch_file

SMALL = {"image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2}


def small(**changes) -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(EncoderSettings(**SMALL | changes)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pos_embed": "rotary_2d", "norm": "rms", "mlp": "swiglu", "registers": 3, "layer_scale": 0.1},
        {"tokens": "pixel", "patch": 1, "image_size": 6, "class_token": False, "pooling": "mean", "causal": True,
         "prefix_positions": "none", "feature_layer": 1, "feature_norm": "next", "channels": 1,
         "palette": [[-1.0], [-0.123456789], [0.7]]},
    ],
)  # fmt: skip
def test_a_saved_encoder_comes_back_to_the_last_bit(tmp_path: Path, options: dict) -> None:
    encoder = small(**options)
    save_encoder(encoder, tmp_path / "e", {"step": 3})
    with pytest.raises(ValueError, match="already stores its settings; remove what is for released files .palette"):
        load_encoder(tmp_path / "e", palette="uniform")
    again = load_encoder(tmp_path / "e")
    assert again.settings == encoder.settings
    assert not again.training
    images = torch.randn(2, encoder.settings.channels, *encoder.settings.image_size)
    assert torch.equal(again.features(images), encoder.features(images))
    assert json.loads((tmp_path / "e" / "encoder.json").read_text())["provenance"] == {"step": 3}


class _Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["hostile.pth", "hostile.ckpt", "run/checkpoints/last.ckpt"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, name: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file, trace = tmp_path / name, tmp_path / "trace"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {"x": torch.zeros(1)}, "extra": _Hostile(str(trace))}, file)
    with pytest.raises(ValueError, match="refused, because it holds objects besides tensors"):
        load_encoder(tmp_path / "run" if name.startswith("run") else file)
    assert not trace.exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "empty.pth")
    save_file({"layer1.conv.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    for name, message in [
        ("text.pth", "text.pth: not a file of weights .it begins with hello."),
        ("cut.safetensors", "not a readable checkpoint"),
        ("list.pth", "holds a list"),
        ("empty.pth", "holds no weights"),
        ("resnet.safetensors", r"no known layout has these weights \(layer1.conv.weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_encoder(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_encoder(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no encoder"):
        load_encoder(tmp_path / "folder")


def test_a_file_of_another_kind_is_called_that(tmp_path: Path) -> None:
    for content in ("# sslvit\n\nSelf-supervised pretraining\n", "version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "README.md").write_text(content)
        with pytest.raises(ValueError, match="not a file of weights .it begins with .*Give a run folder") as found:
            read_torch_file(tmp_path / "README.md")
        assert content[:7] in str(found.value)
        assert "\n" not in str(found.value)


def test_another_architecture_is_refused_with_what_differs(tmp_path: Path) -> None:
    save_encoder(small(), tmp_path)
    about = json.loads((tmp_path / "encoder.json").read_text())
    about["encoder"] |= {"depth": 3, "patch": 8}
    (tmp_path / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"another architecture.*missing: blocks.2.*other shape: patch_embed.proj.weight"
    ):
        load_encoder(tmp_path)
    about["encoder"]["depht"] = 2
    (tmp_path / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="depht: no such setting. Did you mean depth"):
        load_encoder(tmp_path)
    about["format"] = 99
    (tmp_path / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="format 99"):
        load_encoder(tmp_path)


def test_differences_that_leave_the_weights_alone_do_not_count() -> None:
    base = preset("vit_tiny")
    assert settings_difference(base, preset("vit_tiny", drop_path=0.1, activation_checkpointing=True)) == []
    assert settings_difference(base, preset("vit_tiny", pos_embed="sincos_2d", pooling="mean")) == []
    assert settings_difference(base, preset("vit_tiny", pos_embed="rotary_2d")) == ["pos_embed: a table and rotary_2d"]
    assert settings_difference(base, preset("vit_small")) == ["width: 192 and 384", "heads: 3 and 6"]


@pytest.mark.parametrize(
    ("fixture", "layout", "wrap"),
    [
        ("mae_model", "mae", lambda w: {"model": w, "epoch": 3}),
        ("mae_encoder_features_gap", "timm", lambda w: {"model": w}),
        (
            "dino_vit",
            "dino",
            lambda w: {
                "args": argparse.Namespace(lr=1),
                "student": {},
                "teacher": {f"module.backbone.{k}": v for k, v in w.items()},
            },
        ),
        ("dinov2_vit_reg4", "dinov2", lambda w: w),
        ("timm_vit_token", "timm", lambda w: w),
        ("igpt_model", "openai_igpt", lambda w: w),
    ],
)
def test_released_files_are_recognized(tmp_path: Path, fixture: str, layout: str, wrap) -> None:
    weights = {key: value.clone() for key, value in Golden(fixture).under("param/").items()}
    torch.save(wrap(weights), tmp_path / "released.pth")
    recognized = load_encoder(
        tmp_path / "released.pth", heads=3 if weights.get("norm.bias", torch.zeros(36)).shape[0] % 3 == 0 else 4
    )
    told = load_encoder(tmp_path / "released.pth", layout=layout, heads=recognized.settings.heads)
    assert recognized.settings == told.settings


def test_heads_are_assumed_aloud_or_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = ViTEncoder(EncoderSettings(image_size=16, patch=4, width=128, depth=1, heads=2))
    save_file(encoder.state_dict(), tmp_path / "vit.safetensors")
    assert load_encoder(tmp_path / "vit.safetensors").settings.heads == 2
    assert "assumed 2 (64 channels each)" in capsys.readouterr().out
    save_file(small().state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="Give heads="):
        load_encoder(tmp_path / "narrow.safetensors")


def test_a_table_that_fits_two_grids_asks_for_the_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(small(image_size=[16, 24]).state_dict(), tmp_path / "wide.pth")  # 1 + 4 x 6 rows, or 5 x 5
    wide = load_encoder(tmp_path / "wide.pth", heads=2, image_size=[16, 24]).settings
    assert (wide.image_size, wide.prefix_positions) == ([16, 24], "class")
    assert load_encoder(tmp_path / "wide.pth", heads=2).settings.prefix_positions == "none"
    assert "5 x 5 patches without a row for the class token" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no grid of"):
        load_encoder(tmp_path / "wide.pth", heads=2, image_size=[16, 32])


def test_student_or_teacher_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a run and of DINO's released full checkpoint; the teacher unless the student is asked for."""
    golden = Golden("dino_train_steps")
    networks = {name: golden.under(f"param/{name}.") for name in ("student", "teacher")}
    networks["student"] = {f"module.{key.removeprefix('module.')}": value for key, value in networks["student"].items()}
    torch.save(networks | {"epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "full.pth")
    for name, prefix in (("student", "module.backbone."), ("teacher", "backbone.")):
        encoder = load_encoder(tmp_path / "full.pth", heads=3, weights=name)
        assert torch.equal(encoder.cls_token, networks[name][f"{prefix}cls_token"])
        assert "none missing; not the encoder's: head (" in capsys.readouterr().out
    assert torch.equal(
        load_encoder(tmp_path / "full.pth", heads=3).cls_token, networks["teacher"]["backbone.cls_token"]
    )
    torch.save({"model": networks["teacher"]}, tmp_path / "one.pth")
    with pytest.raises(ValueError, match="one.pth: holds no student .its entries: model"):
        load_encoder(tmp_path / "one.pth", heads=3, weights="student")


@pytest.mark.parametrize(
    ("fixture", "layout", "more", "account"),
    [
        ("mae_model", "mae", {}, "not the encoder's: decoder ("),
        ("mae_encoder_features_cls", "mae", {}, "not the encoder's: head (2)"),
        ("timm_vit_avg", "timm", {}, "not the encoder's: head (2)"),
        ("dinov2_vit_reg4", "dinov2", {}, "loaded, none missing\n"),
        ("igpt_model", "openai_igpt", {"transformer.h.0.attn.bias": torch.ones(1)}, "ignored: 1 (h.0.attn.bias)"),
        ("igpt_model", "openai_igpt", {"score.weight": torch.ones(1)}, "head (1), score (1)"),
    ],
)
def test_every_tensor_of_a_file_is_accounted_for(
    tmp_path: Path, fixture: str, layout: str, more: dict, account: str, capsys: pytest.CaptureFixture
) -> None:
    weights = {key: value.clone() for key, value in Golden(fixture).under("param/").items()} | more
    torch.save(weights, tmp_path / "released.pth")
    load_encoder(tmp_path / "released.pth", layout=layout, heads=4 if layout in ("mae", "openai_igpt") else 3)
    said = capsys.readouterr().out
    assert account in said
    assert f"{len(weights)} tensors: " in said


@pytest.mark.parametrize("layout", ["mae", "dino", "dinov2", "timm"])
def test_a_tensor_that_nobody_knows_is_named(tmp_path: Path, layout: str) -> None:
    fixture = {"mae": "mae_model", "dino": "dino_vit", "dinov2": "dinov2_vit_reg4", "timm": "timm_vit_token"}[layout]
    weights = {key: value.clone() for key, value in Golden(fixture).under("param/").items()}
    torch.save(weights | {"blocks.0.adapter.weight": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="unknown: blocks.0.adapter.weight"):
        load_encoder(tmp_path / "odd.pth", layout=layout, heads=4 if layout == "mae" else 3)
