"""What each format holds, what it cannot hold, and that the libraries give the same numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from export_fixtures import SMALL, saved, shaken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import save_file

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.data.loader import view_of_image
from sslvit.data.resample import normalize
from sslvit.exporters import EXPORTERS, export_encoder
from sslvit.exporters import timm as timm_format
from sslvit.exporters.exported import Exported, with_outputs
from sslvit.exporters.verify import (
    check_inputs,
    compare,
    compare_preprocessing,
    compare_weights,
    with_unit_scale,
)
from sslvit.models import ViTEncoder, preset
from sslvit.settings import EncoderSettings

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

IGPT = {"tokens": "pixel", "patch": 1, "image_size": 8, "class_token": False, "pooling": "mean", "causal": True,
        "norm": "rms", "mlp": "quick_gelu"}  # fmt: skip
DINOV3 = {"pos_embed": "rotary_2d_normalized", "registers": 2, "layer_scale": 0.1, "key_bias": False}

CLIP = {"pre_norm": True, "patch_bias": False, "mlp": "quick_gelu", "norm_eps": 1e-5, "interpolate_antialias": False}
SIGLIP = {"class_token": False, "pooling": "attention", "pool_mlp": True, "mlp": "gelu_tanh",
          "interpolate_antialias": False}  # fmt: skip


# ---- timm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "mean"},
        {"pooling": "mean", "fc_norm": True, "final_norm": False},
        {"class_token": False, "pooling": "mean", "prefix_positions": "none"},
        {"registers": 2, "prefix_positions": "all"},
        {"registers": 2, "prefix_positions": "class"},
        {"registers": 2, "prefix_positions": "none", "layer_scale": 0.1, "qk_norm": True},
        {"pos_embed": "sincos_2d", "channels": 1, "image_size": [16, 24]},
        {"pos_embed": "learned_2d"},
        {"pos_embed": "none", "bias": False},
        {"mask_token": True, "mlp_ratio": 2.0},
        {"width": 22, "mlp_ratio": 15 / 11},  # its product with the width is 29.999... in floats
        {"final_norm": False},
        {"layer_scale": 0.0},  # where timm would leave it out
    ],
)
def test_timm_gives_the_features_of_the_checkpoint(tmp_path: Path, options: dict) -> None:
    encoder = saved(tmp_path / "e", **options)
    verdict = export_encoder(tmp_path / "e", tmp_path / "timm", "timm")
    assert verdict["image_sizes"] == "any"
    assert len(verdict["shapes"]) == 3  # another batch, another size
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    height, width = encoder.settings.image_size
    images = torch.randn(3, encoder.settings.channels, height + 4, width)
    with torch.no_grad():
        torch.testing.assert_close(model(images), encoder.features(images), atol=1e-5, rtol=1e-5)
    config = model.pretrained_cfg
    assert tuple(config["input_size"]) == (encoder.settings.channels, height, width)
    assert list(config["mean"]) == encoder.settings.mean
    assert config["interpolation"] == "bicubic"


def test_timm_opens_the_weights_by_path_too(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "timm", "timm")
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    file = str(tmp_path / "timm" / "model.safetensors")
    images = torch.randn(2, 3, 16, 16)
    for given_file in ({"checkpoint_path": file}, {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}):
        model = timm.create_model("vit_base_patch16_224", **given_file, **shape).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), encoder.features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pos_embed": "relative_bias"}, "pos_embed: relative_bias"),
        ({"pos_embed": "rotary_2d"}, "pos_embed: rotary_2d"),
        ({"norm": "rms"}, "norm: rms"),
        ({"causal": True}, "causal: true"),
        ({"locality_self_attention": True}, "locality_self_attention: true"),
        ({"tokens": "conv_stem"}, "tokens: conv_stem"),
        ({"pooling": "attention"}, "pooling: attention"),
        ({"mlp": "swiglu"}, "mlp: swiglu"),
        ({"norm_eps": 1e-5}, "norm_eps: 1e-05"),
        ({"fc_norm": True}, "both final_norm and fc_norm"),
        ({"feature_layer": 1}, "feature_layer: 1"),
        ({"pre_norm": True, "patch_bias": False}, "pre_norm: true; patch_bias: false"),
    ],
)
def test_what_timm_cannot_hold_is_refused_with_the_reason(tmp_path: Path, options: dict, reason: str) -> None:
    saved(tmp_path / "e", **options)
    with pytest.raises(ValueError, match=reason):
        export_encoder(tmp_path / "e", tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


# ---- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "model", "sizes"),
    [
        ({"interpolate_antialias": False}, "ViTModel", "any"),
        ({"pooling": "mean"}, "ViTModel", "fixed"),  # its positions are stretched without antialiasing
        ({"image_size": [16, 24], "prefix_positions": "none", "channels": 1}, "ViTModel", "fixed"),
        ({"pos_embed": "learned_2d", "mask_token": True}, "ViTModel", "fixed"),
        ({"layer_scale": 0.1, "interpolate_antialias": False}, "Dinov2Model", "any"),
        ({"mlp": "swiglu", "pooling": "mean"}, "Dinov2Model", "fixed"),
        ({"registers": 2, "layer_scale": 0.1, "mask_token": True}, "Dinov2WithRegistersModel", "any"),
        ({"registers": 2, "prefix_positions": "all", "pooling": "mean"}, "Dinov2WithRegistersModel", "any"),
        ({"registers": 3, "interpolate_offset": 0.1}, "Dinov2WithRegistersModel", "fixed"),
        ({"class_token": False, "pooling": "mean", "interpolate_antialias": False}, "IJepaModel", "any"),
        ({"registers": 1, "prefix_positions": "all", "interpolate_antialias": False}, "DeiTModel", "any"),
        (CLIP, "CLIPVisionModel", "any"),
        (CLIP | {"mlp": "gelu", "pooling": "mean", "mask_token": True}, "CLIPVisionModel", "any"),
        (SIGLIP, "SiglipVisionModel", "any"),
        (SIGLIP | {"pooling": "mean", "pool_mlp": False}, "SiglipVisionModel", "any"),
        (IGPT, "ImageGPTModel", "fixed"),
        (IGPT | {"feature_layer": 1, "feature_norm": "next", "bias": False}, "ImageGPTModel", "fixed"),
        (IGPT | {"palette": [[-1.0, -1.0, -1.0], [0.0, 0.5, 0.0], [1.0, 1.0, 1.0]]}, "ImageGPTModel", "fixed"),
    ],
)
def test_transformers_gives_the_features_of_the_checkpoint(tmp_path: Path, options, model: str, sizes: str) -> None:
    encoder = saved(tmp_path / "e", **options)
    for outputs in ("features", "tokens"):
        verdict = export_encoder(tmp_path / "e", tmp_path / outputs, "transformers", outputs)
        assert verdict["image_sizes"] == sizes
    opened = transformers.AutoModel.from_pretrained(tmp_path / "tokens")
    assert type(opened).__name__ == model
    again = load_encoder(tmp_path / "features", **({"pooling": "mean"} if encoder.settings.pooling == "mean" else {}))
    pixels = torch.rand(2, encoder.settings.channels, *encoder.settings.image_size)
    mine, theirs = (normalize(pixels * 255, one.settings.mean, one.settings.std) for one in (encoder, again))
    torch.testing.assert_close(again(theirs), encoder(mine), atol=1e-5, rtol=1e-5)
    assert again.settings.mean == encoder.settings.mean or model == "ImageGPTModel"  # palettes are in [-1, 1]


@pytest.mark.parametrize("pooling", [{"fc_norm": True}, {"pooling": "attention"}], ids=str)
def test_tokens_need_nothing_of_the_pooling(tmp_path: Path, pooling: dict) -> None:
    for name, options in (("vit", {}), ("imagegpt", IGPT)):
        saved(tmp_path / name, **options | pooling)
        assert export_encoder(tmp_path / name, tmp_path / f"{name}_tokens", "transformers", "tokens")["passed"]


def test_a_processor_of_imagegpt_gives_the_colors_that_the_encoder_sees(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e", **IGPT)
    export_encoder(tmp_path / "e", tmp_path / "out", "transformers")
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    found = processor(pixels, return_tensors="pt")["input_ids"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.settings.mean, encoder.settings.std))
    assert torch.equal(found, encoder.patch_embed.quantize(((pixels / 255 - mean) / std)[None]))


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "mean"}, {"registers": 2}, {"layer_scale": 0.5, "pooling": "mean"},
     {"class_token": False, "pooling": "mean"}],
)  # fmt: skip
def test_transformers_classifies(tmp_path: Path, options: dict) -> None:
    saved(tmp_path / "run" / "encoder", **options)
    head = {"head.weight": torch.randn(2, 32), "head.bias": torch.randn(2)}
    save_file(head, tmp_path / "run" / "encoder" / "head.safetensors", {"classes": '["cat", "dog"]'})
    assert export_encoder(tmp_path / "run", tmp_path / "out", "transformers", "logits")["passed"]
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "vit cannot hold this encoder .qk_norm: true"),
        ({"pos_embed": "none"}, "pos_embed: none"),
        ({"bias": False}, "bias: false"),
        ({"final_norm": False}, "final_norm: false"),
        ({"fc_norm": True}, "fc_norm: true"),
        ({"class_token": False, "pooling": "mean", "registers": 1}, "class_token: false"),
        (SIGLIP | {"pool_mlp": False}, "siglip_vision_model cannot hold this encoder .pooling: attention"),
        (CLIP | {"patch_bias": True}, "clip_vision_model cannot hold this encoder .patch_bias: true"),
        (CLIP | {"registers": 1}, "clip_vision_model cannot hold this encoder .registers: 1"),
        ({"class_token": False, "pooling": "mean", "qk_norm": True}, "ijepa cannot hold this encoder .qk_norm: true"),
        ({"registers": 2, "image_size": [16, 24]}, r"image_size: \[16, 24\], which is no square"),
        ({"layer_scale": 0.1, "mlp_ratio": 2.5}, "mlp_ratio: 2.5, which is no whole number"),
        (IGPT | {"causal": False}, "causal: false"),
        (IGPT | {"channels": 1}, "channels: 1"),
        (IGPT | {"fc_norm": True}, "imagegpt cannot hold this encoder .fc_norm: true"),
        (IGPT | {"pooling": "attention"}, "imagegpt cannot hold this encoder .pooling: attention"),
        (IGPT | {"pre_norm": True}, "imagegpt cannot hold this encoder .pre_norm: true"),
        (IGPT | {"image_size": [4, 8]}, r"imagegpt cannot hold this encoder .image_size: \[4, 8\], which is no square"),
    ],
)
def test_what_transformers_cannot_hold_is_refused_with_the_reason(tmp_path: Path, options: dict, reason: str) -> None:
    saved(tmp_path / "e", **options)
    with pytest.raises(ValueError, match=reason):
        export_encoder(tmp_path / "e", tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_preprocessing_of_a_photograph_is_that_of_the_card(tmp_path: Path, kind: str, interpolation: str) -> None:
    """A verdict over an image that must be cropped and resized fails where a library does it otherwise."""
    for name, size in (("square", 16), ("tall", [24, 16])):
        saved(tmp_path / name, image_size=size, interpolation=interpolation)
        export_encoder(tmp_path / name, tmp_path / f"{name}-{kind}", kind)
        verdict = json.loads((tmp_path / f"{name}-{kind}" / "verdict.json").read_text())
        assert verdict["preprocessing"]["mean_difference"] < 4e-3
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[interpolation]
    encoder = load_encoder(tmp_path / "square")
    encoder.settings.interpolation = other
    module = EXPORTERS[kind]
    prepare = module.preprocessing(tmp_path / f"square-{kind}", Exported(encoder))
    assert not compare_preprocessing(Exported(encoder), prepare)["passed"]


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_other_libraries_put_nothing_among_our_output(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "e")
    assert main(["export", str(tmp_path / "e"), str(tmp_path / "out"), "--format", kind]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(tmp_path / "out"),
        "out",
        f"encoder in {tmp_path}/again",
    ]
    assert not [record for record in caplog.records if record.name.split(".")[0] in ("transformers", "timm")]
    assert transformers.utils.logging.is_progress_bar_enabled()  # others' settings are as they were


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 448, 518])  # 518: the crop of a photograph 3 : 2 begins at half a pixel
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_released_image_sizes_pass_the_comparison(tmp_path: Path, kind: str, size: int, interpolation: str) -> None:
    """Those of DINOv2; the verdict is over what the libraries make of images that must be cropped and resized."""
    shape = {"image_size": size, "patch": 14, "width": 8, "depth": 1, "heads": 1}
    saved(tmp_path / "e", **shape, interpolation=interpolation, interpolate_offset=0.1, layer_scale=1.0)
    prepared = export_encoder(tmp_path / "e", tmp_path / "out", kind)["preprocessing"]
    assert prepared["mean_difference"] < 4e-3  # rounded twice there, once here
    assert prepared["largest_difference"] < 1e-6


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_failed_verdict_names_the_measure_that_failed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "e")
    prepare = EXPORTERS[kind].preprocessing

    def shifted(*args):
        return lambda image: prepare(*args)(image if image.size == (16, 16) else ImageOps.mirror(image))

    monkeypatch.setattr(EXPORTERS[kind], "preprocessing", shifted)
    with pytest.raises(RuntimeError, match="cropped and resized differs on average by 1.[0-9]e.00 .allowed 5e-03"):
        export_encoder(tmp_path / "e", tmp_path / "out", kind)
    monkeypatch.setattr(EXPORTERS[kind], "preprocessing", lambda *args: lambda image: prepare(*args)(image) + 2e-5)
    with pytest.raises(RuntimeError, match="its preprocessing differs by 2..e-05 .allowed 1e-05"):
        export_encoder(tmp_path / "e", tmp_path / "out", kind)


def test_a_transformers_processor_takes_pictures_of_all_kinds(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "out", "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    for mode in ("L", "RGBA", "P", "RGB"):
        found = processor(Image.new(mode, (40, 30)), return_tensors="pt")["pixel_values"]
        assert found.shape == (1, 3, 16, 16), mode


# ---- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("torch", {"registers": 2}, "dynamic"),
        pytest.param("torch", {"pos_embed": "relative_bias"}, "dynamic", marks=pytest.mark.slow),
        pytest.param("torch", DINOV3 | {"mlp": "swiglu"}, "dynamic", marks=pytest.mark.slow),
        pytest.param("onnx", DINOV3, "dynamic", marks=pytest.mark.slow),
        ("torch", IGPT, None),
        ("onnx", {"registers": 2, "layer_scale": 0.1}, "dynamic"),
        pytest.param("onnx", {"interpolate_offset": 0.1}, None, marks=pytest.mark.slow),
        ("onnx", IGPT, None),
    ],
)
def test_programs_give_the_features_of_the_checkpoint(tmp_path: Path, kind: str, options: dict, size) -> None:
    saved(tmp_path / "e", **options)
    verdict = export_encoder(tmp_path / "e", tmp_path / "out", kind, size=size)
    assert verdict["passed"]
    assert verdict["image_sizes"] == ("any" if size else "fixed")
    assert [shape[0] for shape in verdict["shapes"]] == ([2, 3, 1] if size else [2, 3])


def test_an_onnx_file_says_its_opset_and_how_images_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "e", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation="bilinear", crop_fraction=0.75)
    monkeypatch.setattr(EXPORTERS["onnx"], "MAX_FILE_BYTES", 1000)
    verdict = export_encoder(tmp_path / "e", tmp_path / "out", "onnx")
    assert verdict["files"] == ["README.md", "card.json", "model.onnx", "model.onnx.data", "verdict.json"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert (about["size"], about["mean"]) == ([16, 16], [0.1, 0.2, 0.3])
    assert (about["crop_mode"], about["crop_fraction"]) == ("center", 0.75)
    assert about["crop"].startswith("the middle 75 % (of each side) of the largest centered box")
    assert (about["interpolation"], about["std"]) == ("bilinear", [0.4, 0.5, 0.6])
    opsets = {one.domain: one.version for one in onnx.load(tmp_path / "out" / "model.onnx").opset_import}
    assert opsets[""] == 18


@pytest.mark.parametrize(
    ("kind", "outputs", "options"),
    [
        ("timm", "features", {}), ("timm", "tokens", {}), ("timm", "logits", {}), ("torch", "features", {}),
        ("transformers", "features", {"interpolate_antialias": False}), ("transformers", "tokens", {"registers": 2}),
        ("transformers", "features", {"image_size": [16, 24], "pooling": "mean"}), ("transformers", "logits", {}),
        ("transformers", "features", IGPT | {"feature_layer": 1, "feature_norm": "next"}),
        ("onnx", "logits", {}), ("safetensors", "logits", {}), ("safetensors", "features", {}),
    ],
)  # fmt: skip
def test_the_snippet_of_a_card_runs_in_its_folder_and_gives_what_the_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, outputs: str, options: dict
) -> None:
    saved(tmp_path / "e", **options)
    head = {"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    save_file(head, tmp_path / "e" / "head.safetensors", {"classes": '["a", "b", "c"]'})
    export_encoder(tmp_path / "e", tmp_path / "out", kind, outputs)
    exported = with_outputs(load_encoder(tmp_path / "e"), tmp_path / "e", outputs)
    size = (*exported.settings.image_size, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))
    image.save(tmp_path / "out" / "photo.jpg", format="PNG")
    view = view_of_image((tmp_path / "out" / "photo.jpg").read_bytes(), exported.settings)
    images = normalize(view[None], exported.settings.mean, exported.settings.std)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    left: dict = {}
    exec(compile(snippet, "README.md", "exec"), left)
    torch.testing.assert_close(torch.as_tensor(left[outputs]), exported(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("kind", ["timm", "transformers", "safetensors"])
def test_the_snippet_of_a_card_runs_for_images_that_are_no_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, channels: int
) -> None:
    saved(tmp_path / "e", channels=channels, mean=[0.5] * channels, std=[0.25] * channels)
    export_encoder(tmp_path / "e", tmp_path / "out", kind)
    Image.new("RGB", (20, 20)).save(tmp_path / "out" / "photo.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    left: dict = {}
    exec(compile(snippet, "README.md", "exec"), left)
    assert left["features"].shape == (1, 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("outputs", ["tokens", "features", "logits"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"tokens": "conv_stem"}, {"tokens": "shifted_patch"}, {"pos_embed": "rotary_2d"},
        DINOV3, {"pos_embed": "learned_2d"},
        {"pos_embed": "none", "norm": "rms"}, {"pos_embed": "sincos_1d", "mlp": "swiglu"},
        {"locality_self_attention": True},
        {"qk_norm": True, "bias": False}, {"causal": True, "pooling": "mean"}, {"pooling": "attention"},
        {"feature_layer": 1}, {"image_size": [16, 24], "channels": 1}, {"tokens": "hybrid",
        "hybrid_backbone": "resnet18"},
    ],
)  # fmt: skip
def test_every_option_becomes_a_program(tmp_path: Path, kind: str, outputs: str, options: dict) -> None:
    saved(tmp_path / "e", **options)
    save_file({"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}, tmp_path / "e" / "head.safetensors")
    assert export_encoder(tmp_path / "e", tmp_path / "out", kind, outputs, "dynamic")["passed"]


# ---- tensors one by one ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("outputs", ["tokens", "logits"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "torch" else kind for kind in EXPORTERS]
)
def test_a_change_of_any_tensor_behind_a_faint_layer_scale_is_seen(tmp_path: Path, kind: str, outputs: str) -> None:
    """Outputs change by less than their tolerance when a block does whose branches are multiplied by 1e-5."""
    torch.manual_seed(0)
    encoder = shaken(ViTEncoder(EncoderSettings(**SMALL | {"layer_scale": 1.0, "registers": 2})))
    for key, value in encoder.named_parameters():
        if key.endswith("gamma"):
            value.copy_(1e-5 * torch.rand_like(value))
    head = shaken(torch.nn.Linear(32, 3)) if outputs == "logits" else None
    exported, writer = Exported(encoder, outputs, head), EXPORTERS[kind]
    writer.write(exported, tmp_path, True)
    images = check_inputs(encoder.settings, True)

    def is_caught() -> bool:
        if not compare_weights(*writer.weights(tmp_path, exported))["passed"]:
            return True
        if not compare(exported, reopened, images)["passed"]:
            return True
        return kind == "onnx" and not compare(with_unit_scale(exported), louder, images)["passed"]

    reopened = writer.reopen(tmp_path, exported)
    louder = writer.reopen_with_unit_scale(tmp_path, exported) if kind == "onnx" else None
    assert not is_caught()
    for key, value in exported.named_parameters():
        kept = value.clone()
        value.copy_(value.roll(1, 0) if len(value) > 1 else -value)
        assert is_caught(), key
        value.copy_(kept)
    assert not is_caught()


def test_an_export_whose_blocks_are_others_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = saved(tmp_path / "e", layer_scale=1.0)
    with torch.no_grad():
        for key, value in encoder.named_parameters():
            if key.endswith("gamma"):
                value.fill_(1e-6)
    save_encoder(encoder, tmp_path / "e")
    for kind in ("timm", "transformers", "safetensors", "torch"):
        write = EXPORTERS[kind].write

        def otherwise(exported: Exported, folder: Path, is_fixed: bool, write=write) -> None:
            other = copy.deepcopy(exported)
            other.encoder.blocks[1].attn.qkv.weight.data[3, 5] += 1e-3
            write(other, folder, is_fixed)

        monkeypatch.setattr(EXPORTERS[kind], "write", otherwise)
        with pytest.raises(RuntimeError, match="among its weights .*blocks.1.attn.qkv.weight differ"):
            export_encoder(tmp_path / "e", tmp_path / kind, kind)
        verdict = json.loads((tmp_path / f"{kind}.part" / "verdict.json").read_text())
        assert verdict["largest_difference"] < verdict["tolerance"]


def test_a_tensor_that_only_one_side_has_is_a_difference() -> None:
    one = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert compare_weights(one, dict(one)) == {"compared": 2, "differing": [], "passed": True}
    for other in ({"a": torch.zeros(2)}, one | {"c": torch.zeros(1)}, one | {"b": torch.ones(2, 1)},
                  one | {"b": torch.ones(2, dtype=torch.float64)}):  # fmt: skip
        assert not compare_weights(one, other)["passed"]
        assert not compare_weights(other, one)["passed"]


def test_an_onnx_file_whose_blocks_are_others_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = saved(tmp_path / "e", layer_scale=1.0, depth=1)
    for branch in (encoder.blocks[0].ls1, encoder.blocks[0].ls2):
        branch.gamma.data.fill_(1e-6)
    save_encoder(encoder, tmp_path / "e")
    write = EXPORTERS["onnx"].write

    def otherwise(exported: Exported, folder: Path, is_fixed: bool) -> None:
        other = copy.deepcopy(exported)
        other.encoder.blocks[0].mlp.fc1.weight.data.mul_(1.01)
        write(other, folder, is_fixed)

    monkeypatch.setattr(EXPORTERS["onnx"], "write", otherwise)
    with pytest.raises(RuntimeError, match="with every LayerScale set to one it differs by"):
        export_encoder(tmp_path / "e", tmp_path / "out", "onnx")
    verdict = json.loads((tmp_path / "out.part" / "verdict.json").read_text())
    assert verdict["largest_difference"] < verdict["tolerance"]


# ---- crops ----------------------------------------------------------------------------------------------------------


def evaluated(image: Image.Image, encoder: EncoderSettings) -> torch.Tensor:
    """By PIL: the middle of the largest centered box, or of the whole image."""
    (height, width), share = encoder.image_size, encoder.crop_fraction
    if encoder.crop_mode == "squash":
        tall, wide = share * image.height, share * image.width
    else:
        scale = min(image.height / height, image.width / width) * share
        tall, wide = scale * height, scale * width
    top, left = (image.height - tall) / 2, (image.width - wide) / 2
    small = image.resize(
        (width, height), Image.Resampling[encoder.interpolation.upper()], (left, top, left + wide, top + tall)
    )
    pixels = torch.from_numpy(np.array(small, np.float32) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    return (pixels - mean) / std


@pytest.mark.parametrize(
    ("options", "pct", "size"),
    [
        ({"crop_fraction": 0.875}, 0.875, {"shortest_edge": 64}),
        ({"crop_fraction": 0.5}, 0.5, {"shortest_edge": 112}),
        ({"crop_fraction": 0.9}, 56 / 62, {"shortest_edge": 62}),  # 62.2, of which the middle begins at a whole pixel
        ({"crop_fraction": 1.0}, 1.0, {"shortest_edge": 56}),
        ({"crop_mode": "squash"}, 1.0, {"height": 56, "width": 56}),
        ({"crop_mode": "squash", "crop_fraction": 0.875}, 0.875, {"height": 64, "width": 64}),
        ({"crop_mode": "squash", "image_size": [28, 56]}, 1.0, {"height": 28, "width": 56}),
        ({"crop_fraction": 0.875, "image_size": [28, 56]}, 0.875, None),
    ],
)  # fmt: skip
def test_exports_show_what_evaluation_shows(tmp_path: Path, options: dict, pct: float, size: dict | None) -> None:
    encoder = saved(tmp_path / "e", **{"image_size": 56, "patch": 14} | options).settings
    held = dataclasses.replace(encoder, crop_fraction=pct)
    rows, columns = np.mgrid[0:160, 0:320] / 40
    waves = [127 + 90 * np.sin(rows + columns * (1 + channel)) for channel in range(3)]
    image = Image.fromarray(np.stack(waves, 2).astype(np.uint8))
    for kind in ("timm", "transformers"):
        export_encoder(tmp_path / "e", tmp_path / kind, kind)
        prepared = EXPORTERS[kind].preprocessing(tmp_path / kind, Exported(load_encoder(tmp_path / "e")))(image)
        assert float((prepared - evaluated(image, held)).abs().mean()) < 0.02, kind
        card = json.loads((tmp_path / kind / "card.json").read_text())["preprocessing"]
        assert (card["crop_mode"], card["crop_fraction"]) == (encoder.crop_mode, pytest.approx(pct))
        again = load_encoder(tmp_path / kind).settings
        if size is not None or kind == "timm":
            assert (again.crop_mode, again.crop_fraction) == (encoder.crop_mode, pytest.approx(pct)), kind
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert config["crop_mode"] == encoder.crop_mode
    assert [math.floor(side / config["crop_pct"]) for side in encoder.image_size] == [
        round(side / pct) for side in encoder.image_size
    ]
    processor = json.loads((tmp_path / "transformers" / "preprocessor_config.json").read_text())
    if size is None:
        assert processor["do_resize"] is False  # the card fits the image before
    else:
        assert {key: value for key, value in processor["size"].items() if value} == size
        assert ("crop_size" in processor and processor["do_center_crop"]) == ((56 not in size.values() and pct < 1) or
                                                                            size == {"shortest_edge": 56})  # fmt: skip
    export_encoder(tmp_path / "e", tmp_path / "plain", "safetensors")
    again = load_encoder(tmp_path / "plain").settings
    assert (again.crop_mode, again.crop_fraction) == (encoder.crop_mode, encoder.crop_fraction)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_fraction": 0.5, "image_size": [28, 56]}, {"crop_fraction": 0.875}, {"crop_mode": "squash"},
        IGPT | {"crop_fraction": 0.5}, IGPT | {"crop_mode": "squash", "crop_fraction": 0.5},
        IGPT | {"crop_mode": "squash", "interpolation": "bilinear"},
    ],
)  # fmt: skip
def test_the_snippet_of_a_card_cuts_what_evaluation_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    saved(tmp_path / "e", **{"image_size": 56, "patch": 14} | options)
    export_encoder(tmp_path / "e", tmp_path / "out", "transformers")
    rows, columns = np.mgrid[0:160, 0:320] / 40
    waves = [127 + 90 * np.sin(rows + columns * (1 + channel)) for channel in range(3)]
    image = Image.fromarray(np.stack(waves, 2).astype(np.uint8))
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    image.save(tmp_path / "out" / "photo.jpg", format="PNG")
    monkeypatch.chdir(tmp_path / "out")
    left: dict = {}
    exec(compile(snippet, "README.md", "exec"), left)
    encoder = load_encoder(tmp_path / "e")
    expected = evaluated(image, encoder.settings)
    if encoder.settings.tokens == "pixel":
        found, expected = left["indices"], encoder.patch_embed.quantize(expected[None])
        assert float((found != expected).float().mean()) < 0.05
    else:
        assert float((left["pixels"][0] - expected).abs().mean()) < 0.02


@pytest.mark.parametrize(
    "fraction", [0.875, 0.9, 28 / 50, 0.95, 0.7, 0.333, 0.99, 224 / 248, 224 / 256, 224 / 230, 1.0]
)
@pytest.mark.parametrize("side", [16, 28, 64, 224, 384, 518])
def test_timm_resizes_to_the_side_that_is_meant(side: int, fraction: float) -> None:
    encoder = EncoderSettings(image_size=side, patch=side, crop_fraction=fraction)
    resized = math.floor(side / timm_format.crop_pct(encoder))
    assert abs(resized - side / fraction) <= 1  # the nearest from which an even number is cut
    assert (resized - side) % 2 == 0
    if side == 224 and fraction in (224 / 248, 224 / 256, 0.875):
        assert resized == round(224 / fraction)


def test_a_card_says_in_words_which_part_of_an_image_is_seen(tmp_path: Path) -> None:
    for name, options, words in (
        ("a", {"crop_fraction": 0.875}, "The middle 87.5 % (of each side) of the largest centered box"),
        ("b", {}, "The largest centered box with the proportions of 224 x 224, resized to 224 x 224 (bicubic)"),
        ("c", {"crop_mode": "squash"}, "The whole image, squashed, resized to 224 x 224"),
        ("d", {"crop_mode": "squash", "crop_fraction": 0.5}, "The middle 50 % (of each side) of the whole image"),
        ("e", {}, "pixels from 0 to 1 (8 bits divided by 255, 16 bits by 65,535), minus mean 0.485"),
    ):
        saved(tmp_path / name, image_size=224, patch=56, **options)
        export_encoder(tmp_path / name, tmp_path / f"out-{name}", "safetensors")
        assert words in (tmp_path / f"out-{name}" / "README.md").read_text()


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("timm", {"interpolate_antialias": False}, "interpolate_antialias: false"),
        ("timm", {"interpolate_offset": 0.1}, "interpolate_offset: 0.1"),
        ("transformers", {}, "interpolate_antialias: true"),
        ("transformers", {"registers": 1, "interpolate_antialias": False}, "interpolate_antialias: false"),
        ("torch", {"interpolate_offset": 0.1}, "interpolate_offset: 0.1"),
        ("torch", IGPT, "tokens: pixel"),
        ("onnx", {"pos_embed": "relative_bias"}, "pos_embed: relative_bias"),
        ("safetensors", IGPT, "a pixel sequence with encoder.pos_embed learned_1d is tied to its size"),
    ],
)
def test_sizes_at_which_positions_would_differ_are_refused(tmp_path: Path, kind: str, options, reason: str) -> None:
    saved(tmp_path / "e", **options)
    with pytest.raises(ValueError, match=f"--size dynamic: .*{reason}"):
        export_encoder(tmp_path / "e", tmp_path / "out", kind, size="dynamic")


def test_an_export_of_one_size_takes_no_other(tmp_path: Path) -> None:
    saved(tmp_path / "e", interpolate_antialias=False)
    assert export_encoder(tmp_path / "e", tmp_path / "timm", "timm")["image_sizes"] == "fixed"
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(torch.randn(1, 3, 20, 16))


# ---- ViT-Ti --------------------------------------------------------------------------------------------------------


def outputs_of(kind: str, folder: Path, images: torch.Tensor, pooling: str) -> torch.Tensor:
    """Features as a user of the library gets them."""
    if kind == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    if kind == "transformers":
        tokens = transformers.AutoModel.from_pretrained(folder)(images).last_hidden_state
        return tokens[:, 0] if pooling == "class" else tokens[:, 5:].mean(1)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["class", "mean"])
@pytest.mark.parametrize("kind", ["timm", "transformers", pytest.param("onnx", marks=pytest.mark.slow)])
def test_libraries_agree_on_a_vit_tiny_with_registers_and_layer_scale(tmp_path: Path, kind: str, pooling: str) -> None:
    """Within 1e-5, at another size than the 224 x 224 of training too."""
    torch.manual_seed(0)
    encoder = ViTEncoder(preset("vit_tiny", registers=4, layer_scale=0.1, pooling=pooling)).eval()
    for name, parameter in encoder.named_parameters():
        if "token" in name or "bias" in name or "pos_embed" in name:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_encoder(encoder, tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / kind, kind, size="dynamic")
    for size in ([224, 224], [288, 192]):
        images = torch.randn(2, 3, *size)
        difference = outputs_of(kind, tmp_path / kind, images, pooling) - encoder.features(images)
        assert float(difference.abs().max()) < 1e-5, size


def test_an_onnx_file_that_writes_equal_scales_once_is_a_whole_one(tmp_path: Path) -> None:
    """As training begins with: the same number in every LayerScale."""
    torch.manual_seed(0)
    save_encoder(ViTEncoder(preset("vit_tiny", depth=2, image_size=32, layer_scale=1e-5)).eval(), tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "onnx", "onnx")
    assert json.loads((tmp_path / "onnx" / "verdict.json").read_text())["passed"]


# ---- any options ---------------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.sampled_from(["patch", "shifted_patch"]),
        "pos_embed": st.sampled_from(["none", "learned_1d", "learned_2d", "sincos_1d", "sincos_2d", "rotary_2d"]),
        "prefix_positions": st.sampled_from(["none", "class", "all"]),
        "class_token": st.booleans(), "registers": st.integers(0, 3), "mask_token": st.booleans(),
        "mlp": st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "swiglu"]),
        "mlp_ratio": st.sampled_from([1.5, 2.0, 4.0]),
        "norm": st.sampled_from(["layer", "rms"]), "norm_eps": st.sampled_from([1e-6, 1e-3]),
        "bias": st.booleans(), "layer_scale": st.sampled_from([None, 0.5]), "qk_norm": st.booleans(),
        "locality_self_attention": st.booleans(), "causal": st.booleans(), "final_norm": st.booleans(),
        "fc_norm": st.booleans(), "pre_norm": st.booleans(), "patch_bias": st.booleans(), "pool_mlp": st.booleans(),
        "interpolate_antialias": st.booleans(), "interpolate_offset": st.sampled_from([0.0, 0.1]),
        "image_size": st.sampled_from([16, [16, 8]]), "channels": st.sampled_from([1, 3]),
        "pooling": st.sampled_from(["class", "mean", "attention"]),
    },
)  # fmt: skip


COMMON = {
    "prefix_positions": st.sampled_from(["none", "class", "all"]), "registers": st.integers(0, 3),
    "mask_token": st.booleans(), "layer_scale": st.sampled_from([None, 0.5]), "channels": st.sampled_from([1, 3]),
    "interpolate_antialias": st.booleans(), "interpolate_offset": st.sampled_from([0.0, 0.1]),
    "mlp_ratio": st.sampled_from([2.0, 4.0]), "pooling": st.sampled_from(["class", "mean"]),
    "pos_embed": st.sampled_from(["learned_1d", "learned_2d", "sincos_1d", "sincos_2d"]),
}  # fmt: skip
HELD = {
    "timm": st.fixed_dictionaries(
        {}, optional=COMMON | {"qk_norm": st.booleans(), "bias": st.booleans(), "image_size": st.just([16, 8])}
    ),
    "transformers": st.fixed_dictionaries({}, optional=COMMON | {"norm_eps": st.sampled_from([1e-6, 1e-3])}),
}
RANDOMLY = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def there_and_back(folder: Path, kind: str, chosen: EncoderSettings) -> None:
    """Export, and read what was exported: every feature is the same to the last bit."""
    torch.manual_seed(0)
    encoder = shaken(ViTEncoder(chosen))
    save_encoder(encoder, folder / "e")
    export_encoder(folder / "e", folder / "out", kind)
    again = load_encoder(folder / "out", **({"pooling": chosen.pooling} if kind == "transformers" else {}))
    images = torch.randn(2, chosen.channels, *chosen.image_size)
    assert torch.equal(again.features(images), encoder.features(images)), asdict(chosen)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
@RANDOMLY
@given(data=st.data())
def test_an_encoder_that_a_format_holds_comes_back_exactly(tmp_path_factory, kind: str, data: st.DataObject) -> None:
    chosen = EncoderSettings(**SMALL | data.draw(HELD[kind]))
    there_and_back(tmp_path_factory.mktemp("any"), kind, chosen)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
@RANDOMLY
@given(options=OPTIONS)
def test_any_other_encoder_is_refused_with_the_reason(tmp_path_factory, kind: str, options: dict) -> None:
    """Or held, and then it comes back exactly as well."""
    try:
        chosen = EncoderSettings(**SMALL | options)
    except ValueError:
        return  # no such encoder
    try:
        there_and_back(tmp_path_factory.mktemp("any"), kind, chosen)
    except ValueError as error:
        if "cannot hold this encoder (" not in str(error):
            raise
