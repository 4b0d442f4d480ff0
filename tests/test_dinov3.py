"""DINOv3's ViTs, which timm and transformers have too: the same features there and here, at any size."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_fixtures import shaken
from packaging.version import Version
from run_fixtures import TINY, TINY_DINO
from safetensors.torch import load_file, save_file
from shard_fixtures import labeled_shards
from torch import Tensor, nn

import sslvit
from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.exporters import export_encoder
from sslvit.layouts import dinov3, from_sslvit, to_sslvit
from sslvit.models import ViTEncoder
from sslvit.models.transformer import KeyUnbiasedLinear
from sslvit.settings import EncoderSettings

timm = pytest.importorskip("timm", reason="timm is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = [(16, 16), (32, 32), (12, 28)]  # the own one, another, and no square
DINOV3 = {
    "image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "norm_eps": 1e-5,
    "key_bias": False, "layer_scale": 0.5, "pos_embed": "rotary_2d_normalized", "registers": 4, "mask_token": True,
}  # fmt: skip
KINDS = {"gelu": {}, "swiglu": {"mlp": "swiglu", "mlp_ratio": 3.0}}


def made(**changes) -> ViTEncoder:
    """An encoder of which no weight has its first value, besides the keys' biases."""
    torch.manual_seed(0)
    encoder = shaken(ViTEncoder(EncoderSettings(**DINOV3 | changes)))
    for module in encoder.modules():
        if isinstance(module, KeyUnbiasedLinear):
            module.bias.data.chunk(3)[1].zero_()
    return encoder


def of_transformers(folder: Path, **changes) -> nn.Module:
    """A random model of transformers, and its folder."""
    options = {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "image_size": 16,
        "patch_size": 4, "num_register_tokens": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    model = shaken(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options | changes)))
    model.save_pretrained(folder)
    return model


def of_timm(name: str = "vit_small_patch16_dinov3_qkvb", **changes) -> nn.Module:
    """A small random model of timm."""
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = shaken(timm.create_model(name, num_classes=0, **options | changes))
    for block in model.blocks:  # of a smaller size than one, as the others' are
        block.gamma_1.data.add_(0.5)
        block.gamma_2.data.add_(0.5)
    return model


def released(encoder: ViTEncoder) -> dict[str, Tensor]:
    """A file as facebookresearch/dinov3 has them."""
    quarter = encoder.settings.head_width // 4
    periods = 100.0 ** (torch.arange(quarter) / quarter)
    return from_sslvit(encoder.state_dict(), "dinov3") | {"rope_embed.periods": periods.bfloat16().float()}


@torch.no_grad()
def assert_same(encoder: ViTEncoder, reference: object, sizes: list[tuple[int, int]] = SIZES) -> None:
    """All tokens of an encoder and of a function of images."""
    for size in sizes:
        images = torch.randn(2, encoder.settings.channels, *size)
        torch.testing.assert_close(encoder(images), reference(images), atol=1e-5, rtol=0)


# ---- transformers ----------------------------------------------------------------------------------------------------

TRANSFORMERS = [
    {}, {"use_gated_mlp": True, "hidden_act": "silu"}, {"query_bias": False, "value_bias": False},
    {"key_bias": True, "num_register_tokens": 0, "layer_norm_eps": 0.1},
    pytest.param(
        {"image_size": [16, 24], "num_channels": 1},
        marks=pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="its DINOv3 is square"),
    ),
    dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), False),
]  # fmt: skip


@pytest.mark.parametrize("changes", TRANSFORMERS, ids=str)
def test_a_folder_of_transformers_gives_its_features_at_any_size(changes: dict, tmp_path: Path) -> None:
    model = of_transformers(tmp_path / "there", **changes)
    encoder = load_encoder(tmp_path / "there")
    assert_same(encoder, lambda images: model(images).last_hidden_state)
    hidden = torch.rand(2, 16) < 0.5
    images = torch.randn(2, encoder.settings.channels, 16, 16)
    with torch.no_grad():
        masked = model(images, bool_masked_pos=hidden).last_hidden_state
        torch.testing.assert_close(encoder(images, hidden=hidden), masked, atol=1e-5, rtol=0)
    export_encoder(tmp_path / "there", tmp_path / "again", "transformers", outputs="tokens")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "again"))
    assert one.keys() <= other.keys()
    assert all(torch.equal(value, one[key]) for key, value in other.items() if key in one)
    assert all(key.endswith("proj.bias") and not other[key].any() for key in other.keys() - one.keys())
    again = transformers.AutoModel.from_pretrained(tmp_path / "again").eval()
    assert type(again).__name__ == "DINOv3ViTModel"
    assert_same(encoder, lambda images: again(images).last_hidden_state)


@pytest.mark.parametrize("is_gated", [False, True])
def test_any_of_the_biases_can_be_left_out(is_gated: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kind = {"use_gated_mlp": is_gated, "hidden_act": "silu" if is_gated else "gelu", "num_hidden_layers": 1}
    for number, values in enumerate(itertools.product((False, True), repeat=len(dinov3.BIASES))):
        stated = dict(zip(dinov3.BIASES, values, strict=True))
        model = of_transformers(tmp_path / str(number), **kind, **stated)
        encoder = load_encoder(tmp_path / str(number))
        assert_same(encoder, lambda images, model=model: model(images).last_hidden_state, [(16, 16)])
        assert encoder.settings.bias is any(values)
    assert "biases: mlp_bias: false in config.json; they are zero, as other layers have theirs" in (
        capsys.readouterr().out
    )


def test_weights_of_transformers_alone_are_dinov3s(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Under the names of its files, and under those that it has in memory."""
    model = of_transformers(tmp_path / "there", use_gated_mlp=True, hidden_act="silu")
    save_file(load_file(tmp_path / "there" / "model.safetensors"), tmp_path / "alone.safetensors")
    torch.save({"model": {f"backbone.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "m.pth")
    for name in ("alone.safetensors", "m.pth"):
        assert_same(load_encoder(tmp_path / name, heads=2), lambda images: model(images).last_hidden_state)
        assert "loaded, none missing\n" in capsys.readouterr().out


def test_a_processor_of_dinov3_is_read(tmp_path: Path) -> None:
    of_transformers(tmp_path)
    assert load_encoder(tmp_path).settings.interpolation == "bilinear"
    transformers.DINOv3ViTImageProcessor(size={"height": 16, "width": 16}, resample=3, image_mean=[0.1, 0.2, 0.3]) \
        .save_pretrained(tmp_path)  # fmt: skip
    found = load_encoder(tmp_path).settings
    assert (found.mean, found.std) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert (found.interpolation, found.crop_mode, found.crop_fraction) == ("bicubic", "squash", 1.0)
    file = tmp_path / "preprocessor_config.json"  # what it does not state is its processor's default
    file.write_text(json.dumps({"image_processor_type": "DINOv3ViTImageProcessorFast", "crop_size": None,
                                "do_center_crop": None}))  # fmt: skip
    found = load_encoder(tmp_path).settings
    assert (found.mean[0], found.interpolation, found.crop_mode) == (0.485, "bilinear", "squash")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"hidden_act": "silu"}, "hidden_act silu with use_gated_mlp False: this encoder has gelu"),
        ({"use_gated_mlp": True}, "hidden_act gelu with use_gated_mlp True"),
        ({"rope_theta": 10.0}, "rope_theta 10.0: this encoder's is 100"),
        ({"key_bias": True}, "states key_bias: True, but its weights have no layer.0.attention.k_proj.bias"),
        ({"query_bias": False}, "states query_bias: False, but its weights have layer.0.attention.q_proj.bias"),
        ({"value_bias": None}, "states value_bias: None, but its weights have layer.0.attention.v_proj.bias"),
        ({"num_register_tokens": 3}, "other shape: reg_token"),
        ({"num_hidden_layers": 3}, "missing: blocks.2"),
        ({"intermediate_size": 60}, "other shape"),
        ({"num_attention_heads": 16}, "rotary_2d_normalized positions need width / heads in multiples of 4"),
        ({"mlp_bias": False}, "states mlp_bias: False, but its weights have layer.0.mlp.down_proj.bias"),
    ],
)
def test_a_folder_whose_config_says_something_else_is_refused(stated: dict, said: str, tmp_path: Path) -> None:
    of_transformers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | stated))
    with pytest.raises(ValueError, match=said) as found:
        load_encoder(tmp_path)
    assert tmp_path.name in str(found.value)
    assert "\n" not in str(found.value)


def test_biases_of_keys_that_transformers_would_not_read_are_refused(tmp_path: Path) -> None:
    of_transformers(tmp_path, key_bias=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"key_bias": False}))
    with pytest.raises(ValueError, match="states key_bias: False, but its weights have layer.0"):
        load_encoder(tmp_path)


# ---- timm ------------------------------------------------------------------------------------------------------------

TIMM = ["vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"]


@pytest.mark.parametrize("pooling", ["avg", "token"])
@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm_gives_its_features_at_any_size(
    name: str, pooling: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = of_timm(name, global_pool=pooling)
    with monkeypatch.context() as patched:
        patched.setattr(timm, "create_model", lambda *_, **__: copy.deepcopy(model))
        encoder = load_encoder(f"timm:{name}")
    assert_same(encoder, model.forward_features)
    assert encoder.settings.pooling == {"avg": "mean", "token": "class"}[pooling]
    assert (encoder.settings.crop_mode, encoder.settings.interpolation) == (
        "center",
        "bicubic",
    )  # as timm's config says
    save_encoder(encoder, tmp_path / "encoder")
    export_encoder(tmp_path / "encoder", tmp_path / "timm", "timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert_same(encoder, again.forward_features)
    assert_same(load_encoder(tmp_path / "timm"), model.forward_features)
    save_file(model.state_dict(), tmp_path / "alone.safetensors")
    assert_same(load_encoder(tmp_path / "alone.safetensors", heads=2), model.forward_features)


@pytest.mark.parametrize(
    ("name", "said"),
    [("vit_small_patch16_rope_224", "a Eva, and only plain vision"), ("vit_base_patch16_sapiens2", "differs from")],
)
def test_models_of_timm_that_are_nearly_dinov3_are_refused(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    if "sapiens" in name:
        small["num_kv_heads"] = (None, None)
    model = timm.create_model(name, **small)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    with pytest.raises(ValueError, match=f"^timm:{name}: {said}"):
        load_encoder(f"timm:{name}")


def test_another_grid_of_coordinates_in_timm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_timm(rope_grid_offset=0.3)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    with pytest.raises(ValueError, match="gives other outputs than a plain vision transformer"):
        load_encoder("timm:vit_small_patch16_dinov3_qkvb")


# ---- released files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_released_names_are_read_as_timm_reads_them(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = released(made(**KINDS[kind]))
    weights["blocks.0.attn.qkv.bias"][32:64] = 3.0  # masked, so they count for nothing
    torch.save(weights | {"local_cls_norm.weight": torch.ones(32)}, tmp_path / "dinov3_vits16_pretrain.pth")
    name = {"gelu": "vit_small_patch16_dinov3_qkvb", "swiglu": "vit_small_plus_patch16_dinov3_qkvb"}[kind]
    model = of_timm(name, mlp_ratio=2.0)
    model.load_state_dict(timm.models.eva.checkpoint_filter_fn(weights, model))
    encoder = load_encoder(tmp_path / "dinov3_vits16_pretrain.pth", image_size=16)
    said = capsys.readouterr().out
    assert_same(encoder, model.forward_features)
    settings = EncoderSettings(**DINOV3 | KINDS[kind] | {"interpolation": "bilinear", "crop_mode": "squash"})
    assert encoder.settings == replace(settings, layer_scale=1.0)
    assert not encoder.blocks[0].attn.qkv.bias[32:64].any()
    assert "the periods in the file are rounded to bfloat16" in said
    assert "as in DINOv3's own evaluation: mean 0.485, 0.456, 0.406" in said
    assert "ignored: 4 (" in said
    assert "none missing" in said
    words = ["import", str(tmp_path / "dinov3_vits16_pretrain.pth"), str(tmp_path / "e"), "--layout", "dinov3"]
    assert main([*words, "--image-size", "32", "16"]) == 0
    assert load_encoder(tmp_path / "e").settings.image_size == [32, 16]
    assert_same(load_encoder(tmp_path / "e"), model.forward_features)


def test_released_names_there_and_back_again() -> None:
    for options in (KINDS["swiglu"], {"key_bias": True}):
        encoder = made(**options)
        theirs = from_sslvit(encoder.state_dict(), "dinov3")
        found = to_sslvit(theirs, heads=2, image_size=16)
        assert found.settings.key_bias == encoder.settings.key_bias
        assert found.encoder.keys() == encoder.state_dict().keys()
        assert all(torch.equal(found.encoder[key], value) for key, value in encoder.state_dict().items())


def test_heads_follow_from_the_periods_and_biases_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As in the 7B model, whose heads are wider than the usual 64 channels."""
    weights = released(made(heads=1))
    kept = {key: value for key, value in weights.items() if ".qkv.bias" not in key}
    torch.save({"teacher": {f"backbone.{k}": v for k, v in kept.items()} | {"dino_head.mlp.0.bias": torch.ones(1)}},
               tmp_path / "seven.pth")  # fmt: skip
    encoder = load_encoder(tmp_path / "seven.pth")
    assert (encoder.settings.heads, encoder.settings.key_bias) == (1, False)
    assert encoder.settings.image_size == [224, 224]
    assert not encoder.blocks[1].attn.qkv.bias.any()
    assert "biases: the file has none of queries, keys and values; they are zero" in capsys.readouterr().out


def test_heads_other_than_those_of_the_periods_are_refused(tmp_path: Path) -> None:
    torch.save(released(made(heads=2)), tmp_path / "two.pth")
    assert load_encoder(tmp_path / "two.pth", heads=2).settings.heads == 2
    with pytest.raises(
        ValueError, match=r"heads: 4, but the periods in the file \(rope_embed\.periods\) are those of 2"
    ):
        load_encoder(tmp_path / "two.pth", heads=4)


def test_the_7b_model_has_half_the_usual_heads() -> None:
    with torch.device("meta"):
        shapes = ViTEncoder(EncoderSettings(**DINOV3 | {"width": 4096, "heads": 32, "depth": 1})).state_dict()
    found = to_sslvit(dinov3.to_transformers(shapes, key_bias=True))
    assert found.settings.heads == 32
    assert "those of the 7B model (32)" in " ".join(found.notes)


def test_satellite_models_see_images_by_their_own_mean(tmp_path: Path) -> None:
    weights = released(made())
    for name, mean in (("dinov3_vitl16_pretrain_sat493m.pth", 0.43), ("dinov3_vitl16_pretrain_lvd1689m.pth", 0.485)):
        torch.save(weights, tmp_path / name)
        assert load_encoder(tmp_path / name).settings.mean[0] == mean
    assert load_encoder(tmp_path / "dinov3_vitl16_pretrain_sat493m.pth", mean=[0.5] * 3).settings.mean[0] == 0.5


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rope_embed.periods": 10 ** torch.arange(4.0)}, "periods: are not the powers of 100"),
        ({"rope_embed.periods": torch.ones(0)}, "periods: are not the powers of 100"),
        ({"blocks.1.attn.qkv.bias_mask": torch.ones(96)}, "bias_mask: masks other biases than the keys'"),
        ({"cls_norm.weight": torch.ones(32)}, "cls_norm: the class token has a norm of its own"),
        ({"blocks.2.attn.qkv.weight": torch.ones(96, 32)}, "missing: blocks.2"),
    ],
)
def test_released_files_of_another_kind_are_refused(other: dict, said: str, tmp_path: Path) -> None:
    torch.save(released(made()) | other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=said) as found:
        load_encoder(tmp_path / "other.pth")
    assert "other.pth" in str(found.value)


@pytest.mark.parametrize("kind", ["released", "transformers", "timm", "folder"])
def test_a_file_that_lacks_any_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    """Besides what only says how its authors compute, and a mask token, which not all have."""
    if kind == "released":
        weights = released(made(mlp="swiglu", depth=1))
    elif kind == "timm":
        weights = of_timm("vit_small_plus_patch16_dinov3_qkvb", depth=1).state_dict()
    else:
        of_transformers(tmp_path, num_hidden_layers=1, use_gated_mlp=True, hidden_act="silu")
        weights = {
            name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()
        }  # saved over
    file = tmp_path / ("model.safetensors" if kind == "folder" else "lossy.safetensors")
    optional = ("rope_embed.periods", "bias_mask", *(("mask_token",) if kind != "folder" else ()))
    for lost in weights:
        if not lost.endswith(optional):
            save_file({key: value for key, value in weights.items() if key != lost}, file)
            with pytest.raises(ValueError, match="missing|no known layout|another architecture|have no") as found:
                load_encoder(tmp_path if kind == "folder" else file, heads=None if kind == "folder" else 2)
            assert "\n" not in str(found.value), lost


# ---- exports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["timm", "transformers", "safetensors"])
def test_every_format_holds_the_encoder_at_any_size(form: str, kind: str, tmp_path: Path) -> None:
    save_encoder(made(**KINDS[kind]), tmp_path / "e")
    words = ["export", str(tmp_path / "e"), str(tmp_path / form), "--format", form, "--size", "dynamic"]
    assert main(words) == 0
    verdict = json.loads((tmp_path / form / "verdict.json").read_text())
    assert verdict["image_sizes"] == "any"
    assert verdict["largest_difference"] < 1e-5


@pytest.mark.parametrize(
    ("form", "options", "reason"),
    [
        ("timm", {"key_bias": True}, "timm's DINOv3 cannot hold this encoder .*key_bias: true"),
        ("timm", {"norm_eps": 1e-6}, "norm_eps: 1e-06"), ("timm", {"bias": False}, "bias: false"),
        ("timm", {"mlp": "quick_gelu"}, "mlp: quick_gelu"), ("timm", {"causal": True}, "causal: true"),
        ("transformers", {"class_token": False, "pooling": "mean"}, "dinov3_vit cannot .*class_token: false"),
        ("transformers", {"fc_norm": True}, "fc_norm: true"), ("transformers", {"qk_norm": True}, "qk_norm: true"),
        ("transformers", {"final_norm": False}, "final_norm: false"),
        ("transformers", {"mlp": "quick_gelu"}, "mlp: quick_gelu"), ("transformers", {"norm": "rms"}, "norm: rms"),
    ],
)  # fmt: skip
def test_what_their_models_do_not_have_is_refused_with_the_reason(
    form: str, options: dict, reason: str, tmp_path: Path
) -> None:
    save_encoder(made(**options), tmp_path / "e")
    with pytest.raises(ValueError, match=reason):
        export_encoder(tmp_path / "e", tmp_path / form, form)
    assert not (tmp_path / form).exists()


@pytest.mark.parametrize(
    "options",
    [{"fc_norm": True, "pooling": "mean"}, {"qk_norm": True, "layer_scale": None},
     {"registers": 0, "class_token": False, "pooling": "mean", "channels": 1}],
)  # fmt: skip
def test_options_that_timms_model_has_too_are_held(options: dict, tmp_path: Path) -> None:
    encoder = made(**options)
    save_encoder(encoder, tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert_same(encoder, model.forward_features)


# ---- training on -----------------------------------------------------------------------------------------------------

SHORT = {key: value for key, value in TINY.items() if not key.startswith(("encoder.", "optim.", "task."))} | {
    "task.decoder_width": 16, "task.decoder_depth": 1, "task.decoder_heads": 2,
}  # fmt: skip
SHORT_DINO = {key: value for key, value in TINY_DINO.items() if not key.startswith(("encoder.", "optim."))} | {
    "data.view.local_size": 8
}
RUNS = {"mae": SHORT, "dino": SHORT_DINO}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path) / "train"


LARGER, FINER = {"encoder.image_size": 24}, {"encoder.image_size": [8, 16], "encoder.patch": 2}


@pytest.mark.parametrize(
    ("task", "sizes"),
    [("mae", FINER), ("dino", LARGER), pytest.param("mae", LARGER, marks=pytest.mark.slow),
     pytest.param("dino", FINER, marks=pytest.mark.slow)],
)  # fmt: skip
def test_pretraining_goes_on_from_a_folder_at_any_size(
    task: str, sizes: dict, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    of_transformers(tmp_path / "there", num_channels=1)
    before = load_encoder(tmp_path / "there")
    changes = RUNS[task] | {"train.steps": 2, "optim.warmup_epochs": 0, "optim.base_lr": 0.1, "optim.weight_decay": 0.5}
    run = sslvit.pretrain(f"{task}/continue", shards, tmp_path / "run", init=tmp_path / "there", **changes | sizes)
    said = capsys.readouterr().out
    assert "positions interpolated" not in said  # there is no table
    assert ("patch embedding resized from 4 x 4 to 2 x 2 pixels" in said) == ("encoder.patch" in sizes)
    after = load_encoder(run)
    assert (after.settings.pos_embed, after.settings.key_bias) == ("rotary_2d_normalized", False)
    for one, other in zip(before.blocks, after.blocks, strict=True):
        (query, key, value), (new_query, new_key, new_value) = (
            block.attn.qkv.bias.chunk(3) for block in (one, other)
        )  # fmt: skip
        assert not key.any()
        assert not new_key.any()
        assert not torch.equal(query, new_query)
        assert not torch.equal(value, new_value)


def test_the_keys_bias_stays_zero_whatever_trains_it() -> None:
    """Also where all weights decay and nothing but the gradient holds it."""
    encoder = made().train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        encoder(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    assert all(not block.attn.qkv.bias.chunk(3)[1].any() for block in encoder.blocks)
    assert all(block.attn.qkv.bias.chunk(3)[0].any() for block in encoder.blocks)


def test_figures_and_plans_of_such_an_encoder(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture) -> None:
    of_transformers(tmp_path / "there", num_channels=1)
    there = str(tmp_path / "there")
    for what in ("field", "attention"):
        out = tmp_path / f"{what}.png"
        assert main(["show", what, there, str(shards), "--images", "2", "-o", str(out)]) == 0
        assert out.is_file()
    capsys.readouterr()
    assert main(["plan", "--config", "mae/continue", "--init", there, "--images", "64"]) == 0
    assert "parameters" in capsys.readouterr().out
