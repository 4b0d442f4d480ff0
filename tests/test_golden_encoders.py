"""The shared encoder against numbers of the papers' released code, read through the layouts."""

from __future__ import annotations

import pytest
import torch
from golden_fixtures import Golden

from sslvit.layouts import from_sslvit, to_sslvit
from sslvit.models import ViTEncoder
from sslvit.models.positions import resample_table, sincos_2d


def encoder_of(golden: Golden, layout: str, heads: int, prefix: str = "param/", **changes) -> tuple[ViTEncoder, dict]:
    converted = to_sslvit(golden.under(prefix), layout, heads, **changes)
    encoder = ViTEncoder(converted.settings)
    encoder.load_state_dict(converted.encoder)
    return encoder.eval(), converted.extras


WAYS = {
    "mae": ["mae_model", "mae_encoder_features_cls", "mae_encoder_features_gap"],
    "dino": ["dino_vit"],
    "dinov2": ["dinov2_vit_offset", "dinov2_vit_reg4", "dinov2_vit_swiglu"],
    "timm": [
        f"timm_vit_{name}" for name in ("token", "avg", "noclass_avg", "reg4_dynamic", "reg4_noembed", "ls_qknorm")
    ],
    "openai_igpt": ["igpt_model", "igpt_model_nobias"],
}


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in WAYS.items() for name in names])
def test_there_and_back_again_changes_no_tensor(layout: str, name: str) -> None:
    official = Golden(name).under("param/")
    converted = to_sslvit(official, layout, heads=4 if layout in ("mae", "openai_igpt") else 3)
    encoder = ViTEncoder(converted.settings)
    encoder.load_state_dict(converted.encoder)
    back = from_sslvit(encoder.state_dict(), layout, converted.extras)
    # the released iGPT has no biases for queries, keys and values; transformers' module has, so zeros are written
    added = back.keys() - official.keys()
    assert all(key.endswith("attn.c_attn.bias") and not back[key].any() for key in added)
    assert official.keys() <= back.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_full_checkpoints_of_dino_there_and_back_again() -> None:
    golden = Golden("dino_train_steps")
    for network in ("student", "teacher"):
        official = golden.under(f"param/{network}.")
        converted = to_sslvit(official, "dino", heads=golden.config["vit"]["num_heads"])
        back = from_sslvit(converted.encoder, "dino", converted.extras)
        assert {key.removeprefix("module."): value for key, value in official.items()}.keys() == back.keys()
        assert all(torch.equal(back[key.removeprefix("module.")], value) for key, value in official.items())


def check_small_tokens(golden: Golden, encoder: ViTEncoder, norm: torch.nn.Module) -> None:
    """Tokens of tiny variance show a wrong eps."""
    tokens = golden["input/probe_tokens"]
    golden.check("output/probe_block0", encoder.blocks[0](tokens))
    golden.check("output/probe_norm", norm(tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mae_encoder_features_cls", "mae_encoder_features_gap"])
def test_downstream_vit_of_mae(name: str) -> None:
    golden = Golden(name)
    encoder, head = encoder_of(golden, "mae", heads=golden.config["num_heads"])
    images = golden["input/imgs"]
    features = encoder.features(images)
    golden.check("output/features", features)
    golden.check("output/logits", features @ head["head.weight"].T + head["head.bias"])
    for i, tokens in enumerate(encoder.layers(images, [1, 2])):
        golden.check(f"output/block_{i}", tokens)
    check_small_tokens(golden, encoder, encoder.fc_norm if golden.config["global_pool"] else encoder.norm)


@torch.no_grad()
def test_position_tables_of_mae() -> None:
    golden = Golden("mae_pos_embed")
    for grid in golden.config["grids"]:
        for width in golden.config["dims"]:
            table = sincos_2d((grid, grid), width)
            for prefix in (0, 1):
                key = f"output/sincos/grid{grid}_dim{width}_cls{prefix}"
                if key in golden:
                    torch.testing.assert_close(
                        torch.cat([table.new_zeros(prefix, width), table]), golden[key], atol=1e-9, rtol=1e-6
                    )
    for old, new in golden.config["interp"]:
        table = golden[f"input/interp/{old}to{new}"][0]
        stretched = resample_table(table[1:], (old, old), (new, new), antialias=False)
        expected = golden[f"output/interp/{old}to{new}"][0]
        torch.testing.assert_close(torch.cat([table[:1], stretched]), expected, atol=1e-6, rtol=0)


def test_vit_of_dino() -> None:
    golden = Golden("dino_vit")
    encoder, _ = encoder_of(golden, "dino", heads=golden.config["num_heads"])
    depth = golden.config["depth"]
    for case in golden.config["cases"]:
        images = golden[f"input/{case}"]
        with torch.no_grad():
            tokens = encoder(images)
            golden.check(f"output/{case}/cls", tokens[:, 0])
            layers = [encoder.norm(layer) for layer in encoder.layers(images, list(range(1, depth + 1)))]
            for j, layer in enumerate(layers):
                if f"output/{case}/intermediate_{j}" in golden:
                    golden.check(f"output/{case}/intermediate_{j}", layer)
            attention = encoder.attention(images, depth)
            prefix, patches = encoder.position_table(encoder.settings.grid_of(*images.shape[2:]))
        golden.check(f"output/{case}/pos_embed", torch.cat([prefix, patches])[None])
        if f"output/{case}/last_selfattention" in golden:
            golden.check(f"output/{case}/last_selfattention", attention)
        else:
            golden.check(f"output/{case}/last_selfattention_cls_row", attention[:, :, 0])
        if case == "train":
            classes = torch.cat([layer[:, 0] for layer in layers], 1)
            golden.check("output/train/linear_feats_n4", classes)
            golden.check("output/train/linear_feats_n1", layers[-1][:, 0])
            both = torch.stack([layers[-1][:, 0], layers[-1][:, 1:].mean(1)], 2).flatten(1)
            golden.check("output/train/linear_feats_n1_avgpool", both)
    with torch.no_grad():
        check_small_tokens(golden, encoder, encoder.norm)
    (encoder(golden["input/local"])[:, 0] * golden["input/cotangent_local"]).sum().backward()
    gradients = dict(encoder.named_parameters())
    for key in golden.keys_under("grad/"):
        golden.check(f"grad/{key}", gradients[key].grad)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_vit_offset", "dinov2_vit_reg4", "dinov2_vit_swiglu"])
def test_vit_of_dinov2(name: str) -> None:
    golden = Golden(name)
    config = golden.config
    encoder, _ = encoder_of(
        golden, "dinov2", config["num_heads"],
        interpolate_offset=config["interpolate_offset"], interpolate_antialias=config["interpolate_antialias"],
    )  # fmt: skip
    prefix, depth = encoder.prefix, config["depth"]
    assert encoder.settings.registers == config["num_register_tokens"]
    for case in config["cases"]:
        masks = [None] + ([golden[f"input/{case}_masks"]] if f"input/{case}_masks" in golden else [])
        for hidden in masks:
            images = golden[f"input/{case}"]
            name_of_case = case if hidden is None else f"{case}_masked"
            tokens = encoder(images, hidden=hidden)
            golden.check(f"output/{name_of_case}/x_norm_clstoken", tokens[:, 0])
            golden.check(f"output/{name_of_case}/x_norm_patchtokens", tokens[:, prefix:])
            if encoder.settings.registers:
                golden.check(f"output/{name_of_case}/x_norm_regtokens", tokens[:, 1:prefix])
        layers = encoder.layers(images, [depth - 1, depth])
        golden.check(f"output/{case}/x_prenorm", layers[-1])
        for j, layer in enumerate(layers):
            golden.check(f"output/{case}/inter_{j}", encoder.norm(layer)[:, prefix:])
            golden.check(f"output/{case}/inter_cls_{j}", encoder.norm(layer)[:, 0])
        row, patches = encoder.position_table(encoder.settings.grid_of(*images.shape[2:]))
        golden.check(f"output/{case}/pos_embed", torch.cat([row, patches])[None])
    check_small_tokens(golden, encoder, encoder.norm)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["token", "avg", "noclass_avg", "reg4_dynamic", "reg4_noembed", "ls_qknorm"],
)
def test_vit_of_timm(name: str) -> None:
    golden = Golden(f"timm_vit_{name}")
    encoder, head = encoder_of(golden, "timm", heads=golden.config["model"]["num_heads"])
    for case in golden.config["cases"]:
        images = golden[f"input/{case}"]
        golden.check(f"output/{case}/features", encoder(images))
        pooled = encoder.features(images)
        golden.check(f"output/{case}/pre_logits", pooled)
        golden.check(f"output/{case}/logits", pooled @ head["head.weight"].T + head["head.bias"])
        for i, tokens in enumerate(encoder.layers(images, [1, 2])):
            golden.check(f"output/{case}/block_{i}", tokens)
    check_small_tokens(golden, encoder, encoder.fc_norm if encoder.settings.fc_norm else encoder.norm)
    if name == "ls_qknorm":
        heads = golden["input/probe_heads"]
        golden.check("output/probe_q_norm", encoder.blocks[0].attn.q_norm(heads))
        golden.check("output/probe_k_norm", encoder.blocks[0].attn.k_norm(heads))


@torch.no_grad()
@pytest.mark.parametrize("name", ["igpt_model", "igpt_model_nobias"])
def test_encoder_of_igpt(name: str) -> None:
    golden = Golden(name)
    depth = golden.config["n_layer"]
    encoder, head = encoder_of(golden, "openai_igpt", heads=golden.config["n_head"])
    palette = encoder.patch_embed.palette
    pixels = golden["input/pixels"]
    colours = palette[pixels].view(2, 8, 8, 3).permute(0, 3, 1, 2)
    images = (colours / 2 + 0.5 - encoder.patch_embed.mean) / encoder.patch_embed.std
    assert torch.equal(encoder.patch_embed.indices(images), pixels)
    layers = encoder.layers(images, list(range(depth + 1)))
    for i, tokens in enumerate(layers):
        golden.check(f"output/hidden_{i}", tokens)
        if i:
            golden.check(f"output/probe_{i}", encoder.features(images, layer=i))
    golden.check("output/probe_0", encoder.blocks[0].norm1(layers[0]).mean(1))
    last = encoder(images)
    golden.check("output/ln_f", last)
    logits = last @ head["head.weight"].T
    golden.check("output/logits", logits)
    golden.check("output/probe_norm", encoder.blocks[0].norm1(golden["input/probe_tokens"]))
    if name == "igpt_model_nobias":
        golden.check("output/official_tf/logits", logits)
