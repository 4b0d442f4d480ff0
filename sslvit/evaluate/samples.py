"""Images sampled from a model of pixels: unconditionally, or given the first rows of an image."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslvit.data.loader import encoder_views, make_batch, normalized_view
from sslvit.data.open import open_shards
from sslvit.data.reader import ShardReader
from sslvit.evaluate.sources import full_float32
from sslvit.figures import plot_images
from sslvit.files import printable
from sslvit.models.igpt import IGPTModel, completion_rows, display_colors
from sslvit.models.sampling import complete
from sslvit.results import Result
from sslvit.settings.sample import SampleSettings

logger = logging.getLogger(__name__)

COLUMNS = 8  # generated images per row
FAR = 2**30  # rows of random numbers from one completion of an image to the next


@dataclass(repr=False)
class SampledImages(Result):
    """Images sampled from a model of pixels.

    Args:
        images: Sampled images 'n c h w' in [0, 1]; all completions of one image come before those of the next.
        rows: Rows of the picture: samples, or inputs, their completions and the originals.
        titles: Titles of the rows.
        path: The picture's file, once it is drawn.
    """

    images: np.ndarray
    rows: list[np.ndarray]
    titles: list[str]
    path: Path | None = None

    def text(self) -> str:
        """The path of the picture, or the shape of the images if none is drawn."""
        return str(self.path) if self.path else " x ".join(map(str, self.images.shape)) + " (images, channels, sides)"

    def to_dict(self) -> dict[str, Any]:
        """The path of the picture, and the shape of the images."""
        return {"path": self.path and str(self.path), "shape": list(self.images.shape)}

    def save(self, path: str | Path) -> None:
        """Draw the picture."""
        self.path = plot_images(path, self.rows, self.titles)


@full_float32()
def sample_images(model: IGPTModel, count: int, settings: SampleSettings) -> SampledImages:
    """Sample images unconditionally."""
    nothing = torch.zeros(count, 0, dtype=torch.long)
    images = display_colors(model.encoder, complete(model.encoder, model.head, nothing, settings))
    rows = [images[start : start + COLUMNS] for start in range(0, count, COLUMNS)]
    return SampledImages(images, rows, [""] * len(rows))


@full_float32()
def complete_images(
    model: IGPTModel, images: str, count: int, given: float, draws: int, settings: SampleSettings
) -> SampledImages:
    """Complete the first images of a data set; the rows are input, completions and original.

    The model is given a fraction of the pixels, row by row from the top.

    Raises:
        ValueError: the fraction gives all pixels, or no image can be read.
    """
    encoder = model.encoder.settings
    pixels = encoder.grid[0] * encoder.grid[1]
    known = round(given * pixels) if 0 <= given < 1 else pixels
    if known == pixels:
        raise ValueError(f"--given {given}: that is {known} of {pixels} pixels. Give 0 or more, but not all.")
    index = open_shards(images)
    samples = np.arange(min(count, len(index)))
    views = encoder_views(encoder)
    batch = make_batch(ShardReader(index, encoder.channels, memory_limit_mb=0), views, samples, 0 * samples)
    for key, reason in batch.unreadable.items():
        logger.warning(f"{printable(key)} is left out: {printable(reason)}")
    if not batch.valid.any():
        raise ValueError(f"{images}: none of its first {len(samples)} images can be read.")
    embed = model.encoder.pixel_tokens
    view = normalized_view(batch, encoder, embed.palette.device)[batch.valid.to(embed.palette.device)]
    colors = embed.quantize(view)  # b n
    # the same random numbers for a completion of an image, however many images and completions are asked for
    rows = (np.arange(draws)[:, None] * FAR + np.flatnonzero(batch.valid.cpu())).reshape(-1)
    completed = complete(model.encoder, model.head, colors[:, :known].repeat(draws, 1), settings, rows)
    titles, shown = completion_rows(model.encoder, colors, known, list(completed.chunk(draws)))
    made = np.stack(shown[1:-1], 1)  # b draws c h w
    return SampledImages(made.reshape(-1, *made.shape[2:]), shown, titles)
