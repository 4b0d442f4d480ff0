"""How weights move, beyond the fixtures of the released code."""

from __future__ import annotations

import math

import pytest
import torch

from sslvit.models import ViTEncoder
from sslvit.optim import clip_all, clip_each, cosine, layer_decay_groups, layer_of, norms_of, warmup_cosine
from sslvit.settings import EncoderSettings, OptimSettings


@pytest.mark.parametrize(("clip", "norms"), [(clip_all, [0.6, 0.8]), (clip_each, [1.0, 1.0])])
def test_long_gradients_are_shortened_and_short_ones_left_alone(clip, norms: list[float]) -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 4.0]])]
    clip(gradients, norms_of(gradients), 1.0)
    torch.testing.assert_close(norms_of(gradients), torch.tensor(norms))
    before = [gradient.clone() for gradient in gradients]
    clip(gradients, norms_of(gradients), 100.0)
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))


def test_every_part_in_front_of_the_blocks_counts_as_the_first_layer() -> None:
    """Of an encoder with all of them; what is behind the blocks moves at the full rate."""
    encoder = ViTEncoder(EncoderSettings(
        image_size=16, patch=4, width=24, depth=2, heads=2, registers=2, mask_token=True, positions="learned_2d",
        prefix_positions="all", fc_norm=True, pooling="attention",
    ))  # fmt: skip
    layers = {name.split(".")[0]: layer_of(name, 2) for name, _ in encoder.named_parameters() if "blocks" not in name}
    assert {name for name, layer in layers.items() if layer == 0} == {
        "cls_token", "reg_token", "mask_token", "patch_embed", "pos_embed_prefix", "pos_embed_row", "pos_embed_column",
    }  # fmt: skip
    assert {name for name, layer in layers.items() if layer == 3} == {"norm", "attn_pool", "fc_norm"}
    groups = layer_decay_groups(encoder.named_parameters(), 2, 0.05, 0.5)
    assert {group["rate_scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.parameters()))


def test_curves_end_where_they_end() -> None:
    assert cosine(5, 1.0, 0.2, 10) == pytest.approx(0.6)
    assert [cosine(step, 1.0, 0.2, 10) for step in (10, 11, 15)] == pytest.approx([0.2] * 3)
    assert warmup_cosine(30, 1.0, 0.1, 5, 20) == pytest.approx(0.1)
    assert warmup_cosine(0, 1.0, 0.1, 0, 0) == pytest.approx(1.0)


def test_a_recipes_rate_is_for_256_images_and_its_warmup_no_longer_than_the_run() -> None:
    optim = OptimSettings(base_rate=1e-3, warmup_epochs=2.5)
    assert [optim.peak_rate(batch) for batch in (64, 256, 4096)] == pytest.approx([2.5e-4, 1e-3, 1.6e-2])
    assert (optim.warmup_steps(10, 100), optim.warmup_steps(10, 20)) == (25, 20)
    assert math.isclose(OptimSettings(warmup_epochs=None).fitted(10, 1000).warmup_epochs, 10)
