"""Drawing images from a causal model of pixels, one pixel after the other (Chen et al. 2020, figure 3).

The keys and values of the pixels so far are kept, so that a new pixel costs one token and not the whole sequence.
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

PARTS = 2**48  # of a whole, in which probabilities are counted: sums of integers are the same in any order


@torch.no_grad()
def complete(
    encoder: ViTEncoder, head: nn.Module, given: Int[Tensor, "b k"], settings: SampleSettings
) -> Int[Tensor, "b n"]:
    """Images that begin with the given pixels and go on as the model draws them.

    Args:
        encoder: causal, of pixels.
        head: tokens -> logits of the colors.
        given: palette indices of the first pixels, row by row; none of them for images from nothing.
        settings: temperature, cuts, seed, batch.

    Returns:
        Palette indices of whole images, row by row.

    Raises:
        ValueError: more pixels than an image has, an encoder that cannot be read on, predictions that are not finite.
    """
    places = encoder.settings.grid[0] * encoder.settings.grid[1]
    if given.shape[1] > places:
        raise ValueError(f"{given.shape[1]} pixels are given, but this encoder's images have {places}.")
    device = encoder.pixel_tokens.palette.device
    table = rng.uniform((settings.seed, "sampling"), np.arange(len(given)), places)
    numbers = torch.from_numpy(table).to(device)
    drawn = F.pad(given.to(device), (0, places - given.shape[1]))  # b n
    todo = len(given) * (places - given.shape[1])
    with track_counter("sampling", todo, unit="pixels") as counter:
        for start in range(0, len(given), settings.batch):
            piece = slice(start, start + settings.batch)
            _complete_batch(encoder, head, drawn[piece], given.shape[1], numbers[piece], settings, counter)
    return drawn


def _complete_batch(
    encoder: ViTEncoder, head: nn.Module, drawn: Int[Tensor, "b n"], known: int, numbers: Float[Tensor, "b n"],
    settings: SampleSettings, counter: Counter,
) -> None:  # fmt: skip
    """Fill in the pixels of `drawn` from number `known` on."""
    places = drawn.shape[1]
    if known == places:
        return
    memories = encoder.init_kv_cache(len(drawn))
    tokens = encoder.decode(drawn[:, :known], memories)  # b (known + 1) d
    if not torch.isfinite(head(tokens[:, -1])).all():
        raise ValueError("the model's predictions are not finite numbers: its training has probably failed.")
    for place in range(known, places):
        shares = sampling_probs(head(tokens[:, -1]), settings)  # b colors
        drawn[:, place] = sample_colors(shares, numbers[:, place])
        counter.tick(len(drawn))
        if place < places - 1:
            tokens = encoder.decode(drawn[:, place : place + 1], memories)  # b 1 d


def sampling_probs(logits: Float[Tensor, "b colors"], settings: SampleSettings) -> Float[Tensor, "b colors"]:
    """What each color's chance is, after temperature, top-k and top-p; rows sum to one."""
    if settings.temperature == 0:
        return F.one_hot(logits.argmax(1), logits.shape[1]).double()
    logits = logits.double() / settings.temperature
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        order = logits.argsort(dim=1, descending=True, stable=True)
        logits = logits.scatter(1, order[:, settings.top_k :], float("-inf"))
    shares = logits.softmax(1)
    if settings.top_p < 1:
        ordered, order = shares.sort(dim=1, descending=True, stable=True)
        parts = in_parts(ordered)
        is_needless = parts.cumsum(1) - parts >= round(settings.top_p * PARTS)  # the likelier ones are enough
        shares = shares.scatter(1, order, ordered.masked_fill(is_needless, 0))
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def sample_colors(shares: Float[Tensor, "b colors"], numbers: Float[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The color in whose part of [0, 1) each uniform number lies."""
    upper = in_parts(shares).cumsum(1)
    total = upper[:, -1:]
    target = (numbers[:, None] * total).long().clamp(max=total - 1)  # no rounding puts a draw behind the last color
    return torch.searchsorted(upper, target, right=True)[:, 0]


def in_parts(shares: Float[Tensor, "b colors"]) -> Int[Tensor, "b colors"]:
    """Probabilities in whole parts: a GPU has no repeatable kernel for running sums of fractions in every torch."""
    return (shares * PARTS).long()
