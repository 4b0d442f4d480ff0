"""The lessons' models that are broken on purpose are broken in the very way that they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sslvit.models import ViTEncoder
from sslvit.models.igpt import IGPTModel
from sslvit.settings import EncoderSettings, IGPTSettings

sys.path.append(str(Path(__file__).parents[1] / "docs" / "learn"))
from ablations import permute_patches, remove_attention, remove_shift


def make(**changes: object) -> ViTEncoder:
    torch.manual_seed(0)
    small = {"image_size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2, "channels": 1}
    return ViTEncoder(EncoderSettings(**small | changes)).eval()


@torch.no_grad()
def test_without_attention_a_token_depends_on_its_own_patch_alone() -> None:
    images = torch.rand(2, 1, 8, 8)
    other = images.clone()
    other[:, :, :2, :2] += 1  # the first patch
    changed = [(encoder(images) - encoder(other)).abs().amax((0, 2)) > 1e-6
               for encoder in (make(), remove_attention(make()))]  # fmt: skip
    assert changed[0].all()
    assert changed[1].nonzero().flatten().tolist() == [1]  # behind the class token


@torch.no_grad()
def test_a_permuted_encoder_sees_the_permuted_image() -> None:
    images, order = torch.rand(2, 1, 8, 8), list(reversed(range(16)))
    expected = make()(images.unfold(2, 2, 2).unfold(3, 2, 2).flip(2, 3).permute(0, 1, 2, 4, 3, 5).reshape(2, 1, 8, 8))
    torch.testing.assert_close(permute_patches(make(), order)(images), expected)
    visible = torch.tensor([[3, 5], [0, 1]])
    hidden = permute_patches(make(), order)
    torch.testing.assert_close(
        hidden.patch_embed(images, visible),
        torch.stack([make().patch_embed(images)[i, 15 - visible[i]] for i in (0, 1)]),
    )
    with pytest.raises(ValueError, match="each of the 16 patches once"):
        permute_patches(make(), [0] * 16)


@torch.no_grad()
def test_without_the_shift_a_position_sees_its_own_pixel() -> None:
    settings = EncoderSettings(
        image_size=4, channels=1, tokens="pixel", patch=1, width=16, depth=1, heads=2, causal=True, class_token=False,
        prefix_positions="none", pooling="mean",
    )  # fmt: skip
    images = torch.zeros(1, 1, 4, 4)
    other = images.clone()
    other[0, 0, 1, 1] = 2.0  # pixel 5
    changed = []
    for broken in (False, True):
        torch.manual_seed(0)
        model = IGPTModel(IGPTSettings(), settings).eval()
        encoder = (remove_shift(model) if broken else model).encoder
        difference = (encoder(images) - encoder(other)).abs().amax((0, 2)) > 1e-6
        changed.append(int(difference.nonzero()[0]))
    assert changed == [6, 5]
