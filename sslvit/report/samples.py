"""Pictures drawn by a model of pixels: from nothing, or from the first rows of given images."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from sslvit.data.loader import make_batch, normalized_view
from sslvit.data.open import open_shards
from sslvit.data.reader import ShardReader
from sslvit.data.views import Views
from sslvit.figures import image_rows
from sslvit.files import printable
from sslvit.settings.sample import SampleSettings
from sslvit.settings.views import CenterSettings
from sslvit.tasks.igpt import IGPT, completion_rows, shown
from sslvit.tasks.sampling import complete

logger = logging.getLogger(__name__)

COLUMNS = 8  # images in a row of generated ones


def draw_samples(task: IGPT, out: str | Path, count: int, settings: SampleSettings) -> Path:
    """Images from nothing, as a PNG.

    Args:
        task: trained, on the device that it shall run on.
        out: the PNG.
        count: how many images.
        settings: of the sampling.
    """
    nothing = torch.zeros(count, 0, dtype=torch.long)
    images = shown(task.encoder, complete(task.encoder, task.head, nothing, settings))
    rows = [images[start : start + COLUMNS] for start in range(0, count, COLUMNS)]
    return image_rows(out, rows, [""] * len(rows))


def draw_completions(
    task: IGPT, images: str, out: str | Path, count: int, given: float, draws: int, settings: SampleSettings
) -> Path:
    """Input, completions and original of the first images of a data set, as a PNG.

    Args:
        task: trained, on the device that it shall run on.
        images: shards, or a folder of images.
        out: the PNG.
        count: how many images.
        given: share of the pixels that the model is given, row by row from the top.
        draws: completions of each image.
        settings: of the sampling.

    Raises:
        ValueError: a share that gives all pixels, or images that cannot be read.
    """
    encoder = task.encoder.settings
    pixels = encoder.grid[0] * encoder.grid[1]
    known = round(given * pixels) if 0 <= given < 1 else pixels
    if known == pixels:
        raise ValueError(f"--given {given}: that is {known} of {pixels} pixels. Use a share from 0 to below 1.")
    index = open_shards(images)
    chosen = torch.arange(min(count, len(index))).numpy()
    views = Views(CenterSettings(), encoder.image_size, encoder.interpolation)
    batch = make_batch(ShardReader(index, encoder.channels, memory_limit_mb=0), views, chosen, 0 * chosen)
    for key, reason in batch.bad.items():
        logger.warning(f"{printable(key)} is left out: {printable(reason)}")
    if not batch.valid.any():
        raise ValueError(f"{images}: none of its first {len(chosen)} images can be read.")
    embed = task.encoder.patch_embed
    view = normalized_view(batch, encoder, embed.palette.device)[batch.valid.to(embed.palette.device)]
    colors = embed.quantize(view)  # b n
    drawn = complete(task.encoder, task.head, colors[:, :known].repeat(draws, 1), settings)
    titles, rows = completion_rows(task.encoder, colors, known, list(drawn.chunk(draws)))
    return image_rows(out, rows, titles)
