"""How weights move, beyond the fixtures of the released code."""

from __future__ import annotations

import math

import pytest
import torch

from sslvit.models import ViTEncoder
from sslvit.models.dino import DINOHead
from sslvit.models.mae import MAEDecoder
from sslvit.optim import cosine, ema_update, layer_decay_groups, warmup_cosine, warmup_stable_decay
from sslvit.optim.groups import layer_of
from sslvit.optim.guard import clip_by_global_norm, clip_by_parameter_norm, grad_norms
from sslvit.optim.lars import LARS
from sslvit.run_plan import RunPlan
from sslvit.settings import DINOSettings, EncoderSettings, MAESettings, OptimSettings, SupervisedSettings
from sslvit.tasks.mae import MAE
from sslvit.tasks.supervised import Supervised


@pytest.mark.parametrize(("clip", "norms"), [(clip_by_global_norm, [0.6, 0.8]), (clip_by_parameter_norm, [1.0, 1.0])])
def test_long_gradients_are_shortened_and_short_ones_left_alone(clip, norms: list[float]) -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 4.0]])]
    clip(gradients, grad_norms(gradients), 1.0)
    torch.testing.assert_close(grad_norms(gradients), torch.tensor(norms))
    before = [gradient.clone() for gradient in gradients]
    clip(gradients, grad_norms(gradients), 100.0)
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))


def test_every_part_in_front_of_the_blocks_counts_as_the_first_layer() -> None:
    """Of an encoder with all of them; what is behind the blocks moves at the full rate."""
    encoder = ViTEncoder(EncoderSettings(
        image_size=16, patch=4, width=24, depth=2, heads=2, registers=2, mask_token=True, pos_embed="learned_2d",
        prefix_positions="all", fc_norm=True, pooling="attention", pre_norm=True, pool_mlp=True,
    ))  # fmt: skip
    layers = {name.split(".")[0]: layer_of(name, 2) for name, _ in encoder.named_parameters() if "blocks" not in name}
    assert {name for name, layer in layers.items() if layer == 0} == {
        "cls_token", "reg_token", "mask_token", "patch_embed", "pos_embed_prefix", "pos_embed_row", "pos_embed_column",
        "norm_pre",
    }  # fmt: skip
    assert {name for name, layer in layers.items() if layer == 3} == {"norm", "attn_pool", "fc_norm"}
    groups = layer_decay_groups(encoder.named_parameters(), 2, 0.05, 0.5)
    assert {group["lr_scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.parameters()))


def test_curves_end_where_they_end() -> None:
    assert cosine(5, 1.0, 0.2, 10) == pytest.approx(0.6)
    assert [cosine(step, 1.0, 0.2, 10) for step in (10, 11, 15)] == pytest.approx([0.2] * 3)
    assert warmup_cosine(30, 1.0, 0.1, 5, 20) == pytest.approx(0.1)
    assert warmup_cosine(0, 1.0, 0.1, 0, 0) == pytest.approx(1.0)


def test_a_recipes_rate_is_for_256_images_and_its_warmup_no_longer_than_the_run() -> None:
    optim = OptimSettings(base_lr=1e-3, warmup_epochs=2.5)
    assert [optim.peak_lr(batch) for batch in (64, 256, 4096)] == pytest.approx([2.5e-4, 1e-3, 1.6e-2])
    assert (optim.warmup_steps(10, 100), optim.warmup_steps(10, 20)) == (25, 20)
    assert math.isclose(OptimSettings(warmup_epochs=None).fitted(10, 1000).warmup_epochs, 10)


EVERYTHING = [  # together they have every kind of parameter
    {"registers": 2, "mask_token": True, "pos_embed": "learned_2d", "prefix_positions": "all", "fc_norm": True,
     "pooling": "attention", "qk_norm": True, "layer_scale": 0.1},
    {"pos_embed": "learned_1d", "mlp": "swiglu", "locality_self_attention": True},
    {"pos_embed": "relative_bias", "tokens": "conv_stem"},
    {"pos_embed": "none", "tokens": "hybrid", "hybrid_backbone": "resnet18"},
    {"pos_embed": "sincos_2d", "tokens": "shifted_patch", "norm": "rms"},
    {"tokens": "pixel", "patch": 1, "image_size": 4, "class_token": False, "prefix_positions": "none",
     "pooling": "mean", "causal": True},
]  # fmt: skip
MATRICES = {  # weights of maps: what is left of a parameter's name when numbers are taken out
    "patch_embed.proj.weight", "patch_embed.embed.weight", "patch_embed.stem.weight", "patch_embed.cnn.weight",
    "patch_embed.cnn.conv.weight", "blocks.attn.qkv.weight",
    "blocks.attn.proj.weight", "blocks.mlp.fc.weight", "attn_pool.kv.weight", "attn_pool.proj.weight",
}  # fmt: skip
TOKENS_AND_TABLES = {
    "cls_token", "reg_token", "mask_token", "pos_embed", "pos_embed_prefix", "pos_embed_row", "pos_embed_column",
    "patch_embed.start_token", "attn_pool.query",
}  # fmt: skip


def kind_of(name: str) -> str:
    """A parameter's name without numbers."""
    return ".".join(part for word in name.split(".") if (part := word.rstrip("0123456789")))


def decaying_kinds(groups: list[dict], named: dict[str, torch.nn.Parameter]) -> set[str]:
    """Kinds of the parameters that decay; every trained parameter must be in exactly one group."""
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in named.values())
    decayed = {id(p) for group in groups if group["decays"] for p in group["params"]}
    assert all((group["weight_decay"] > 0) == group["decays"] for group in groups)
    kinds = {kind_of(name) for name, p in named.items() if id(p) in decayed and p.ndim > 1}
    vectors = [name for name, p in named.items() if p.ndim == 1]
    assert not decayed & {id(named[name]) for name in vectors}
    others = {kind_of(name) for name, p in named.items() if id(p) not in decayed and p.ndim > 1}
    assert not kinds & others
    return kinds


def test_only_maps_decay_in_fine_tuning_and_in_pretraining_tokens_and_added_tables_too() -> None:
    seen = set()
    for changes in EVERYTHING:
        options = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2} | changes
        encoder = ViTEncoder(EncoderSettings(**options))
        named = dict(encoder.named_parameters())
        every = {kind_of(name) for name, p in named.items() if p.ndim > 1}
        seen |= every
        assert decaying_kinds(layer_decay_groups(named.items(), 2, 0.05, 0.5), named) == every & MATRICES
        kinds = decaying_kinds(layer_decay_groups(named.items(), 2, 0.05, spared=()), named)
        assert kinds == every & (MATRICES | TOKENS_AND_TABLES)
    assert seen == MATRICES | TOKENS_AND_TABLES | {"blocks.attn.scale", "blocks.attn.rel_pos.table"}


def test_decoders_and_heads_decay_as_the_papers_code_has_it() -> None:
    encoder = EncoderSettings(image_size=16, patch=4, width=24, depth=1, heads=2)
    decoder = MAEDecoder(encoder, MAESettings(decoder_width=8, decoder_depth=1, decoder_heads=2))
    named = dict(decoder.named_parameters())
    assert decaying_kinds(layer_decay_groups(named.items(), 1, 0.1, spared=()), named) == {
        "embed.weight", "mask_token", "blocks.attn.qkv.weight", "blocks.attn.proj.weight", "blocks.mlp.fc.weight",
        "pred.weight",
    }  # fmt: skip
    head = DINOHead(24, DINOSettings(out_dim=8, head_width=8, bottleneck=4, batch_norm=True, norm_last_layer=False))
    named = dict(head.named_parameters())
    assert decaying_kinds(layer_decay_groups(named.items(), 1, 0.1, spared=()), named) == {
        "mlp.weight", "last_layer.weight_g", "last_layer.weight_v",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["reg_token", "mask_token", "cls_token", "pos_embed", "pos_embed_prefix",
                                  "pos_embed_row", "pos_embed_column", "patch_embed.start_token"])  # fmt: skip
def test_tokens_and_tables_move_at_the_lowest_rate(name: str) -> None:
    (group,) = layer_decay_groups([(name, torch.nn.Parameter(torch.zeros(1, 2, 8)))], 3, 0.05, 0.5)
    assert (group["lr_scale"], group["decays"]) == (0.5**4, False)


@pytest.mark.parametrize("kind", ["supervised", "pretraining"])
def test_a_decay_that_grows_from_zero_reaches_matrices_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = EncoderSettings(image_size=8, patch=4, width=16, depth=2, heads=2)
    optim = OptimSettings(weight_decay=0.0, final_weight_decay=0.2)
    settings = SupervisedSettings(classes=3) if kind == "supervised" else MAESettings(decoder_width=16, decoder_heads=2)
    task = (Supervised if kind == "supervised" else MAE)(settings, encoder, optim, RunPlan(10, 5, 8))
    optimizer = task.configure_optimizers()
    monkeypatch.setattr(type(task), "global_step", 5)
    task.optimizer_step(0, 0, optimizer)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    spared = ("encoder.cls_token", "encoder.pos_embed") if kind == "supervised" else ()
    for name, parameter in task.model.named_parameters():
        is_decayed = parameter.ndim > 1 and name not in spared
        assert decay_of[id(parameter)] == pytest.approx(0.1 if is_decayed else 0), name  # half a cosine of 0 to 0.2


@pytest.mark.parametrize("on_host", [True, False])
def test_averages_move_by_hand_and_leave_the_source_alone(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the number that says so is at hand, or on a device that is not waited for."""
    monkeypatch.setattr("sslvit.optim.ema.is_on_host", lambda value: on_host)
    average, source = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    before = [parameter.detach().clone() for parameter in average.parameters()]
    theirs = [parameter.detach().clone() for parameter in source.parameters()]
    ema_update(average, source, 0.9, torch.ones(()))
    assert all(torch.equal(now, old) for now, old in zip(average.parameters(), before, strict=True))
    ema_update(average, source, 0.9, torch.zeros(()))
    for now, old, other in zip(average.parameters(), before, theirs, strict=True):
        torch.testing.assert_close(now.detach(), 0.9 * old + 0.1 * other)
    assert all(torch.equal(now, old) for now, old in zip(source.parameters(), theirs, strict=True))


def test_lars_by_hand() -> None:
    """A matrix's step is `trust` of its own norm; vectors take their gradient; momentum comes before the rate."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))
    optimizer = LARS([matrix, vector], lr=0.5, weight_decay=0.1, momentum=0.8, trust=0.02)
    weights, moments = [matrix.detach().clone(), vector.detach().clone()], [torch.zeros(3, 4), torch.zeros(4)]
    for rate in (0.5, 0.25):
        gradients = [torch.randn(3, 4), torch.randn(4)]
        matrix.grad, vector.grad = (gradient.clone() for gradient in gradients)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        change = gradients[0] + 0.1 * weights[0]
        changes = [change * 0.02 * weights[0].norm() / change.norm(), gradients[1]]
        moments = [0.8 * moment + change for moment, change in zip(moments, changes, strict=True)]
        weights = [weight - rate * moment for weight, moment in zip(weights, moments, strict=True)]
        torch.testing.assert_close(matrix.detach(), weights[0])
        torch.testing.assert_close(vector.detach(), weights[1])


def test_a_warmup_rises_evenly_and_a_cosine_falls_by_its_formula() -> None:
    """MAE's: zero at first, the peak when the warm-up is over; DINO's: the peak in its last step and again after it."""
    found = [warmup_cosine(step, 2.0, 0.5, 4, 12) for step in range(13)]
    expected = [0.0, 0.5, 1.0, 1.5] + [0.5 + 1.5 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert found == pytest.approx(expected)
    twice = [warmup_cosine(step, 2.0, 0.5, 5, 13, start=0.4, twice_at_peak=True) for step in range(6)]
    assert twice == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert cosine(3, 0.9, 1.0, 12) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2)


def test_warmup_stable_decay_is_flat_and_falls_like_one_minus_a_root() -> None:
    found = [warmup_stable_decay(step, 2.0, 0.5, 4, 20, 5) for step in range(22)]
    falling = [0.5 + 1.5 * (1 - math.sqrt(step / 5)) for step in range(6)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.5] + [2.0] * 11 + falling + [0.5])
    assert [warmup_stable_decay(step, 2.0, 0.5, 4, 6, 6) for step in (3, 4)] == pytest.approx(
        [1.5, 0.5 + 1.5 * (1 - math.sqrt(4 / 6))]
    )  # a warm-up goes before a cooldown that reaches into it
