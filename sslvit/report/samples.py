"""Figures of images sampled from a model of pixels: unconditionally, or given the first rows of an image."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from sslvit.data.loader import make_batch, normalized_view
from sslvit.data.open import open_shards
from sslvit.data.reader import ShardReader
from sslvit.data.views import Views
from sslvit.figures import plot_images
from sslvit.files import printable
from sslvit.models.igpt import IGPTModel, completion_rows, to_display
from sslvit.models.sampling import complete
from sslvit.settings.sample import SampleSettings
from sslvit.settings.views import CenterSettings

logger = logging.getLogger(__name__)

COLUMNS = 8  # images in a row of generated ones


def plot_samples(model: IGPTModel, out: str | Path, count: int, settings: SampleSettings) -> Path:
    """Sample images unconditionally, and plot them."""
    nothing = torch.zeros(count, 0, dtype=torch.long)
    images = to_display(model.encoder, complete(model.encoder, model.head, nothing, settings))
    rows = [images[start : start + COLUMNS] for start in range(0, count, COLUMNS)]
    return plot_images(out, rows, [""] * len(rows))


def plot_completions(
    model: IGPTModel, images: str, out: str | Path, count: int, given: float, draws: int, settings: SampleSettings
) -> Path:
    """Complete the first images of a data set, and plot input, completions and original.

    The model is given a fraction of the pixels, row by row from the top.

    Raises:
        ValueError: the fraction gives all pixels, or no image can be read.
    """
    encoder = model.encoder.settings
    pixels = encoder.grid[0] * encoder.grid[1]
    known = round(given * pixels) if 0 <= given < 1 else pixels
    if known == pixels:
        raise ValueError(f"--given {given}: that is {known} of {pixels} pixels. It must be in [0, 1).")
    index = open_shards(images)
    samples = np.arange(min(count, len(index)))
    views = Views(CenterSettings(), encoder.image_size, encoder.interpolation)
    batch = make_batch(ShardReader(index, encoder.channels, memory_limit_mb=0), views, samples, 0 * samples)
    for key, reason in batch.unreadable.items():
        logger.warning(f"{printable(key)} is left out: {printable(reason)}")
    if not batch.valid.any():
        raise ValueError(f"{images}: none of its first {len(samples)} images can be read.")
    embed = model.encoder.pixel_tokens
    view = normalized_view(batch, encoder, embed.palette.device)[batch.valid.to(embed.palette.device)]
    colors = embed.quantize(view)  # b n
    completed = complete(model.encoder, model.head, colors[:, :known].repeat(draws, 1), settings)
    titles, rows = completion_rows(model.encoder, colors, known, list(completed.chunk(draws)))
    return plot_images(out, rows, titles)
