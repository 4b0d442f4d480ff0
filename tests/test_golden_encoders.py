"""The shared encoder against numbers of the papers' released code, read through the layouts."""

from __future__ import annotations

import pytest
import torch
from golden_fixtures import Golden, check_shape, looks_at

from sslvit.layouts import from_sslvit, to_sslvit
from sslvit.models import ViTEncoder
from sslvit.models.positions import resample_table, sincos_2d
from sslvit.settings import EncoderSettings


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


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0, 4.0, 5.5])
@pytest.mark.parametrize(
    ("layout", "mlp"), [("dinov2", "swiglu"), ("dinov2", "gelu"), ("dino", "gelu"), ("timm", "gelu")]
)
def test_the_width_of_the_mlp_is_read_from_its_weights(layout: str, mlp: str, ratio: float) -> None:
    """DINOv2's rule rounds the width of a gated MLP, so several ratios may have one width; any of them will do."""
    made = ViTEncoder(
        EncoderSettings(image_size=8, patch=4, width=48, depth=1, heads=3, mlp=mlp, mlp_ratio=ratio, layer_scale=0.5)
    )
    read = to_sslvit(from_sslvit(made.state_dict(), layout, {}), layout, heads=3)
    assert (read.settings.mlp, read.settings.mlp_width) == (mlp, made.settings.mlp_width)
    if mlp == "gelu" or ratio == 4:
        assert read.settings.mlp_ratio == ratio
    images = torch.randn(2, 3, 8, 8)
    again = ViTEncoder(read.settings)
    again.load_state_dict(read.encoder)
    torch.testing.assert_close(again.eval()(images), made.eval()(images))


def check_small_tokens(golden: Golden, encoder: ViTEncoder, norm: torch.nn.Module) -> None:
    """Tokens of tiny variance show a wrong eps."""
    tokens = golden["input/probe_tokens"]
    golden.check("output/probe_block0", encoder.blocks[0](tokens))
    golden.check("output/probe_norm", norm(tokens))


@looks_at(["mae_encoder_features_cls", "mae_encoder_features_gap"], "*")
@torch.no_grad()
def test_downstream_vit_of_mae(golden: Golden) -> None:
    encoder, head = encoder_of(golden, "mae", heads=golden.config["num_heads"])
    check_shape(golden.config, encoder.settings)
    images = golden["input/imgs"]
    assert len(images) == golden.config["batch"]
    assert len(head["head.weight"]) == golden.config["num_classes"]
    features = encoder.features(images)
    golden.check("output/features", features)
    golden.check("output/logits", features @ head["head.weight"].T + head["head.bias"])
    for i, tokens in enumerate(encoder.layers(images, [1, 2])):
        golden.check(f"output/block_{i}", tokens)
    check_small_tokens(golden, encoder, encoder.fc_norm if golden.config["global_pool"] else encoder.norm)


@looks_at("mae_pos_embed", "*")
@torch.no_grad()
def test_position_tables_of_mae(golden: Golden) -> None:
    for grid in golden.config["grids"]:
        for width in golden.config["dims"]:
            table = sincos_2d((grid, grid), width)
            for prefix in (0, 1):
                key = f"output/sincos/grid{grid}_dim{width}_cls{prefix}"
                if key in golden:
                    torch.testing.assert_close(
                        torch.cat([table.new_zeros(prefix, width), table]), golden[key], atol=1e-9, rtol=1e-6
                    )
    plain = Golden("mae_encoder_features_cls").under("param/")
    for old, new in golden.config["interp"]:
        table = golden[f"input/interp/{old}to{new}"]
        assert table.shape == (1, 1 + old * old, golden.config["interp_dim"])
        stretched = resample_table(table[0, 1:], (old, old), (new, new), antialias=False)
        expected = golden[f"output/interp/{old}to{new}"]
        torch.testing.assert_close(torch.cat([table[0, :1], stretched]), expected[0], atol=1e-6, rtol=0)
        # the same by an encoder that was read from MAE's weights, whose channels beyond these have zeros
        rows = torch.nn.functional.pad(table, (0, plain["cls_token"].shape[2] - table.shape[2]))
        converted = to_sslvit(plain | {"pos_embed": rows}, "mae", heads=3)
        encoder = ViTEncoder(converted.settings)
        encoder.load_state_dict(converted.encoder)
        row, patches = encoder.position_table((new, new))
        ours = torch.cat([row, patches])[None, :, : table.shape[2]]
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@looks_at("dino_vit", "*")
def test_vit_of_dino(golden: Golden) -> None:
    encoder, _ = encoder_of(golden, "dino", heads=golden.config["num_heads"])
    check_shape(golden.config, encoder.settings)
    by_size, _ = encoder_of(golden, "dino", heads=golden.config["num_heads"], interpolate_offset=0.0)
    depth = golden.config["depth"]
    for case, (batch, *sides) in golden.config["cases"].items():
        images = golden[f"input/{case}"]
        assert images.shape == (batch, 3, *sides)
        with torch.no_grad():
            tokens = encoder(images)
            golden.check(f"output/{case}/cls", tokens[:, 0])
            layers = [encoder.norm(layer) for layer in encoder.layers(images, list(range(1, depth + 1)))]
            for j, layer in enumerate(layers):
                if f"output/{case}/intermediate_{j}" in golden:
                    golden.check(f"output/{case}/intermediate_{j}", layer)
            (last,) = encoder.intermediates(images, [depth], attention=True)
            attention = last.attention
            prefix, patches = encoder.position_table(encoder.settings.grid_of(*images.shape[2:]))
        golden.check(f"output/{case}/pos_embed", torch.cat([prefix, patches])[None])
        if f"output/{case}/pos_embed_size_variant" in golden:  # what another setting would give, and DINO did not
            with torch.no_grad():
                other = torch.cat(by_size.position_table(encoder.settings.grid_of(*images.shape[2:])))
            golden.check(f"output/{case}/pos_embed_size_variant", other[None])
            assert (other - torch.cat([prefix, patches])).abs().max() > 0.05
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


@looks_at(["dinov2_vit_offset", "dinov2_vit_reg4", "dinov2_vit_swiglu"], "*")
@torch.no_grad()
def test_vit_of_dinov2(golden: Golden) -> None:
    config = golden.config
    resampling = {"interpolate_offset": config["interpolate_offset"],
                  "interpolate_antialias": config["interpolate_antialias"]}  # fmt: skip
    # released weights do not say how their positions are resampled: with registers by size, smoothly, without
    # registers neither; only the fixture with both registers and an offset is none of the released kinds
    is_released = golden.name != "dinov2_vit_swiglu"
    encoder, _ = encoder_of(golden, "dinov2", config["num_heads"], **({} if is_released else resampling))
    settings = encoder.settings
    check_shape(config, settings)
    assert resampling == {key: getattr(settings, key) for key in resampling}
    assert settings.mlp == {"mlp": "gelu", "swiglufused": "swiglu"}[config["ffn_layer"]]
    assert settings.layer_scale == config["init_values"]
    prefix, depth = encoder.prefix, config["depth"]
    assert settings.registers == config["num_register_tokens"]
    for case, (batch, *sides) in config["cases"].items():
        masks = [None] + ([golden[f"input/{case}_masks"]] if f"input/{case}_masks" in golden else [])
        for hidden in masks:
            images = golden[f"input/{case}"]
            assert images.shape == (batch, 3, *sides)
            name_of_case = case if hidden is None else f"{case}_masked"
            tokens = encoder(images, hidden=hidden)
            golden.check(f"output/{name_of_case}/x_norm_clstoken", tokens[:, 0])
            golden.check(f"output/{name_of_case}/x_norm_patchtokens", tokens[:, prefix:])
            if settings.registers:
                golden.check(f"output/{name_of_case}/x_norm_regtokens", tokens[:, 1:prefix])
            if hidden is not None:
                before_norm: list[torch.Tensor] = []
                hook = encoder.norm.register_forward_pre_hook(lambda module, inputs, b=before_norm: b.extend(inputs))
                encoder(images, hidden=hidden)
                hook.remove()
                golden.check(f"output/{name_of_case}/x_prenorm", before_norm[0])
        layers = encoder.layers(images, [depth - 1, depth])
        golden.check(f"output/{case}/x_prenorm", layers[-1])
        for j, layer in enumerate(layers):
            golden.check(f"output/{case}/inter_{j}", encoder.norm(layer)[:, prefix:])
            golden.check(f"output/{case}/inter_cls_{j}", encoder.norm(layer)[:, 0])
        row, patches = encoder.position_table(settings.grid_of(*images.shape[2:]))
        golden.check(f"output/{case}/pos_embed", torch.cat([row, patches])[None])
    check_small_tokens(golden, encoder, encoder.norm)


@looks_at(
    ["timm_vit_token", "timm_vit_avg", "timm_vit_noclass_avg", "timm_vit_reg4_dynamic", "timm_vit_reg4_noembed",
     "timm_vit_ls_qknorm"], "*",
)  # fmt: skip
@torch.no_grad()
def test_vit_of_timm(golden: Golden) -> None:
    model = golden.config["model"]
    encoder, head = encoder_of(golden, "timm", heads=model["num_heads"])
    settings = encoder.settings
    check_shape(model, settings)
    options = {
        "class_token": settings.class_token, "global_pool": {"class": "token", "mean": "avg"}[settings.pooling],
        "reg_tokens": settings.registers, "qk_norm": settings.qk_norm, "num_classes": len(head["head.weight"]),
        "no_embed_class": settings.position_rows == 0,
        "dynamic_img_size": True,  # any size is taken, by any encoder with a table of positions
    }  # fmt: skip
    assert {key: model[key] for key in options if key in model} == {k: v for k, v in options.items() if k in model}
    assert ("init_values" in model and model["init_values"] is not None) == (settings.layer_scale is not None)
    for case, (batch, *sides) in golden.config["cases"].items():
        images = golden[f"input/{case}"]
        assert images.shape == (batch, 3, *sides)
        golden.check(f"output/{case}/features", encoder(images))
        pooled = encoder.features(images)
        golden.check(f"output/{case}/pre_logits", pooled)
        golden.check(f"output/{case}/logits", pooled @ head["head.weight"].T + head["head.bias"])
        for i, tokens in enumerate(encoder.layers(images, [1, 2])):
            golden.check(f"output/{case}/block_{i}", tokens)
    check_small_tokens(golden, encoder, encoder.fc_norm if encoder.settings.fc_norm else encoder.norm)
    if settings.qk_norm:
        heads = golden["input/probe_heads"]
        golden.check("output/probe_q_norm", encoder.blocks[0].attn.q_norm(heads))
        golden.check("output/probe_k_norm", encoder.blocks[0].attn.k_norm(heads))


@looks_at(
    ["igpt_model", "igpt_model_nobias"], "param/*", "input/*", "config/*", "output/hidden_*", "output/probe_*",
    "output/ln_f", "output/logits",
)  # fmt: skip
@torch.no_grad()
def test_encoder_of_igpt(golden: Golden) -> None:
    config = golden.config
    depth = config["n_layer"]
    encoder, head = encoder_of(golden, "openai_igpt", heads=config["n_head"])
    palette = encoder.patch_embed.palette
    pixels = golden["input/pixels"]
    shape = (len(palette) + 1, pixels.shape[1], encoder.settings.width, encoder.settings.depth, len(pixels))
    assert shape == tuple(config[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "batch"))
    # zeros are biases too; the released layout, which has none, is read in tests/tasks/test_igpt_golden.py
    has_biases = any(value.any() for key, value in golden.under("param/").items() if key.endswith(".bias"))
    assert has_biases == config["biases"]
    start = torch.full((len(pixels), 1), len(palette))
    assert torch.equal(golden["input/input_ids"], torch.cat([start, pixels[:, :-1]], 1))
    colors = palette[pixels].view(2, 8, 8, 3).permute(0, 3, 1, 2)
    images = (colors / 2 + 0.5 - encoder.patch_embed.mean) / encoder.patch_embed.std
    assert torch.equal(encoder.patch_embed.quantize(images), pixels)
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
    if golden.name == "igpt_model_nobias":
        golden.check("output/official_tf/logits", logits)
