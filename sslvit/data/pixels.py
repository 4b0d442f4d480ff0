"""Sample pixels from shards and fit a color palette to them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sslvit import rng
from sslvit.data.index import ShardIndex
from sslvit.data.loader import make_batch
from sslvit.data.reader import ShardReader
from sslvit.data.resample import normalize
from sslvit.data.views import Views
from sslvit.figures import plot_palette
from sslvit.files import remove_stale_temporaries, write_atomically, write_error
from sslvit.palette import LEVELS, MAX_ROUNDS, colors_of, fit_palette, nearest_color, squared_error, uniform_palette
from sslvit.progress import track
from sslvit.settings.views import CenterSettings

logger = logging.getLogger(__name__)

PIXELS = 2**19  # approximate number of pixels to fit a palette on
MAX_IMAGES = 20_000  # images to sample pixels from
BATCH = 64
PICTURE_IMAGES = 8  # images in the picture
DIGITS = 6  # decimals of a saved color; one gray level of 255 is 0.008


def make_palette(
    index: ShardIndex, out: str | Path, colors: int | None = None, image_size: int = 32, seed: int = 0
) -> dict:
    """Fit a palette to a data set's pixels; write it as JSON, with a picture beside it.

    Args:
        index: Index of the data set.
        out: JSON file to write; the picture has the same name with .png.
        colors: Number of colors; None for 8 per channel: 512, or 8 grays.
        image_size: Side of the images that the encoder will see.
        seed: Seed of the sampled pixels and of the first centers.

    Returns:
        The content of the JSON file.

    Raises:
        ValueError: more colors than the images have, an existing file, or no readable image.
        OSError: the file cannot be written.
    """
    check_palette_options(out, colors, image_size, seed)
    out = Path(out)
    picture = out.with_suffix(".png")
    colors = colors or (LEVELS if index.channels == 1 else LEVELS**3)
    pixels, images = sample_pixels(index, image_size, seed)
    palette = fit_palette(pixels, colors, seed, track(range(MAX_ROUNDS), "k-means", MAX_ROUNDS, unit="rounds at most"))
    palette = palette.double().round(decimals=DIGITS).float()
    content = {
        "kind": "k-means", "colors": [[round(value, DIGITS) for value in row] for row in palette.tolist()],
        "mean_squared_error": squared_error(pixels, palette),
        "mean_squared_error_uniform": None,
        "pixels": len(pixels), "image_size": image_size, "seed": seed,
        "data": {"shards": index.location, "images": len(index), "fingerprint": index.fingerprint()},
    }  # fmt: skip
    if index.channels in (1, 3):
        content["mean_squared_error_uniform"] = squared_error(pixels, uniform_palette(index.channels))
    originals = images[:PICTURE_IMAGES]
    quantized = colors_of(nearest_color(originals, palette), palette)
    for path in (picture, out):
        remove_stale_temporaries(path)
    write_atomically(out, json.dumps(content) + "\n")  # first, since a picture alone would block the next attempt
    try:
        plot_palette(picture, *(((values + 1) / 2).numpy() for values in (palette, originals, quantized)))
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return content


def check_palette_options(out: str | Path, colors: int | None, image_size: int, seed: int) -> None:
    """Raise ValueError for invalid options, before any work is done."""
    out = Path(out)
    if out.suffix != ".json":
        raise ValueError(f"{out}: a palette is written as JSON. Choose a name that ends in .json.")
    for path in (out, out.with_suffix(".png")):
        if path.exists():
            raise ValueError(f"{path}: already exists. Choose another file.")
    if colors is not None and colors < 2:
        raise ValueError(f"--colors {colors}: a palette has two or more.")
    if image_size < 1:
        raise ValueError(f"--image-size {image_size}: must be 1 or more.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: must be from 0 to {2**32 - 1}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(out, error) from error


def sample_pixels(
    index: ShardIndex, image_size: int, seed: int
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "b c h w"]]:
    """Sample pixels in [-1, 1] from a whole data set, depending only on the seed; also returns the first images.

    Each image gives the same number of pixels, at random positions. Of more than MAX_IMAGES images, a random subset is
    read in storage order.
    """
    selected = np.arange(len(index))
    if len(index) > MAX_IMAGES:
        selected = np.sort(rng.generator(seed, "palette images").permutation(len(index))[:MAX_IMAGES])
    per_image = min(-(-PIXELS // len(selected)), image_size**2)
    reader = ShardReader(index, index.channels, memory_limit_mb=0)
    views = Views(CenterSettings(), [image_size, image_size], "bicubic")
    half = [0.5] * index.channels
    pieces: list[Tensor] = []
    first: list[Tensor] = []
    unreadable = 0
    batches = [selected[start : start + BATCH] for start in range(0, len(selected), BATCH)]
    for samples in track(batches, "reading pixels", len(selected), each=BATCH):
        batch = make_batch(reader, views, samples, np.zeros_like(samples))
        images = normalize(batch.views[0][batch.valid], half, half)
        unreadable += int((~batch.valid).sum())
        for image, sample in zip(images, samples[batch.valid.numpy()], strict=True):
            positions = rng.generator(seed, int(sample), "palette").permutation(image_size**2)[:per_image]
            pieces.append(image.flatten(1)[:, torch.from_numpy(positions)].T)
        if len(first) < PICTURE_IMAGES:
            first += images
    if not pieces:
        raise ValueError(f"{index.location}: none of {len(selected)} images could be read.")
    if unreadable:
        logger.warning(f"{unreadable} of {len(selected)} images could not be read (sslvit shards check names them).")
    return torch.cat(pieces), torch.stack(first)
