"""Sampling from pixel models and measuring the likelihood of images, from Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from sslvit.data.open import open_shards
from sslvit.data.overlap import check_same_data
from sslvit.data.python_data import DataLike, path_of, takes_datasets
from sslvit.environment import pick_device
from sslvit.evaluate import likelihood as pixel_likelihood
from sslvit.evaluate.encoders import borrows_modules
from sslvit.evaluate.samples import SampledImages, complete_images, sample_images
from sslvit.evaluate.scores import MeasureTable
from sslvit.evaluate.sources import LabeledSet
from sslvit.files import check_new_picture, expand_path
from sslvit.messages import for_python
from sslvit.models.igpt import IGPTModel
from sslvit.settings.keywords import SampleKeywords
from sslvit.settings.load import from_keywords
from sslvit.settings.probe import Device, ForwardPasses, KNNSettings
from sslvit.settings.sample import SampleSettings
from sslvit.tasks.released import load_igpt


@for_python
@takes_datasets("complete")
@borrows_modules
def sample(
    run: str | os.PathLike[str] | IGPTModel,
    output: str | Path | None = None,
    *,
    complete: DataLike | None = None,
    given: float | None = None,
    draws: int | None = None,
    count: int | None = None,
    device: Device = "auto",
    **settings: Unpack[SampleKeywords],
) -> SampledImages:
    """Sample images from a pixel model, or complete given ones.

    Args:
        run: Run folder or checkpoint of an iGPT run, or a model from sslvit.tasks.released.load_igpt.
        output: PNG file for a picture of the images.
        complete: Shards or a folder of images to complete.
        given: Fraction of each image to keep, from the top; None for 0.5.
        draws: Completions of each image; None for 3.
        count: Number of images; None for 16, or 8 to complete.
        device: auto, cpu or cuda.
        settings: Further fields of `SampleSettings`, such as temperature=0.9.

    Returns:
        The images as arrays in [0, 1], and the picture's path.

    Raises:
        ValueError: Not a pixel model, invalid settings, or a file that exists already.
        FileNotFoundError: The run does not exist.

    Example:
        made = sslvit.sample("runs/igpt", count=4)
        print(made.images.shape)
    """
    for name, number in (("count", count), ("draws", draws)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: must be 1 or more.")
    if complete is None and (draws, given) != (None, None):
        raise ValueError("--draws and --given are for --complete IMAGES.")
    if output is not None:
        output = expand_path(output)
        check_new_picture(output)
    found = from_keywords(SampleSettings, dict(settings))
    from_keywords(ForwardPasses, {"device": device})
    model = _pixel_model(run, device)
    if complete is None:
        made = sample_images(model, count or 16, found)
    else:
        fraction = 0.5 if given is None else given
        made = complete_images(model, path_of(complete), count or 8, fraction, draws or 3, found)
    if output is not None:
        made.save(output)
    return made


@for_python
@takes_datasets("train", "val")
@borrows_modules
def likelihood(
    run: str | os.PathLike[str] | IGPTModel,
    train: DataLike,
    val: DataLike,
    *,
    batch: int = 16,
    device: Device = "auto",
    max_unreadable_fraction: float = 0.01,
) -> MeasureTable:
    """Measure nats per pixel of an iGPT run, next to n-gram baselines.

    Args:
        run: Run folder or checkpoint of an iGPT run, or a model from sslvit.tasks.released.load_igpt.
        train: Images on which the baselines count colors.
        val: Images to score.
        batch: Images per forward pass.
        device: auto, cpu or cuda.
        max_unreadable_fraction: Largest tolerated fraction of unreadable images in a data set.

    Returns:
        The table.

    Raises:
        ValueError: Not a pixel model, or data that cannot be scored.
        FileNotFoundError: The run or the images do not exist.

    Example:
        table = sslvit.likelihood("runs/igpt", "shards/train", "shards/val")
        print(table.rows["iGPT"]["nats per pixel"])
    """
    given = {"batch": batch, "device": device, "max_unreadable_fraction": max_unreadable_fraction}
    from_keywords(KNNSettings, {"train": "", "val": "", **given})
    model = _pixel_model(run, device)
    settings = model.encoder.settings
    counted, scored = (
        LabeledSet(open_shards(path_of(source)), settings.channels, None, max_unreadable_fraction)
        for source in (train, val)
    )
    check_same_data(counted.index, scored.index, is_allowed=True, option="")
    rows = pixel_likelihood.likelihood(model, counted, scored, batch)
    heading = (
        f"{scored.count_text} of {scored.index.location}; counted on {counted.count_text} of {counted.index.location}\n"
        f"each image: {settings.crop_in_words}"
    )
    about = {
        "data": scored.index.location, "fingerprint": scored.index.fingerprint(), "images": scored.images,
        "unreadable": scored.unreadable, "counted_on": counted.index.location, "view": settings.crop_in_words,
        "image_size": settings.image_size,
    }  # fmt: skip
    return MeasureTable(rows, heading, 4, about)


def _pixel_model(run: str | os.PathLike[str] | IGPTModel, device: Device) -> IGPTModel:
    """Load a pixel model, unless it is one already, and move it to a device.

    Raises:
        ValueError: The model sees the pixels that it predicts.
    """
    model = run if isinstance(run, IGPTModel) else load_igpt(expand_path(run))
    if not model.encoder.settings.causal:
        raise ValueError(
            "run: a model that attends both ways (encoder.causal is false) does not predict the next pixel, which "
            "sampling and likelihoods need. Give one of the autoregressive objective."
        )
    return model.to(pick_device(device))
