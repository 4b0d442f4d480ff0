"""Released files as people have them: prefixes, several networks, heads, models of transformers without a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_fixtures import Golden
from safetensors.torch import save_file
from torch import Tensor

from sslvit.checkpoint import load_encoder
from sslvit.cli import main
from sslvit.layouts import from_sslvit
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.tasks.released import load_mae, mae_to_state

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HEADS = {"mae": 4, "dino": 3, "dinov2": 3, "dinov3": 2, "timm": 3, "openai_igpt": 4, "transformers": 2}
FIXTURES = {"mae": "mae_model", "dino": "dino_vit", "dinov2": "dinov2_vit_reg4", "timm": "timm_vit_token",
            "openai_igpt": "igpt_model"}  # fmt: skip


def weights_of(layout: str) -> dict[str, Tensor]:
    if layout in ("transformers", "dinov3"):
        torch.manual_seed(0)
        of_dinov3 = {"pos_embed": "rotary_2d_normalized", "key_bias": False, "registers": 4, "layer_scale": 0.1}
        more = of_dinov3 if layout == "dinov3" else {}
        encoder = ViTEncoder(EncoderSettings(image_size=16, patch=4, width=32, depth=2, heads=2, **more))
        return from_sslvit(encoder.state_dict(), layout)
    return {key: value.clone() for key, value in Golden(FIXTURES[layout]).under("param/").items()}


def plain_vit(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return ViTEncoder(EncoderSettings(image_size=16, patch=4, width=32, depth=1, heads=2)).state_dict()


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "encoder.", "model.", "student.", "teacher.", "net.vit.", "module._orig_mod.model.",
     "backbone.", "teacher.backbone."],
)  # fmt: skip
@pytest.mark.parametrize("layout", HEADS)
def test_a_prefix_of_all_names_is_taken_off_and_said(
    tmp_path: Path, layout: str, prefix: str, capsys: pytest.CaptureFixture
) -> None:
    weights = weights_of(layout)
    torch.save(weights, tmp_path / "plain.pth")
    torch.save({"state_dict": under(prefix, weights), "epoch": 3}, tmp_path / "wrapped.pth")
    plain = load_encoder(tmp_path / "plain.pth", layout=layout, heads=HEADS[layout])
    capsys.readouterr()
    told = {"layout": layout} if layout in ("dino", "timm") else {}
    wrapped = load_encoder(tmp_path / "wrapped.pth", heads=HEADS[layout], **told)
    said = capsys.readouterr().out
    assert f"names: prefix {prefix}" in said
    assert f"{len(weights)} tensors: " in said
    assert wrapped.settings == plain.settings
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in wrapped.state_dict().items())


@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_heads_of_training_are_set_aside_and_said(
    tmp_path: Path, layout: str, prefix: str, capsys: pytest.CaptureFixture
) -> None:
    weights = weights_of(layout)
    names = ("classifier.weight", "fc.bias", "projector.0.weight", "head.weight", "head_dist.weight")
    outer = prefix.removesuffix("backbone.").removesuffix("encoder.")
    more = {outer + name: torch.ones(3) for name in names if name not in weights}
    torch.save(under(prefix, weights) | more, tmp_path / "released.pth")
    told = {"layout": layout} if layout in ("dino", "timm") else {}
    encoder = load_encoder(tmp_path / "released.pth", heads=HEADS[layout], **told)
    said = capsys.readouterr().out
    assert "not the encoder's: " in said
    for part in ("classifier (1)", "fc (1)", "projector (1)", "head_dist (1)"):
        assert part in said
    torch.save(weights, tmp_path / "plain.pth")
    assert encoder.settings == load_encoder(tmp_path / "plain.pth", layout=layout, heads=HEADS[layout]).settings


@pytest.mark.parametrize(("taken", "other"), [("teacher", "student"), ("model_ema", "model"), ("ema", "net"),
                                              ("target_encoder", "encoder")])  # fmt: skip
@pytest.mark.parametrize("form", ["entries", "names", "entry with names"])
def test_of_several_networks_the_average_is_taken_and_said(
    tmp_path: Path, taken: str, other: str, form: str, capsys: pytest.CaptureFixture
) -> None:
    average, last = plain_vit(0), plain_vit(1)
    names = under(f"{other}.vit.", last) | under(f"{taken}.vit.", average) | {f"{taken}.head.weight": torch.ones(2)}
    content = {
        "entries": {other: last, taken: under("module.", average) | {"module.head.weight": torch.ones(2)}},
        "names": names | {"center": torch.zeros(1)},
        "entry with names": {"state_dict": names, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    }[form]
    torch.save(content, tmp_path / "both.pth")
    encoder = load_encoder(tmp_path / "both.pth", layout="timm", heads=2)
    said = capsys.readouterr().out
    assert f"several networks: took {taken}; also there: {other} (weights=NAME)" in said
    assert "not the encoder's: head (1)" in said
    assert torch.equal(encoder.norm.weight, average["norm.weight"])
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, average["blocks.0.attn.qkv.weight"])
    for name, weights in ((taken, average), (other, last)):
        chosen = load_encoder(tmp_path / "both.pth", layout="timm", heads=2, weights=name)
        assert torch.equal(chosen.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
        assert "several networks" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="both.pth: holds no prototypes"):
        load_encoder(tmp_path / "both.pth", layout="timm", heads=2, weights="prototypes")


def test_networks_that_nothing_tells_apart_are_asked_for(tmp_path: Path) -> None:
    torch.save(under("left.", plain_vit(0)) | under("right.", plain_vit(1)), tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"both.pth: holds several networks .left, right.\. Name one: weights="):
        load_encoder(tmp_path / "both.pth", heads=2)
    chosen = load_encoder(tmp_path / "both.pth", heads=2, weights="right")
    assert torch.equal(chosen.blocks[0].attn.qkv.weight, plain_vit(1)["blocks.0.attn.qkv.weight"])


def test_the_command_takes_a_network_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": plain_vit(0), "model_ema": plain_vit(1)}, tmp_path / "both.pth")
    words = ["import", str(tmp_path / "both.pth"), str(tmp_path / "out"), "--heads", "2", "--weights", "model"]
    assert main(words) == 0
    assert torch.equal(load_encoder(tmp_path / "out").patch_embed.proj.weight, plain_vit(0)["patch_embed.proj.weight"])
    assert json.loads((tmp_path / "out/encoder.json").read_text())["provenance"]["weights"] == "model"


def test_a_backbone_of_timms_names_is_taken_for_dinos_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(under("backbone.", plain_vit()), tmp_path / "one.pth")
    assert load_encoder(tmp_path / "one.pth", heads=2).settings.interpolate_offset == 0.1
    assert "layout: taken for DINO's, as its names begin with backbone" in capsys.readouterr().out


def test_a_released_model_may_have_a_prefix_too(tmp_path: Path) -> None:
    weights = weights_of("mae")
    torch.save({"model": under("module.", weights)}, tmp_path / "full.pth")
    official = mae_to_state(load_mae(tmp_path / "full.pth", heads=4, decoder_heads=4))
    assert all(torch.equal(official[key], value) for key, value in weights.items())


# ---- what is missing, and what no file says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost",
    ["pos_embed", "norm.weight norm.bias", "cls_token", "blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias",
     "blocks.1.mlp.fc1.bias", "blocks.0.norm1.bias"],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["mae", "dino", "dinov2", "openai_igpt", "transformers"])
def test_a_file_that_lacks_what_its_family_has_is_refused(tmp_path: Path, layout: str, lost: str) -> None:
    names = {
        "openai_igpt": {"pos_embed": "wpe.weight", "norm.weight": "ln_f.weight", "blocks.0.attn.qkv.bias":
                        "h.0.attn.c_attn.bias", "blocks.1.attn.qkv.bias": "h.1.attn.c_attn.bias",
                        "blocks.1.mlp.fc1.bias": "h.1.mlp.c_fc.bias"},
        "transformers": {"pos_embed": "embeddings.position_embeddings", "norm.weight": "layernorm.weight",
                         "norm.bias": "layernorm.bias", "cls_token": "embeddings.cls_token",
                         "blocks.0.attn.qkv.bias": "encoder.layer.0.attention.attention.key.bias",
                         "blocks.1.attn.qkv.bias": "encoder.layer.1.attention.attention.key.bias",
                         "blocks.1.mlp.fc1.bias": "encoder.layer.1.intermediate.dense.bias",
                         "blocks.0.norm1.bias": "encoder.layer.0.layernorm_before.bias"},
    }.get(layout)  # fmt: skip
    weights = weights_of(layout)
    prefix = "transformer." if "transformer.wte.weight" in weights else ""
    gone = {prefix + (name if names is None else names.get(name, "")) for name in lost.split()} & weights.keys()
    if not gone:
        assert layout == "openai_igpt"  # has no such part
        return
    torch.save({key: value for key, value in weights.items() if key not in gone}, tmp_path / "lossy.pth")
    with pytest.raises(ValueError, match="missing"):
        load_encoder(tmp_path / "lossy.pth", layout=layout, heads=HEADS[layout])


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("pos_embed", "without positions, registers"), ("norm.weight norm.bias", "without last norm, registers"),
        ("blocks.1.", "inferred from the weights: 1 blocks of width"), ("nothing", "2 blocks of width"),
    ],
)  # fmt: skip
def test_what_a_file_in_timms_names_was_taken_for_is_said(
    tmp_path: Path, lost: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    weights = ViTEncoder(EncoderSettings(image_size=16, patch=4, width=32, depth=2, heads=2)).state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith(tuple(lost.split()))}
    torch.save(kept, tmp_path / "vit.pth")
    load_encoder(tmp_path / "vit.pth", heads=2)
    assert said in capsys.readouterr().out


def test_biases_of_some_blocks_are_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = weights_of("transformers")
    biases = [key for key in weights if key.endswith(("query.bias", "key.bias", "value.bias"))]
    torch.save({key: value for key, value in weights.items() if key not in biases}, tmp_path / "none.pth")
    assert not load_encoder(tmp_path / "none.pth", heads=2).blocks[0].attn.qkv.bias.any()
    assert "biases: the file has none of queries, keys and values; they are zero" in capsys.readouterr().out
    torch.save({key: value for key, value in weights.items() if key not in biases[:3]}, tmp_path / "some.pth")
    with pytest.raises(ValueError, match="blocks.0.attn.qkv.bias. is missing"):
        load_encoder(tmp_path / "some.pth", heads=2)


@pytest.mark.parametrize(("layout", "who"), [("mae", "MAE"), ("dino", "DINO"), ("dinov2", "DINOv2")])
def test_released_files_are_evaluated_as_by_their_authors(
    tmp_path: Path, layout: str, who: str, capsys: pytest.CaptureFixture
) -> None:
    """224 of 256 pixels, bicubic, ImageNet's mean and deviation, unless the user says otherwise."""
    torch.save(weights_of(layout), tmp_path / "released.pth")
    found = load_encoder(tmp_path / "released.pth", layout=layout, heads=HEADS[layout]).settings
    assert (found.crop_mode, found.crop_fraction, found.interpolation) == ("center", 224 / 256, "bicubic")
    assert (found.mean, found.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert f"preprocessing: not in the file; as in {who}'s own evaluation: mean 0.485" in capsys.readouterr().out
    told = {"crop_fraction": 1.0, "mean": [0.1, 0.2, 0.3]}
    found = load_encoder(tmp_path / "released.pth", layout=layout, heads=HEADS[layout], **told).settings
    assert (found.crop_fraction, found.mean) == (1.0, [0.1, 0.2, 0.3])
    assert "std 0.229, 0.224, 0.225; bicubic" in capsys.readouterr().out


def test_how_images_reach_an_igpt_without_its_processor_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(weights_of("openai_igpt"), tmp_path / "igpt.pth")
    found = load_encoder(tmp_path / "igpt.pth", heads=4).settings
    assert (found.mean, found.crop_mode, found.crop_fraction) == ([0.5] * 3, "center", 1.0)
    said = (
        "preprocessing: not in the file; assumed: mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5; bicubic; the largest centered"
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "size", "expected", "said"),
    [
        ("vit_small_patch4_16_augreg_in21k.pth", 16, ([0.5] * 3, "bicubic", 0.9), "as timm's augreg models"),
        ("my-augreg.pth", 384, ([0.5] * 3, "bicubic", 1.0), "as timm's augreg models"),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k.pth", 16, ([0.5] * 3, "bicubic", 16 / 17), "as timm's vit_b"),
        ("vit_base_patch16_224_miil.in21k.pth", 16, ([0.0] * 3, "bilinear", 16 / 18), "as timm's vit_ba"),
        ("vit.pth", 16, ([0.485, 0.456, 0.406], "bicubic", 1.0), "assumed: mean 0.485"),
    ],
)  # fmt: skip
def test_the_name_of_a_file_says_how_its_model_is_fed(
    tmp_path: Path, name: str, size: int, expected: tuple, said: str, capsys: pytest.CaptureFixture
) -> None:
    settings = EncoderSettings(image_size=size, patch=size // 4, width=16, depth=1, heads=2)
    torch.save(ViTEncoder(settings).state_dict(), tmp_path / name)
    found = load_encoder(tmp_path / name, layout="timm", heads=2).settings
    assert (found.mean, found.interpolation, found.crop_fraction) == expected
    assert f"preprocessing: not in the file; {said}" in capsys.readouterr().out


# ---- transformers without its folder -----------------------------------------------------------------------------


def model_of(kind: str, head: bool = False):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    more = {"ViT": {"intermediate_size": 128}, "Dinov2": {}, "Dinov2WithRegisters": {"num_register_tokens": 2},
            "SwiGLU": {"use_swiglu_ffn": True}}[kind]  # fmt: skip
    kind = "Dinov2" if kind == "SwiGLU" else kind
    config = getattr(transformers, f"{kind}Config")(**shape | more)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}{'ForImageClassification' if head else 'Model'}")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("form", ["written by transformers", "a saved state_dict"])
@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters", "SwiGLU"])
def test_weights_of_transformers_alone(
    tmp_path: Path, kind: str, has_head: bool, form: str, capsys: pytest.CaptureFixture
) -> None:
    model = model_of(kind, has_head)
    file = tmp_path / "alone.safetensors"
    if form == "written by transformers":
        model.save_pretrained(tmp_path / "folder")
        (tmp_path / "folder" / "model.safetensors").rename(file)
    else:
        save_file(model.state_dict(), file)
    encoder = load_encoder(file, heads=4)
    said = capsys.readouterr().out
    assert "no config.json of transformers was read" in said
    assert ("classifier (2)" in said) == has_head
    images = torch.randn(2, 3, 28, 28)
    inner = getattr(model, model.base_model_prefix) if has_head else model
    torch.testing.assert_close(encoder(images), inner(images).last_hidden_state, atol=1e-5, rtol=1e-4)
    found = encoder.settings
    assert found.mean == ([0.5] * 3 if kind == "ViT" else [0.485, 0.456, 0.406])
    crop = ("squash", 1.0, "bilinear", 1e-12) if kind == "ViT" else ("center", 0.875, "bicubic", 1e-6)
    assert (found.crop_mode, found.crop_fraction, found.interpolation, found.norm_eps) == crop


@torch.no_grad()
def test_a_file_of_transformers_beside_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = model_of("ViT")
    model.config.layer_norm_eps = 0.1  # in config.json alone
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [1] * 3})
    )
    encoder = load_encoder(tmp_path / "model.safetensors")
    assert "model.safetensors: read with config.json beside it" in capsys.readouterr().out
    assert (encoder.settings.heads, encoder.settings.norm_eps) == (4, 0.1)
    assert encoder.settings.mean == [0.4, 0.5, 0.6]


def hub_folder(tmp_path: Path) -> Path:
    """As the hub's cache keeps a model: snapshots of links to blobs."""
    folder = tmp_path / "models--me--vit"
    model_of("Dinov2").save_pretrained(folder / "blobs")
    for snapshot in ("aaaa", "bbbb"):
        (folder / "snapshots" / snapshot).mkdir(parents=True)
        for file in (folder / "blobs").iterdir():
            (folder / "snapshots" / snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbbb")
    return folder


def test_a_folder_of_the_hubs_cache(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = hub_folder(tmp_path)
    assert load_encoder(folder).settings.heads == 4
    assert "models--me--vit: snapshot bbbb" in capsys.readouterr().out
    assert load_encoder(folder / "snapshots" / "aaaa").settings.heads == 4
    assert main(["import", str(folder), str(tmp_path / "out")]) == 0
    (folder / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(ValueError, match="models--me--vit: which snapshot.*aaaa, bbbb"):
        load_encoder(folder)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_a_refusal_names_what_is_there_and_the_nearest_layout(tmp_path: Path) -> None:
    weights = under("model.", plain_vit())
    del weights["model.patch_embed.proj.weight"]
    torch.save(weights, tmp_path / "half.pth")
    with pytest.raises(
        ValueError,
        match=r"half.pth: no known layout has these weights \(model.blocks.0.*Nearest: timm, 17 of 18 names there; "
        r"missing: patch_embed.proj.weight\. Known: mae",
    ):
        load_encoder(tmp_path / "half.pth", heads=2)
    torch.save({"layer1.0.conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth: no known layout.*\(fc.weight, layer1.*, ...\)\. Known"):
        load_encoder(tmp_path / "resnet.pth")
    torch.save(weights_of("openai_igpt"), tmp_path / "igpt.pth")
    with pytest.raises(ValueError, match="igpt.pth: layout dinov2: .*is missing. Nearest: openai_igpt, 12 of 13 names"):
        load_encoder(tmp_path / "igpt.pth", layout="dinov2")


def test_names_from_files_cannot_forge_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = under("evil\nsslvit: done\x1b[2J.", plain_vit())
    torch.save(weights, tmp_path / "evil.pth")
    load_encoder(tmp_path / "evil.pth", heads=2)
    torch.save(weights | {"evil\nsslvit: done\x1b[2J.blocks.0.\nodd": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"unknown: blocks.0.\\x0aodd") as refused:
        load_encoder(tmp_path / "odd.pth", heads=2)
    said = capsys.readouterr().out + str(refused.value)
    assert "\x1b" not in said
    assert not any(line.startswith("sslvit: done") for line in said.splitlines())


def test_a_folder_without_an_encoder_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(FileNotFoundError, match="holds no encoder .*there is readme.md"):
        load_encoder(tmp_path)
