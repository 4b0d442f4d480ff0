"""Sampling images from a causal model of pixels, one pixel after the other (Chen et al. 2020, figure 3).

The keys and values of earlier pixels are cached, so that a new pixel costs one token and not the whole sequence.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslvit import rng
from sslvit.models import ViTEncoder
from sslvit.progress import Counter, track_counter
from sslvit.settings.sample import SampleSettings

UNITS = 2**48  # integer units of a probability of one: integer sums do not depend on the order of summation


@torch.no_grad()
def complete(
    encoder: ViTEncoder,
    head: nn.Module,
    given: Int[Tensor, "b k"],
    settings: SampleSettings,
    rows: np.ndarray | None = None,
) -> Int[Tensor, "b n"]:
    """Complete images from their first pixels by sampling the rest from the model.

    Args:
        encoder: a causal encoder of pixels.
        head: tokens -> logits of the colors.
        given: palette indices of the first pixels, row by row; zero pixels ('b 0') to generate whole images.
        settings: temperature, top-k, top-p, seed and batch size.
        rows: The row of each image in the seed's table of random numbers; by default the images are counted.

    Returns:
        Palette indices of complete images, row by row.

    Raises:
        ValueError: more pixels than an image has, an encoder that cannot decode, or predictions that are not finite.
    """
    positions = encoder.settings.grid[0] * encoder.settings.grid[1]
    if given.shape[1] > positions:
        raise ValueError(f"{given.shape[1]} pixels are given, but this encoder's images have {positions}.")
    device = encoder.pixel_tokens.palette.device
    table = rng.uniform((settings.seed, "sampling"), np.arange(len(given)) if rows is None else rows, positions)
    numbers = torch.from_numpy(table).to(device)
    colors = F.pad(given.to(device), (0, positions - given.shape[1]))  # b n
    todo = len(given) * (positions - given.shape[1])
    with track_counter("sampling", todo, unit="pixels") as counter:
        for start in range(0, len(given), settings.batch):
            piece = slice(start, start + settings.batch)
            _complete_batch(encoder, head, colors[piece], given.shape[1], numbers[piece], settings, counter)
    return colors


def _complete_batch(
    encoder: ViTEncoder, head: nn.Module, colors: Int[Tensor, "b n"], prefix_length: int, numbers: Float[Tensor, "b n"],
    settings: SampleSettings, counter: Counter,
) -> None:  # fmt: skip
    """Fill in the pixels of `colors` from index `prefix_length` on."""
    positions = colors.shape[1]
    if prefix_length == positions:
        return
    kv_cache = encoder.init_kv_cache(len(colors))
    tokens = encoder.decode(colors[:, :prefix_length], kv_cache)  # b (prefix_length + 1) d
    if not torch.isfinite(head(tokens[:, -1])).all():
        raise ValueError("the model's predictions are not finite numbers: its training has probably failed.")
    for position in range(prefix_length, positions):
        probs = sampling_probs(head(tokens[:, -1]), settings)  # b colors
        colors[:, position] = sample_colors(probs, numbers[:, position])
        counter.tick(len(colors))
        if position < positions - 1:
            tokens = encoder.decode(colors[:, position : position + 1], kv_cache)  # b 1 d


def sampling_probs(logits: Float[Tensor, "b colors"], settings: SampleSettings) -> Float[Tensor, "b colors"]:
    """The probability of each color after temperature, top-k and top-p; rows sum to one."""
    if settings.temperature == 0:
        return F.one_hot(logits.argmax(1), logits.shape[1]).double()
    logits = logits.double() / settings.temperature
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        order = logits.argsort(dim=1, descending=True, stable=True)
        logits = logits.scatter(1, order[:, settings.top_k :], float("-inf"))
    probs = logits.softmax(1)
    if settings.top_p < 1:
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        units = in_units(ordered)
        is_needless = units.cumsum(1) - units >= round(settings.top_p * UNITS)  # likelier colors already reach top_p
        probs = probs.scatter(1, order, ordered.masked_fill(is_needless, 0))
        probs = probs / probs.sum(1, keepdim=True)
    return probs


def sample_colors(probs: Float[Tensor, "b colors"], numbers: Float[Tensor, "b"]) -> Int[Tensor, "b"]:
    """Inverse transform sampling: one color per row for a uniform number in [0, 1)."""
    upper = in_units(probs).cumsum(1)
    total = upper[:, -1:]
    target = (numbers[:, None] * total).long().clamp(max=total - 1)  # rounding must not exceed the last color
    return torch.searchsorted(upper, target, right=True)[:, 0]


def in_units(probs: Float[Tensor, "b colors"]) -> Int[Tensor, "b colors"]:
    """Probabilities as integers: not every torch has a deterministic GPU kernel for cumulative sums of floats."""
    return (probs * UNITS).long()
