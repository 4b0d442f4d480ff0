"""I-JEPA, MSN, DeiT and the vision towers of CLIP and SigLIP, from transformers and timm: their outputs, and back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import sslvit
from sslvit.checkpoint import load_encoder
from sslvit.exporters import export_encoder
from sslvit.models import ViTEncoder
from sslvit.models.mae import MAEModel
from sslvit.models.pooling import AttentionPool
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, MAESettings
from sslvit.train.prepare import read_settings

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 16,
         "patch_size": 4, "layer_norm_eps": 1e-3}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20,
        "max_position_embeddings": 5}  # fmt: skip
TOWERS = ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel", "SiglipVisionModel", "SiglipModel"]
VITS = [
    "IJepaModel",
    "ViTMSNModel",
    "DeiTModel",
    "IJepaForImageClassification",
    "DeiTForImageClassificationWithTeacher",
]


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With every parameter random, so that no default hides an error."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def model_of(name: str, **options):
    kind = re.match("IJepa|ViTMSN|DeiT|CLIP|Siglip", name)[0]
    if name in TOWERS and "Vision" not in name:
        config = getattr(transformers, f"{kind}Config")(vision_config=SHAPE | options, text_config=TEXT)
    else:
        config = getattr(transformers, f"{kind}{'Vision' * (name in TOWERS)}Config")(**SHAPE | options)
    return shaken(getattr(transformers, name)(config))


def inner_of(model):
    """The encoder inside a model."""
    for name in ("vision_model", "deit", "ijepa", "vit"):
        model = getattr(model, name, model)
    return model


def tokens_of(model, images: torch.Tensor) -> torch.Tensor:
    inner = inner_of(model)
    tokens = inner(images, interpolate_pos_encoding=True).last_hidden_state
    return inner.post_layernorm(tokens) if "CLIP" in type(inner).__name__ else tokens  # which its pooler alone applies


# ---- from transformers -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("names", ["as written", "in memory"])
@pytest.mark.parametrize("name", [*VITS, *TOWERS])
def test_a_folder_gives_the_tokens_of_transformers(tmp_path: Path, name: str, names: str) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    if names == "in memory":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder(tmp_path)
    for size in ((16, 16), (24, 16), (8, 8)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(encoder(images), tokens_of(model, images), atol=1e-5, rtol=1e-5)
    if name in TOWERS:
        pooled = inner_of(model)(images, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(encoder.features(images), pooled, atol=1e-5, rtol=1e-5)
    if name.startswith("IJepa"):
        torch.testing.assert_close(encoder.features(images), tokens_of(model, images).mean(1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_a_towers_activation_is_that_of_its_config(tmp_path: Path, name: str, activation: str) -> None:
    model, images = model_of(name, hidden_act=activation), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_encoder(tmp_path)(images), tokens_of(model, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_siglip_without_its_head_has_the_mean_for_features(tmp_path: Path) -> None:
    model, images = model_of("SiglipVisionModel", vision_use_head=False), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    mean = tokens_of(model, images).mean(1)
    torch.testing.assert_close(load_encoder(tmp_path).features(images), mean, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_what_a_config_leaves_out_is_transformers_default(tmp_path: Path, name: str) -> None:
    """As in the hub's files: a vision_config with little but its type; and positions_ids of older files."""
    model = model_of(name, num_attention_heads=4, hidden_size=48, image_size=224, patch_size=56)
    config = json.loads(json.dumps(model.config.to_dict()))
    left_out = ("hidden_act", "layer_norm_eps", "image_size", "num_channels")
    config["vision_config"] = {key: value for key, value in config["vision_config"].items() if key not in left_out}
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"vision_model.embeddings.position_ids": torch.arange(17)}, tmp_path / "model.safetensors")
    found, default = load_encoder(tmp_path).settings, getattr(transformers, f"{name[:-5]}VisionConfig")()
    assert (found.norm_eps, found.size) == (default.layer_norm_eps, (224, 224))
    assert found.mlp == {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}[default.hidden_act]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("CLIPModel", {"size": 32, "crop_size": 16}, ("center", 0.5, "bicubic", 0.48145466)),
        ("CLIPModel", None, ("center", 1.0, "bicubic", 0.48145466)),
        ("SiglipModel", {"size": {"height": 16, "width": 16}}, ("squash", 1.0, "bicubic", 0.5)),
        ("SiglipModel", None, ("squash", 1.0, "bicubic", 0.5)),
        ("DeiTModel", {"size": 32, "crop_size": 16, "image_mean": [0.485] * 3}, ("squash", 0.5, "bicubic", 0.485)),
        ("DeiTModel", None, ("center", 0.875, "bicubic", 0.485)),
        ("IJepaModel", {"size": 16}, ("squash", 1.0, "bilinear", 0.5)),
        ("ViTMSNModel", None, ("center", 0.875, "bicubic", 0.485)),
    ],
)  # fmt: skip
def test_preprocessing_is_the_processors_or_that_of_the_released_models(
    tmp_path: Path, name: str, content: dict | None, expected: tuple
) -> None:
    model_of(name).save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = load_encoder(tmp_path).settings
    assert (found.crop_mode, found.crop_fraction, found.interpolation, found.mean[0]) == expected


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("IJepaModel", "position_embeddings"), ("IJepaModel", r"layer\.1\."), ("IJepaModel", "^layernorm"),
        ("IJepaModel", r"key\.bias"), ("DeiTModel", "distillation_token"), ("DeiTModel", "cls_token"),
        ("CLIPModel", "class_embedding"), ("CLIPModel", "pre_layrnorm"), ("CLIPModel", "vision.*position_embedding"),
        ("CLIPModel", r"vision.*layers\.1\..*k_proj\.weight"), ("CLIPModel", "vision.*patch_embedding"),
        ("SiglipModel", "patch_embedding.bias"), ("SiglipModel", "head.probe"), ("SiglipModel", "head.mlp.fc1.bias"),
        ("SiglipModel", "in_proj_weight"), ("SiglipModel", "post_layernorm"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_a_part_is_refused_in_a_line(tmp_path: Path, name: str, lost: str) -> None:
    model_of(name).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if not re.search(lost, key) or "text_model" in key}
    assert 0 < len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing") as refused:
        load_encoder(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("CLIPVisionModel", {"hidden_act": "relu"}, "hidden_act relu is none of gelu"),
        ("CLIPVisionModel", {"hidden_size": 10**9}, "describe no network that can be built"),
        ("CLIPVisionModel", {"patch_size": 8}, "other shape"), ("CLIPVisionModel", {"num_hidden_layers": 3}, "missing"),
        ("CLIPModel", {"vision_config": 3}, "vision_config 3 is no record of settings"),
        ("SiglipVisionModel", {"vision_use_head": False}, "unknown: attn_pool"),
        ("IJepaModel", {"model_type": "beit"}, "a beit, which cannot be held: each of its blocks learns a relative"),
        ("IJepaModel", {"model_type": "siglip2"}, "a siglip2, which cannot be held: its images have any proportions"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_refused_with_the_reason(
    tmp_path: Path, name: str, change: dict, said: str
) -> None:
    model_of(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said) as refused:
        load_encoder(tmp_path)
    assert "\n" not in str(refused.value)


# ---- from timm -------------------------------------------------------------------------------------------------------


def give_random_weights(monkeypatch: pytest.MonkeyPatch) -> list:
    """timm's models without a download, smaller than they are."""
    made, create = [], timm.create_model

    def small(name: str, pretrained: bool, **options):
        if not name.startswith("beit"):
            options |= {"depth": 2, "embed_dim": 48, "num_heads": 3}
        made.append(shaken(create(name, pretrained=False, **options)))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", small)
    return made


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pooling", "mlp"),
    [
        ("vit_base_patch32_clip_224.openai", "class", "gelu"),
        ("vit_base_patch32_clip_quickgelu_224.openai", "class", "quick_gelu"),
        ("vit_base_patch32_siglip_256", "attention", "gelu_tanh"),
        ("vit_base_patch32_siglip_gap_256", "mean", "gelu_tanh"),
        ("deit_tiny_distilled_patch16_224", "class", "gelu"), ("deit3_small_patch16_224", "class", "gelu"),
    ],
)  # fmt: skip
def test_a_model_of_timm_gives_its_tokens_and_features(
    monkeypatch: pytest.MonkeyPatch, name: str, pooling: str, mlp: str, capsys: pytest.CaptureFixture
) -> None:
    made = give_random_weights(monkeypatch)
    encoder = load_encoder(f"timm:{name}")
    model, images = made[0], torch.randn(1, 3, *encoder.settings.image_size)
    tokens = model.forward_features(images)
    torch.testing.assert_close(encoder(images), tokens, atol=2e-5, rtol=1e-5)
    features = tokens[:, 0] if "distilled" in name else model(images)
    torch.testing.assert_close(encoder.features(images), features, atol=2e-5, rtol=1e-5)
    assert (encoder.settings.pooling, encoder.settings.mlp) == (pooling, mlp)
    said = capsys.readouterr().out
    assert ("activation: gelu, as timm runs it; it remarks: natively QuickGELU" in said) == name.endswith(
        "32_clip_224.openai"
    )
    assert ("averages the class and the distillation token; the class token is used" in said) == ("distilled" in name)


def test_an_attention_pool_of_timm_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    give_random_weights(monkeypatch)
    assert load_encoder("timm:vit_base_patch32_siglip_256", pooling="mean").attn_pool is None


# ---- there and back, and on ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["IJepaModel", "DeiTModel", "CLIPVisionModel", "SiglipVisionModel"])
def test_an_export_is_of_the_class_that_came_in(tmp_path: Path, name: str) -> None:
    model, images = model_of(name), torch.randn(2, 3, 24, 24)
    model.save_pretrained(tmp_path / "in")
    assert export_encoder(tmp_path / "in", tmp_path / "out", "transformers")["image_sizes"] == "any"
    again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(model)
    torch.testing.assert_close(tokens_of(again, images), tokens_of(model, images), atol=1e-5, rtol=1e-5)
    rewritten = ("pooler.", "head.probe", "head.attention.in_proj")  # not the encoder's; the query, multiplied out
    differing = [key for key, value in model.state_dict().items() if not torch.equal(value, again.state_dict()[key])]
    assert all(key.startswith(rewritten) for key in differing)
    if name in TOWERS:
        one, other = (found(images, interpolate_pos_encoding=True).pooler_output for found in (model, again))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_run_of_mae_begins_with_clip(tmp_path: Path) -> None:
    model_of("CLIPModel", num_channels=1, image_size=8, patch_size=2).save_pretrained(tmp_path / "clip")
    settings = read_settings("mae/continue", {"init": str(tmp_path / "clip"), "task.decoder_depth": 1})
    assert settings.encoder.pre_norm
    assert not settings.encoder.patch_bias
    task = sslvit.make_task(replace(settings, optim=settings.optim.fitted(1, 1, 1e-3)), RunPlan(1, 1, 2))
    start = load_encoder(tmp_path / "clip")
    task.start_from(start, "clip")
    assert all(torch.equal(value, start.state_dict()[key]) for key, value in task.encoder.state_dict().items())
    task.model.loss(torch.randn(2, 1, 8, 8), torch.rand(2, 16)).loss.backward()
    assert task.encoder.norm_pre.weight.grad.abs().sum() > 0


def test_visible_patches_are_normalized_before_the_blocks_as_they_are_among_all() -> None:
    torch.manual_seed(0)
    settings = EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2, pre_norm=True, patch_bias=False)
    encoder, images = shaken(ViTEncoder(settings)), torch.randn(2, 3, 16, 16)
    visible = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(images, visible), encoder(images))
    first, norm = encoder.layers(images, [0])[0], encoder.norm_pre
    encoder.norm_pre = torch.nn.Identity()
    torch.testing.assert_close(first, norm(encoder.layers(images, [0])[0]))
    MAEModel(MAESettings(decoder_width=8, decoder_depth=1, decoder_heads=1), settings).loss(images, torch.rand(2, 16))


def test_without_its_mlp_an_attention_pool_is_as_it_was() -> None:
    settings = EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2, pooling="attention")
    assert {name.split(".")[0] for name, _ in AttentionPool(settings).named_parameters()} == {"query", "kv", "proj"}


def test_tokens_without_a_patch_bias_are_patches_alone() -> None:
    with pytest.raises(ValueError, match="encoder.patch_bias: false is for tokens: patch, not conv_stem"):
        EncoderSettings(patch_bias=False, tokens="conv_stem")
