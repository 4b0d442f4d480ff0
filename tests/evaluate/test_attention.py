"""What the attention and patch pictures are made of."""

from __future__ import annotations

import pytest
import torch

from sslvit.evaluate.attention import class_attention, mass_mask, patch_colors, patch_similarity
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

SMALL = {"image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 4, "channels": 1}


def test_class_attention_is_the_first_row_of_the_last_block_on_the_images_grid() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(**SMALL, registers=2)).eval()
    for size, grid in (((16, 16), (4, 4)), ((24, 32), (6, 8))):
        images = torch.randn(3, 1, *size)
        maps = class_attention(encoder, images)
        assert maps.shape == (3, 4, *grid)
        with torch.no_grad():
            (last,) = encoder.intermediates(images, [2], attention=True)
        assert torch.equal(
            maps[1, 2, 3], last.attention[1, 2, 0, 3 + 3 * grid[1] :][: grid[1]]
        )  # row 3, after 3 prefix tokens
    with pytest.raises(ValueError, match="encoder.class_token: false"):
        class_attention(ViTEncoder(EncoderSettings(**SMALL, class_token=False, pooling="mean")), images)


def test_masks_hold_the_fewest_patches_with_enough_attention() -> None:
    attention = torch.tensor([[5.0, 1.0], [3.0, 1.0]])[None, None]
    assert mass_mask(attention, 0.4).tolist() == [[[[True, False], [False, False]]]]
    assert mass_mask(attention, 0.6).tolist() == [[[[True, False], [True, False]]]]
    assert mass_mask(attention * 7, 0.79).sum() == 2  # shares of the sum, whatever that is
    assert mass_mask(attention, 0.85).sum() == 3


class _Planted(ViTEncoder):
    """An encoder whose patch tokens are what a test says."""

    planted: torch.Tensor

    def forward(self, images, *args, **kwargs):
        return self.planted


def test_patches_with_similar_features_get_similar_colors_also_across_images() -> None:
    torch.manual_seed(0)
    encoder = _Planted(EncoderSettings(**SMALL))
    kinds = torch.randint(0, 3, (2, 16))
    directions = 10 * torch.eye(3, 32)
    encoder.planted = torch.cat([torch.zeros(2, 1, 32), directions[kinds] + 0.1 * torch.randn(2, 16, 32)], 1)
    colors = patch_colors(encoder, torch.zeros(2, 1, 16, 16))  # b 3 4 4
    assert colors.shape == (2, 3, 4, 4)
    assert 0 <= colors.min() < 0.1
    assert 0.9 < colors.max() <= 1
    flat = colors.permute(0, 2, 3, 1).reshape(-1, 3)[:, :2]  # three kinds span two components; the third is noise
    middles = torch.stack([flat[kinds.flatten() == kind].mean(0) for kind in range(3)])
    assert torch.equal(torch.cdist(flat, middles).argmin(1), kinds.flatten())
    assert torch.pdist(middles).min() > 0.4


def test_similarity_is_the_cosine_of_one_patch_to_all() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(image_size=[8, 12], patch=4, width=16, depth=1, heads=2)).eval()
    images = torch.randn(2, 3, 8, 12)
    found = patch_similarity(encoder, images, 1, 2)
    assert found.shape == (2, 2, 3)
    tokens = encoder(images)[:, encoder.prefix :].view(2, 2, 3, 16)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                one, other = tokens[image, 1, 2], tokens[image, row, column]
                expected = float(one @ other / one.norm() / other.norm())
                assert float(found[image, row, column]) == pytest.approx(expected, abs=1e-5)
    assert found[:, 1, 2].tolist() == pytest.approx([1, 1], abs=1e-5)
    with pytest.raises(ValueError, match="--patch 2,0: images have 2 x 3 patches, from 0,0 to 1,2"):
        patch_similarity(encoder, images, 2, 0)
