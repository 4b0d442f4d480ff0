"""Encoders of timm by name and of transformers by folder give the features that they give there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.export import export_encoder
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def give_random_weights(monkeypatch: pytest.MonkeyPatch) -> list:
    """timm's models without a download."""
    made, create = [], timm.create_model

    def without_download(name: str, pretrained: bool, **options):
        assert pretrained
        torch.manual_seed(0)
        made.append(create(name, pretrained=False, **options).eval())
        for parameter in made[-1].parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", without_download)
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224.dino", "vit_wee_patch16_reg1_gap_256"])
def test_timm_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = give_random_weights(monkeypatch)
    encoder = load_encoder(f"timm:{name}")
    images = torch.randn(2, 3, *encoder.settings.image_size)
    torch.testing.assert_close(encoder(images), made[0].forward_features(images), atol=1e-5, rtol=1e-4)
    assert encoder.settings.mean == list(made[0].pretrained_cfg["mean"])


def test_models_of_timm_that_are_no_plain_vit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"timm:vit_tinny.*Did you mean|timm:vit_tinny"):
        load_encoder("timm:vit_tinny")
    give_random_weights(monkeypatch)
    with pytest.raises(ValueError, match="timm:resnet18: a ResNet, and only plain vision transformers can be probed"):
        load_encoder("timm:resnet18")
    with pytest.raises(ValueError, match="timm:vit_base_patch32_clip_224.openai: (has parts|computes otherwise)"):
        load_encoder("timm:vit_base_patch32_clip_224.openai")


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_an_export_to_timm_is_an_encoder_again(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = EncoderSettings(image_size=8, channels=1, patch=4, width=16, depth=1, heads=2, pooling=pooling)
    encoder = ViTEncoder(settings).eval()
    save_encoder(encoder, tmp_path / "encoder")
    export_encoder(tmp_path / "encoder", tmp_path / "timm", "timm")
    again = load_encoder(tmp_path / "timm")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again.features(images), encoder.features(images), atol=1e-5, rtol=1e-4)
    assert again.settings.mean == encoder.settings.mean


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def folder_of(kind: str, tmp_path: Path, **options):
    config = getattr(transformers, f"{kind}Config")(**SHAPE | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    preprocessing = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViT", {"intermediate_size": 128, "layer_norm_eps": 1e-12}),
        ("ViT", {"intermediate_size": 128, "qkv_bias": False}),
        ("Dinov2", {"mlp_ratio": 4}),
        ("Dinov2", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegisters", {"num_register_tokens": 4}),
    ],
)
def test_transformers_by_folder(kind: str, options: dict, tmp_path: Path) -> None:
    model = folder_of(kind, tmp_path, **options)
    encoder = load_encoder(tmp_path)
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(encoder(images), model(images).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert encoder.settings.mean == [0.4, 0.5, 0.6]
    assert encoder.settings.interpolation == "bilinear"
    if kind != "ViT":
        large = torch.randn(1, 3, 56, 42)
        torch.testing.assert_close(encoder(large), model(large).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"a transformers folder of another model \(bert\)"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: damaged"):
        load_encoder(tmp_path)


@torch.no_grad()
def test_folders_with_a_pickled_file_or_several(tmp_path: Path) -> None:
    model = folder_of("ViT", tmp_path / "one", intermediate_size=128)
    state = load_file(tmp_path / "one" / "model.safetensors")
    images = torch.randn(2, 3, 28, 28)
    expected = model(images).last_hidden_state
    for name in ("pickled", "parts"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "preprocessor_config.json"):
            shutil.copy(tmp_path / "one" / file, tmp_path / name / file)
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    keys, files = sorted(state), ("model-1.safetensors", "model-2.safetensors")
    for number, file in enumerate(files):
        save_file({key: state[key] for key in keys[number::2]}, tmp_path / "parts" / file)
    index = {"weight_map": {key: files[number % 2] for number, key in enumerate(keys)}}
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("pickled", "parts"):
        torch.testing.assert_close(load_encoder(tmp_path / name)(images), expected, atol=1e-5, rtol=1e-4)
    (tmp_path / "pickled" / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pickled: no weights there"):
        load_encoder(tmp_path / "pickled")


@pytest.mark.parametrize(
    ("prepared", "note"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, "to 256 and the middle 224 are"),
        ({"size": 256, "crop_size": 224}, "to 256 and the middle 224 are"),
        ({"size": {"height": 28, "width": 28}}, "there images are squashed to 28 x 28; here the largest"),
        ({"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}, None),
        ({"size": {"shortest_edge": 28}, "crop_size": 14, "do_center_crop": False}, None),
        ({}, None),
    ],
)
def test_a_processor_that_cuts_images_otherwise_is_said(
    tmp_path: Path, prepared: dict, note: str | None, capsys: pytest.CaptureFixture
) -> None:
    folder_of("Dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    load_encoder(tmp_path)
    said = capsys.readouterr().out
    assert note in said if note else "preprocessing" not in said


def test_a_crop_of_timms_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    give_random_weights(monkeypatch)
    load_encoder("timm:vit_tiny_patch16_224")
    assert "preprocessing: timm evaluates the middle 90.0% of each side" in capsys.readouterr().out
