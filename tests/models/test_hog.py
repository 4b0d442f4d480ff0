"""Histograms of oriented gradients, as a plain loop over pixels computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sslvit.models.hog import BINS, FLAT, hog_cell, hog_patches, hog_size
from sslvit.models.mae import MAEModel, patchify
from sslvit.settings import EncoderSettings, MAESettings


def by_loops(image: np.ndarray, cell: int) -> np.ndarray:
    """Histograms 'channels rows cols bins' of one image."""
    channels, height, width = image.shape
    found = np.zeros((channels, height // cell, width // cell, BINS))
    for c, y, x in np.ndindex(image.shape):
        across = image[c, y, min(x + 1, width - 1)] - image[c, y, max(x - 1, 0)]
        down = image[c, min(y + 1, height - 1), x] - image[c, max(y - 1, 0), x]
        direction = math.atan2(down, across) % math.pi * BINS / math.pi
        first = int(direction)
        for one, vote in ((first, 1 - (direction - first)), (first + 1, direction - first)):
            found[c, y // cell, x // cell, one % BINS] += vote * math.hypot(across, down) / cell**2
    return 3 * found / np.sqrt((found**2).sum(-1, keepdims=True) + FLAT**2)


@pytest.mark.parametrize(("patch", "cell", "channels"), [(4, 4, 3), (8, 4, 1), (16, 8, 3), (2, 2, 1), (14, 7, 3)])
def test_histograms_are_those_of_a_loop_over_pixels(patch: int, cell: int, channels: int) -> None:
    assert hog_cell(patch) == cell
    images = torch.randn(2, channels, 2 * patch, 3 * patch, generator=torch.Generator().manual_seed(0))
    found = hog_patches(images, patch)  # b n k
    side = patch // cell
    assert found.shape == (2, 6, hog_size(patch, channels))
    cells = found.view(2, 2, 3, side, side, channels, BINS)  # b, rows and cols of patches, of cells, c, bins
    for image, of_image in zip(images.numpy(), cells, strict=True):
        expected = by_loops(image, cell)
        for row, col, p, q in np.ndindex(2, 3, side, side):
            there = expected[:, row * side + p, col * side + q]
            np.testing.assert_allclose(of_image[row, col, p, q].numpy(), there, atol=2e-4)


def test_an_edge_votes_for_its_direction_whatever_its_contrast_and_a_flat_patch_for_none() -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[0, :, :, 4:], images[1, :, 4:] = 0.5, 20.0  # brighter to the right; brighter below
    right, below = hog_patches(images, 8)[:, 0].view(2, 4, BINS)
    assert right[:, 0].numpy() == pytest.approx(3, abs=0.01)
    assert right[:, 1:].abs().max() < 1e-4
    assert below[0, 4:6].numpy() == pytest.approx(3 / math.sqrt(2), abs=0.01)  # half a turn of nine bins is 4.5
    assert hog_patches(torch.ones(1, 3, 8, 8), 4).abs().max() == 0


def test_histograms_of_noise_have_a_mean_square_of_one() -> None:
    found = hog_patches(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 4)
    assert float(found.square().mean()) == pytest.approx(1, abs=1e-3)


def make(hog_weight: float) -> MAEModel:
    torch.manual_seed(0)
    encoder = EncoderSettings(image_size=16, patch=4, width=32, depth=1, heads=2)
    return MAEModel(
        MAESettings(decoder_width=16, decoder_depth=1, decoder_heads=2, hog_weight=hog_weight), encoder
    ).eval()


def test_the_loss_adds_the_weighted_error_of_hidden_histograms() -> None:
    model = make(0.5)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    visible, hidden = model.mask(noise)
    predicted = model.decoder(model.encoder(images, visible), visible)
    rows = torch.arange(3)[:, None]
    pixels = (predicted.pixels - model.target(patchify(images, 4)))[rows, hidden].square().mean()
    hog = (predicted.hog - hog_patches(images, 4))[rows, hidden].square().mean()
    torch.testing.assert_close(model.loss(images, noise).loss, pixels + 0.5 * hog)
    model.loss(images, noise).loss.backward()
    assert model.decoder.hog.weight.grad.abs().sum() > 0


def test_the_loss_of_the_mean_target_is_what_a_constant_prediction_has() -> None:
    model = make(0.5)
    images, noise = torch.randn(8, 3, 16, 16), torch.rand(8, 16)
    mean, hidden_mean, hidden_square = model.target_moments(images, noise)
    guess = (hidden_square - 2 * mean * hidden_mean + mean**2).mean()
    for linear, target in (
        (model.decoder.pred, model.target(patchify(images, 4))),
        (model.decoder.hog, hog_patches(images, 4)),
    ):
        linear.weight.data.zero_()
        linear.bias.data = target.mean((0, 1))
    torch.testing.assert_close(model.loss(images, noise).loss, guess)


def test_without_a_weight_nothing_is_added() -> None:
    assert make(0.0).decoder.hog is None
    assert not any("hog" in name for name in make(0.0).state_dict())


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="task.hog_weight: .* must be a number from 0 up"):
        MAESettings(hog_weight=weight)
