"""Encoders of timm by name and of transformers by folder give the features that they give there."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.data.loader import view_of_image
from sslvit.data.resample import normalize
from sslvit.exporters import export_encoder
from sslvit.layouts import backbones
from sslvit.models import Backbone, ViTEncoder
from sslvit.settings import EncoderSettings

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def give_random_weights(monkeypatch: pytest.MonkeyPatch) -> list:
    """timm's models without a download."""
    made, create = [], timm.create_model

    def without_download(name: str, pretrained: bool, **options):
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
    with pytest.raises(ValueError, match=r"^timm:vit_tinny_patch16_224: Unknown model .*. Did you mean vit_tiny_patch"):
        load_encoder("timm:vit_tinny_patch16_224")
    give_random_weights(monkeypatch)
    assert isinstance(load_encoder("timm:resnet18"), Backbone)  # a network of its own kind
    assert backbones.is_name("timm:beit_base_patch16_224")  # which has attention of its own
    with pytest.raises(ValueError, match="a Eva, and only plain vision transformers can be probed"):
        load_encoder("timm:eva02_tiny_patch14_224")


def test_the_epsilon_of_a_model_of_timm_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    give_random_weights(monkeypatch)
    create = timm.create_model

    def with_epsilon(name: str, **options):
        model = create(name, **options)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        return model

    monkeypatch.setattr(timm, "create_model", with_epsilon)
    assert load_encoder("timm:vit_tiny_patch16_224").settings.norm_eps == 1e-5


def test_models_of_timm_that_compute_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another activation leaves no trace among the names of weights."""
    give_random_weights(monkeypatch)
    create = timm.create_model

    def with_activation(name: str, **options):
        model = create(name, **options)
        model.blocks[3].mlp.act = torch.nn.ReLU()
        model.global_pool = ""  # its features are not compared
        return model

    monkeypatch.setattr(timm, "create_model", with_activation)
    with pytest.raises(ValueError, match="gives other outputs than a plain vision transformer"):
        load_encoder("timm:vit_tiny_patch16_224")


def test_a_model_of_timm_that_gives_tokens_is_pooled_as_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    give_random_weights(monkeypatch)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, global_pool="", **options))
    assert load_encoder("timm:vit_tiny_patch16_224").settings.pooling == "class"
    assert "pooling: it returns tokens without pooling; class is used" in capsys.readouterr().out


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


# ---- what a processor shows is what evaluation shows -----------------------------------------------------------------


def photograph(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(rows / 9 + columns / (5 + channel)) for channel in range(3)]
    return Image.fromarray(np.stack(waves, 2).astype(np.uint8))


def seen(image: Image.Image, settings: EncoderSettings) -> torch.Tensor:
    """An image as evaluation shows it to an encoder, 'c h w'."""
    content = io.BytesIO()
    image.save(content, "png")
    pixels = view_of_image(content.getvalue(), settings)
    return normalize(pixels[None], settings.mean, settings.std)[0]


BIT, VIT = ({"image_processor_type": f"{kind}ImageProcessor"} for kind in ("Bit", "ViT"))
CASES = [
    (BIT | {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}, "center", 56 / 64),
    (BIT | {"size": 64, "crop_size": 56}, "center", 56 / 64),
    (BIT | {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}, "center", 1.0),
    (BIT | {"size": {"height": 64, "width": 64}, "crop_size": {"height": 56, "width": 56}}, "squash", 56 / 64),
    (VIT | {"size": {"height": 56, "width": 56}}, "squash", 1.0),
    (VIT | {"size": 56}, "squash", 1.0),
    (VIT | {"size": {"height": 56, "width": 56}, "resample": 3}, "squash", 1.0),
    (VIT | {"size": {"height": 56, "width": 56}, "do_rescale": False, "image_mean": [90.0, 120.0, 130.0],
            "image_std": [50.0, 60.0, 70.0]}, "squash", 1.0),
    (VIT | {"size": {"height": 56, "width": 56}, "do_normalize": False}, "squash", 1.0),
    (BIT | {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "resample": 2}, "center", 0.875),
]  # fmt: skip


@pytest.mark.parametrize(("prepared", "mode", "fraction"), CASES)
def test_evaluation_sees_what_a_transformers_processor_makes(
    tmp_path: Path, prepared: dict, mode: str, fraction: float, capsys: pytest.CaptureFixture
) -> None:
    folder_of("Dinov2", tmp_path, image_size=56)
    content = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]} | prepared
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    settings = load_encoder(tmp_path).settings
    assert (settings.crop_mode, settings.crop_fraction) == (mode, fraction)
    assert "are used" not in capsys.readouterr().out
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((128, 128), (128, 192), (256, 128)):
        theirs = processor(photograph(*size), return_tensors="pt")["pixel_values"][0]
        difference = (seen(photograph(*size), settings) - theirs).abs()
        assert float(difference.mean() / theirs.std()) < 0.01, size


@pytest.mark.parametrize(("mode", "share"), [("center", 0.9), ("center", 0.875), ("center", 1), ("squash", 0.875),
                                             ("squash", 1.0), (None, None)])  # fmt: skip
def test_evaluation_sees_what_timm_makes(monkeypatch: pytest.MonkeyPatch, mode: str | None, share) -> None:
    made = give_random_weights(monkeypatch)
    changed = {"crop_mode": mode, "crop_pct": share, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}
    create = timm.create_model

    def with_config(name: str, **options):
        model = create(name, **options)
        model.pretrained_cfg = model.pretrained_cfg | changed
        return model

    monkeypatch.setattr(timm, "create_model", with_config)
    settings = load_encoder("timm:vit_tiny_patch16_224").settings
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(made[0]))
    resized = {0.9: 248, 0.875: 256, 1: 224, None: 256}[share]  # timm cuts 248.9 to whole pixels
    assert (settings.crop_mode, settings.crop_fraction) == (mode or "center", 224 / resized)
    for size in ((2 * resized, 2 * resized), (2 * resized, 3 * resized)):
        theirs = transform(photograph(*size))
        difference = (seen(photograph(*size), settings) - theirs).abs()
        assert float(difference.mean() / theirs.std()) < 0.01, size


@pytest.mark.parametrize(
    ("prepared", "note"),
    [
        (
            BIT | {"size": {"shortest_edge": 64}, "crop_size": 56},
            "makes images of 56 x 56, and its positions are for 28",
        ),
        (VIT | {"size": {"height": 56, "width": 28}}, "makes images of 56 x 28"),
        (BIT | {"size": {"shortest_edge": 28}, "do_center_crop": False}, "resized to 28 and nothing is cut; here the"),
        (BIT | {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 14}}, "which is not done here"),
        (BIT | {"size": {"shortest_edge": 14}, "crop_size": 28}, "which is not done here; the largest centered box"),
        (VIT | {"do_resize": False}, "there images are not resized; here the largest centered box"),
        (VIT | {"resample": 1, "size": 28}, "resample 1 is not bilinear or bicubic; bicubic is used"),
        ({"image_processor_type": "BeitImageProcessor", "size": 28}, "'BeitImageProcessor' is unknown; read as of Bit"),
        (VIT | {"size": 28, "do_rescale": False}, "scaled to 0 to 255"),
        (BIT | {"size": {"shortest_edge": 32}, "crop_size": 28}, None),
        ({}, None),
    ],
)
def test_what_a_processor_does_and_evaluation_cannot_is_said(
    tmp_path: Path, prepared: dict, note: str | None, capsys: pytest.CaptureFixture
) -> None:
    folder_of("Dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    load_encoder(tmp_path)
    said = capsys.readouterr().out
    assert note in said if note else "preprocessing" not in said


def test_a_crop_of_timms_that_pads_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    give_random_weights(monkeypatch)
    create = timm.create_model

    def with_border(name: str, **options):
        model = create(name, **options)
        model.pretrained_cfg = model.pretrained_cfg | {"crop_mode": "border", "interpolation": "lanczos"}
        return model

    monkeypatch.setattr(timm, "create_model", with_border)
    assert load_encoder("timm:vit_tiny_patch16_224").settings.crop_fraction == 1
    said = capsys.readouterr().out
    assert "timm pads images (crop_mode 'border', crop_pct 0.9), which is not done here" in said
    assert "timm resizes by 'lanczos'; bicubic is used here" in said


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ViT", ([0.5] * 3, [0.5] * 3, "bilinear", "squash", 1.0)),
        ("Dinov2", ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "bicubic", "center", 0.875)),
    ],
)
def test_without_a_processors_file_the_models_own_is_assumed_and_said(
    tmp_path: Path, kind: str, expected: tuple, capsys: pytest.CaptureFixture
) -> None:
    more = {"intermediate_size": 128} if kind == "ViT" else {}
    folder_of(kind, tmp_path, **more)
    (tmp_path / "preprocessor_config.json").unlink()
    found = load_encoder(tmp_path).settings
    assert (found.mean, found.std, found.interpolation, found.crop_mode, found.crop_fraction) == expected
    said = [line for line in capsys.readouterr().out.splitlines() if "no preprocessor_config.json there" in line]
    assert len(said) == 1
    assert expected[2] in said[0]


@pytest.mark.parametrize("pooling", ["max", "avgmax"])
def test_a_pooling_that_is_not_done_here_is_no_class_pooling(monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    give_random_weights(monkeypatch)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, global_pool=pooling, **options))
    with pytest.raises(ValueError, match=f"pools by '{pooling}' .global_pool., which is not done here"):
        load_encoder("timm:vit_tiny_patch16_224")
    assert load_encoder("timm:vit_tiny_patch16_224", pooling="mean").settings.pooling == "mean"


def test_features_of_timm_are_compared_and_not_only_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    give_random_weights(monkeypatch)
    create = timm.create_model

    def with_odd_head(name: str, **options):
        model = create(name, **options)
        model.fc_norm = torch.nn.LayerNorm(192, elementwise_affine=False)  # leaves no weight behind
        return model

    monkeypatch.setattr(timm, "create_model", with_odd_head)
    with pytest.raises(ValueError, match="its features differ from those of class pooling"):
        load_encoder("timm:vit_tiny_patch16_224")


# ---- what config.json says is there ----------------------------------------------------------------------------------


def imagegpt_folder(tmp_path: Path, **options):
    config = transformers.ImageGPTConfig(
        **{"vocab_size": 9, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2} | options
    )
    torch.manual_seed(0)
    model = transformers.ImageGPTModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    clusters = np.random.default_rng(0).uniform(-1, 1, (8, 3)).tolist()
    content = {
        "clusters": clusters,
        "image_processor_type": "ImageGPTImageProcessor",
        "size": {"height": 4, "width": 4},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    return model


MISSING = [
    ("ViT", r"layer\.1\.attention\.attention\.(query|key|value)\.bias"), ("ViT", r"attention\.(query|key|value)\.bias"),
    ("ViT", r"layer\.1\.attention\.attention\.key\.bias"), ("ViT", r"embeddings\.position_embeddings"),
    ("ViT", r"^layernorm\."), ("ViT", r"layer\.1\."), ("ViT", r"cls_token"), ("ViT", r"layer\.0\..*\.bias"),
    ("ViT", r"intermediate\.dense\.bias"), ("ViT", r"projection\.bias"),
    ("Dinov2", r"layer\.1\.layer_scale"), ("Dinov2", r"layer_scale"), ("Dinov2", r"position_embeddings"),
    ("Dinov2", r"^layernorm\."), ("Dinov2", r"layer\.1\."), ("Dinov2WithRegisters", r"register_tokens"),
    ("Dinov2WithRegisters", r"(query|key|value)\.bias"),
    ("ImageGPT", r"h\.1\.attn\.c_attn\.bias"), ("ImageGPT", r"c_attn\.bias"), ("ImageGPT", r"\.bias"),
    ("ImageGPT", r"h\.1\."), ("ImageGPT", r"h\.0\.mlp\.c_proj\.bias"), ("ImageGPT", r"ln_f"), ("ImageGPT", r"wpe"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "lost"), MISSING)
def test_a_folder_that_lacks_what_its_config_says_is_refused(tmp_path: Path, kind: str, lost: str) -> None:
    if kind == "ImageGPT":
        imagegpt_folder(tmp_path)
    else:
        folder_of(kind, tmp_path, **{"intermediate_size": 128} if kind == "ViT" else {})
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if not re.search(lost, key)}
    assert 0 < len(kept) < len(state)
    load_encoder(tmp_path)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        load_encoder(tmp_path)


@torch.no_grad()
def test_imagegpt_by_folder_and_attention_that_is_scaled_otherwise(tmp_path: Path) -> None:
    model = imagegpt_folder(tmp_path)
    encoder = load_encoder(tmp_path)
    indices = torch.randint(0, 8, (2, 16))
    start = torch.full((2, 1), 8)
    expected = model(input_ids=torch.cat([start, indices[:, :-1]], 1)).last_hidden_state
    images = encoder.patch_embed.images_of(indices, (4, 4))
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-4)
    assert (encoder.settings.crop_mode, encoder.settings.interpolation) == ("squash", "bilinear")
    imagegpt_folder(tmp_path / "eps", layer_norm_epsilon=1e-3)
    assert load_encoder(tmp_path / "eps").settings.norm_eps == 1e-3
    for option, value in (("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)):
        imagegpt_folder(tmp_path / option, **{option: value})
        with pytest.raises(ValueError, match=f"{option} {value}: scores are scaled differently"):
            load_encoder(tmp_path / option)


def test_weights_of_an_imagegpt_alone_have_all_biases_or_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    imagegpt_folder(tmp_path / "folder")
    state = load_file(tmp_path / "folder" / "model.safetensors")
    colors = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())["clusters"]
    biases = [key for key in state if key.endswith("c_attn.bias")]
    assert len(biases) == 2
    save_file({key: value for key, value in state.items() if key != biases[1]}, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match="missing: blocks.1.attn.qkv.bias"):
        load_encoder(tmp_path / "some.safetensors", heads=2, palette=colors)
    save_file({key: value for key, value in state.items() if key not in biases}, tmp_path / "none.safetensors")
    encoder = load_encoder(tmp_path / "none.safetensors", heads=2, palette=colors)
    assert not encoder.blocks[1].attn.qkv.bias.any()
    assert "biases: the file has none of queries, keys and values; they are zero" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_features_of_a_folder_are_the_class_token_of_the_model(tmp_path: Path, kind: str) -> None:
    model = folder_of(kind, tmp_path, **{"intermediate_size": 96} if kind == "ViT" else {})
    images = torch.randn(2, 3, 28, 28)
    expected = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(load_encoder(tmp_path).features(images), expected, atol=1e-5, rtol=1e-4)


def test_a_config_and_weights_that_disagree_on_biases_are_refused(tmp_path: Path) -> None:
    folder_of("ViT", tmp_path, intermediate_size=128)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"qkv_bias": False}))
    with pytest.raises(ValueError, match="states qkv_bias: false, but its weights have such biases"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (r"blocks\.1\.attn\.qkv\.bias", r"for blocks.1.attn.qkv.bias, which is missing among its weights"),
        (r"qkv\.bias", r"for blocks.0.attn.qkv.bias, which is missing among its weights"),
        (r"pos_embed", r"\(1, 4, 16\) for pos_embed, which is missing among its weights"),
        (r"^norm\.", r"\(16,\) for norm.weight, which is missing among its weights"),
        (r"blocks\.1\.", r"states a depth of 2, but its weights have 1 blocks"),
        (r"cls_token", r"for cls_token, which is missing among its weights"),
        (r"reg_token", r"for reg_token, which is missing among its weights"),
    ],
)
def test_a_folder_of_timms_that_lacks_what_its_config_says_is_refused(tmp_path: Path, lost: str, said: str) -> None:
    settings = EncoderSettings(image_size=8, patch=4, width=16, depth=2, heads=2, registers=1)
    save_encoder(ViTEncoder(settings).eval(), tmp_path / "encoder")
    export_encoder(tmp_path / "encoder", tmp_path / "timm", "timm")
    state = load_file(tmp_path / "timm" / "model.safetensors")
    save_file({key: value for key, value in state.items() if not re.search(lost, key)},
              tmp_path / "timm" / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=said):
        load_encoder(tmp_path / "timm")


@pytest.mark.parametrize("activation", ["silu", "relu", ["gelu"]])
def test_activations_that_nothing_here_has_are_refused(tmp_path: Path, activation: str) -> None:
    """silu stands in the settings of a gated Dinov2 only."""
    folder_of("ViT", tmp_path, intermediate_size=128)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": activation}))
    with pytest.raises(ValueError, match=r"hidden_act .*(silu|relu|gelu).* is none of gelu, gelu_pytorch_tanh"):
        load_encoder(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
def test_the_activation_is_that_of_the_config(tmp_path: Path, activation: str) -> None:
    model, images = folder_of("ViT", tmp_path, intermediate_size=128, hidden_act=activation), torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(load_encoder(tmp_path)(images), model(images).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_weights_that_no_network_can_bring_are_said_with_the_way_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub " + 300 * "x")

    monkeypatch.setattr(timm, "create_model", unreachable)
    for name in ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"):
        with pytest.raises(ValueError, match="its weights are not in .*hub, and the hub does not answer") as found:
            load_encoder(f"timm:{name}")
        assert f"timm.create_model('{name}', pretrained=True)" in str(found.value)
        assert "Did you mean" not in str(found.value)


def test_a_file_of_beit_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="a BEiT, which cannot be held: each of its blocks learns a relative position"):
        load_encoder(tmp_path / "b.safetensors")


def test_a_model_of_timm_without_biases_of_queries_keys_and_values_gets_zeros(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = give_random_weights(monkeypatch)
    create = timm.create_model
    small = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "qkv_bias": False}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options | small))
    encoder = load_encoder("timm:vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), made[-1].forward_features(images))
    assert "zeros take their place" in capsys.readouterr().out
