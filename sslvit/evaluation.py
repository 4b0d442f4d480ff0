"""Frozen encoders from Python: scores, features and samples, by names and paths as the commands take them."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from sslvit.checkpoint import load_encoder
from sslvit.data.open import open_shards
from sslvit.data.python_data import DataLike, name_of, takes_datasets
from sslvit.environment import pick_device
from sslvit.evaluate import embed as embedding
from sslvit.evaluate import likelihood as pixel_likelihood
from sslvit.evaluate import probe as probing
from sslvit.evaluate.label_free import evenly_spaced, measure_health
from sslvit.evaluate.layers import layer_numbers, plot_layers, probe_layers
from sslvit.evaluate.probe import ProbeTable
from sslvit.evaluate.samples import SampledImages, complete_images, sample_images
from sslvit.evaluate.scores import MeasureTable
from sslvit.evaluate.sources import LabeledSet, frozen, view_in_words
from sslvit.files import check_new_arrays, check_new_picture, expand_path
from sslvit.messages import for_python
from sslvit.models import Backbone, Encoder, ViTEncoder
from sslvit.models.igpt import IGPTModel
from sslvit.ranks import all_ranks, is_first_rank
from sslvit.settings import ProbeSettings
from sslvit.settings.keywords import KNNKeywords, ProbeKeywords, SampleKeywords
from sslvit.settings.load import from_keywords
from sslvit.settings.probe import Device, KNNSettings, Pooling, Precision, read_size
from sslvit.settings.sample import SampleSettings
from sslvit.tasks.released import load_igpt

logger = logging.getLogger(__name__)

EncoderLike = str | os.PathLike[str] | nn.Module  # a ViTEncoder, a Backbone, or any module from images to vectors
Size = int | str | Sequence[int]


@for_python
@takes_datasets("train", "val", labels="needed")
def probe(
    encoder: EncoderLike,
    train: DataLike,
    val: DataLike,
    *,
    layers: str | Iterable[int] | None = None,
    figure: str | Path | None = None,
    crop_fraction: float | None = None,
    size: Size | None = None,
    **settings: Unpack[ProbeKeywords],
) -> ProbeTable:
    """Score a frozen encoder: linear probe and kNN, with baselines.

    Args:
        encoder: An encoder, any module that makes a vector 'b d' of images, or what `load_encoder` takes.
        train: Labeled shards, class folders, or a data set with labels (as in `pretrain`) that the heads are fitted on.
        val: Data of the same kind that is scored.
        layers: Blocks to score side by side: "all", or numbers such as [1, 4, 8].
        figure: PNG file for a plot of `layers`.
        crop_fraction: Fraction of the center crop's sides that is seen; None for the encoder's own.
        size: Size in pixels that images are seen at, 64 or "48x64"; None for the encoder's own.
        settings: Further fields of `ProbeSettings`, such as labels_per_class=10 or protocol="mae"; settings of a
            protocol as {"name": "mae", "epochs": 10}.

    Returns:
        The table; a `LayerTable` where `layers` are given.

    Raises:
        ValueError: Data without labels, classes that differ, too few labels, or settings that do not fit.
        FileNotFoundError: No encoder or no shards there.

    Example:
        table = sslvit.probe("runs/mae", "shards/train", "shards/val", labels_per_class=10)
        print(table.rows["encoder"])
    """
    found = from_keywords(ProbeSettings, {"train": _name(train), "val": _name(val), **settings})
    if figure and not layers:
        raise ValueError("--figure is for --layers.")
    if layers and found.layer:
        raise ValueError("--layer and --layers exclude each other: one block for the table, or several side by side?")
    check_new_picture(figure)
    with all_ranks():
        network = open_encoder(encoder, crop_fraction, size)
        if not layers:
            return probing.probe({"encoder": network}, found)
        text = layers if isinstance(layers, str) else ",".join(map(str, layers))
        numbers = layer_numbers(text, frozen(network).depth)
        curve = probe_layers(network, found, numbers)
        if figure and is_first_rank():
            curve.figure = plot_layers(curve, numbers, figure)
        return curve


@for_python
@takes_datasets("train", "val", labels="needed")
def knn(
    encoder: EncoderLike,
    train: DataLike,
    val: DataLike,
    *,
    crop_fraction: float | None = None,
    size: Size | None = None,
    **settings: Unpack[KNNKeywords],
) -> ProbeTable:
    """Score a frozen encoder by its nearest neighbors alone.

    Args:
        encoder: An encoder, any module that makes a vector 'b d' of images, or what `load_encoder` takes.
        train: Labeled shards, class folders, or a data set with labels (as in `pretrain`) whose images vote.
        val: Data of the same kind that is scored.
        crop_fraction: Fraction of the center crop's sides that is seen; None for the encoder's own.
        size: Size in pixels that images are seen at, 64 or "48x64"; None for the encoder's own.
        settings: Further fields of `KNNSettings`, such as neighbors=[20].

    Returns:
        The table.

    Raises:
        ValueError: Data without labels, classes that differ, or settings that do not fit.
        FileNotFoundError: No encoder or no shards there.

    Example:
        table = sslvit.knn("runs/dino", "shards/train", "shards/val", neighbors=[20])
        print(table.rows["encoder"]["kNN, k = 20"])
    """
    found = from_keywords(KNNSettings, {"train": _name(train), "val": _name(val), **settings})
    with all_ranks():
        network = open_encoder(encoder, crop_fraction, size)
        return probing.probe({"encoder": network}, ProbeSettings(**vars(found), protocol=None))


@for_python
@takes_datasets("train", "val", labels="read")
def compare(
    encoders: Mapping[str, EncoderLike] | Sequence[str | Path],
    train: DataLike,
    val: DataLike | None = None,
    **settings: Unpack[ProbeKeywords],
) -> ProbeTable | MeasureTable:
    """Score several frozen encoders in one table; without labels, by the measures of `health`.

    Args:
        encoders: Name of the row -> encoder, or paths that are the names, too.
        train: Labeled shards or class folders that the heads are fitted on, or images without labels.
        val: Data that is scored; None only for images without labels.
        settings: Further fields of `ProbeSettings`; protocol=None leaves nearest neighbors.

    Returns:
        A `ProbeTable`; a `MeasureTable` of at most 5,000 images where there are no labels.

    Raises:
        ValueError: No encoders, encoders that take images of different channels, or data that cannot be probed.
        FileNotFoundError: No encoder or no shards there.

    Example:
        table = sslvit.compare({"MAE": "runs/mae", "DINO": "runs/dino"}, "shards/train", "shards/val")
        print(table)
    """
    named = encoders if isinstance(encoders, Mapping) else {str(path): path for path in encoders}
    if not named:
        raise ValueError("encoders: none given. Give a dict of names and encoders, or a list of paths.")
    found = from_keywords(ProbeSettings, {"train": _name(train), "val": _name(val or train), **settings})
    with all_ranks():
        networks = {name: open_encoder(encoder) for name, encoder in named.items()}
        if open_shards(found.val).classes is None:
            return _measured(networks, found.val, 5000, found)
        if val is None:
            raise ValueError("--val: labeled images are scored on others than heads are fitted on. Give --val, too.")
        return probing.probe(networks, found)


@for_python
@takes_datasets("data")
def health(
    encoder: EncoderLike,
    data: DataLike,
    *,
    images: int = 5000,
    layer: int | None = None,
    pooling: Pooling | None = None,
    batch: int = 256,
    workers: int | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    max_unreadable_fraction: float = 0.01,
    seed: int = 0,
    crop_fraction: float | None = None,
    size: Size | None = None,
) -> MeasureTable:
    """Measure features without labels: rank, spectrum, uniformity, alignment.

    Args:
        encoder: An encoder, any module that makes a vector 'b d' of images, or what `load_encoder` takes.
        data: Images, with labels or without.
        images: Number of images, evenly spaced.
        layer: Number of the block whose output is taken; None for the encoder's own.
        pooling: Pooling of the tokens; None for the encoder's own.
        batch: Images per forward pass.
        workers: Number of loader processes; None for what suits the device.
        device: auto, cpu or cuda.
        precision: float32 or bf16.
        max_unreadable_fraction: Fraction of the images that may be unreadable.
        seed: Seed of the crops and of the untrained weights.
        crop_fraction: Fraction of the center crop's sides that is seen; None for the encoder's own.
        size: Size in pixels that images are seen at, 64 or "48x64"; None for the encoder's own.

    Returns:
        The table, with the same network untrained and raw pixels beside the encoder.

    Raises:
        ValueError: Settings that do not fit, or images that cannot be read.
        FileNotFoundError: No encoder or no images there.

    Example:
        table = sslvit.health("runs/dino", "photos")
        print(table.rows["encoder"]["rankme"])
    """
    if images < 2:
        raise ValueError(f"--images {images}: how images differ takes 2 or more.")
    given = {
        "layer": layer, "pooling": pooling, "batch": batch, "workers": workers, "device": device, "seed": seed,
        "precision": precision, "max_unreadable_fraction": max_unreadable_fraction,
    }  # fmt: skip
    found = from_keywords(ProbeSettings, {"train": "", "val": "", **given})
    return _measured({"encoder": open_encoder(encoder, crop_fraction, size)}, _name(data), images, found)


def _measured(encoders: dict[str, Encoder], data: str, images: int, settings: ProbeSettings) -> MeasureTable:
    """Measures without labels of encoders, with what a reader needs to quote them."""
    index, device = open_shards(data), pick_device(settings.device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    first = next(iter(encoders.values())).settings
    subset = evenly_spaced(len(index), images)
    seen = LabeledSet(index, first.channels, subset, settings.max_unreadable_fraction)
    rows = measure_health(
        encoders, seen, settings.layer, settings.pooling, settings.batch, settings.workers, settings.seed,
        settings.precision,
    )  # fmt: skip
    about = f"without labels, on {seen.count_text} of {index.location}\neach image: "
    return MeasureTable(rows, about + view_in_words(first, settings.precision), 3)


@for_python
@takes_datasets("data")
def embed(
    encoder: EncoderLike,
    data: DataLike,
    output: str | Path | None = None,
    *,
    layer: int | None = None,
    pooling: Pooling | None = None,
    blocks: int = 1,
    batch: int = 256,
    workers: int | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    max_unreadable_fraction: float = 0.01,
    crop_fraction: float | None = None,
    size: Size | None = None,
) -> embedding.Embeddings:
    """Features of images as arrays.

    Args:
        encoder: An encoder, any module that makes a vector 'b d' of images, or what `load_encoder` takes.
        data: Shards, a folder of images or a data set (as in `pretrain`), with labels or without.
        output: File for the arrays, which ends in .npz.
        layer: Number of the block whose output is taken; None for the encoder's own.
        pooling: Pooling of the tokens; None for the encoder's own.
        blocks: Number of consecutive blocks, ending with that one, whose features are concatenated.
        batch: Images per forward pass.
        workers: Number of loader processes; None for what suits the device.
        device: auto, cpu or cuda.
        precision: float32 or bf16.
        max_unreadable_fraction: Fraction of the images that may be unreadable.
        crop_fraction: Fraction of the center crop's sides that is seen; None for the encoder's own.
        size: Size in pixels that images are seen at, 64 or "48x64"; None for the encoder's own.

    Returns:
        Arrays `features` ('n d') and `keys`, and `labels` with `classes` where there are some.

    Raises:
        ValueError: A file that is there, settings that do not fit, or images that cannot be read.
        FileNotFoundError: No encoder or no images there.

    Example:
        found = sslvit.embed("runs/dino", "photos")
        print(found.keys[0], found.features[0])
    """
    check_new_arrays(output)
    given = {
        "layer": layer, "pooling": pooling, "blocks": blocks, "batch": batch, "workers": workers, "device": device,
        "precision": precision, "max_unreadable_fraction": max_unreadable_fraction,
    }  # fmt: skip
    found = from_keywords(KNNSettings, {"train": "", "val": "", **given})
    network = open_encoder(encoder, crop_fraction, size).to(pick_device(device))
    source = frozen(network, precision)
    readouts = source.readouts(layer, found.blocks, pooling)
    images = LabeledSet(open_shards(_name(data)), network.settings.channels, None, max_unreadable_fraction)
    made = embedding.embed(source, images, readouts, batch, workers)
    if output is not None:
        made.save(Path(output))
    return made


@for_python
@takes_datasets("complete")
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
    """Sample images from a model of pixels, or complete given ones.

    Args:
        run: Run folder or checkpoint of an iGPT run, or a model of sslvit.tasks.released.load_igpt.
        output: PNG file for a picture of them.
        complete: Shards or a folder of images to complete.
        given: Fraction of each image that is given, from the top; None for 0.5.
        draws: Completions of each image; None for 3.
        count: Number of images; None for 16, or 8 to complete.
        device: auto, cpu or cuda.
        settings: Further fields of `SampleSettings`, such as temperature=0.9.

    Returns:
        The images as arrays in [0, 1], and the picture's path.

    Raises:
        ValueError: Not a model of pixels, settings that do not fit, or a file that is there.
        FileNotFoundError: No run there.

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
        check_new_picture(output)
    found = from_keywords(SampleSettings, dict(settings))
    model = _pixel_model(run, device)
    if complete is None:
        made = sample_images(model, count or 16, found)
    else:
        part = 0.5 if given is None else given
        made = complete_images(model, _name(complete), count or 8, part, draws or 3, found)
    if output is not None:
        made.save(output)
    return made


@for_python
@takes_datasets("train", "val")
def likelihood(
    run: str | os.PathLike[str] | IGPTModel,
    train: DataLike,
    val: DataLike,
    *,
    batch: int = 16,
    device: Device = "auto",
    max_unreadable_fraction: float = 0.01,
) -> MeasureTable:
    """Measure nats per pixel of an iGPT run, beside n-gram baselines.

    Args:
        run: Run folder or checkpoint of an iGPT run, or a model of sslvit.tasks.released.load_igpt.
        train: Images that the baselines count colors on.
        val: Images that are scored.
        batch: Images per forward pass.
        device: auto, cpu or cuda.
        max_unreadable_fraction: Fraction of a data set's images that may be unreadable.

    Returns:
        The table.

    Raises:
        ValueError: Not a model of pixels, or data that cannot be scored.
        FileNotFoundError: No run or no images there.

    Example:
        table = sslvit.likelihood("runs/igpt", "shards/train", "shards/val")
        print(table.rows["iGPT"]["nats per pixel"])
    """
    model = _pixel_model(run, device)
    settings = model.encoder.settings
    counted, scored = (
        LabeledSet(open_shards(_name(source)), settings.channels, None, max_unreadable_fraction)
        for source in (train, val)
    )
    rows = pixel_likelihood.likelihood(model, counted, scored, batch)
    heading = (
        f"{scored.count_text} of {scored.index.location}; counted on {counted.count_text} of {counted.index.location}\n"
        f"each image: {settings.crop_in_words}"
    )
    return MeasureTable(rows, heading, 4)


# ---- what they share -----------------------------------------------------------------------------------------


def open_encoder(encoder: EncoderLike, crop_fraction: float | None = None, size: Size | None = None) -> Encoder:
    """An encoder by name or as it is, seeing another part of each image, or at another size, if that is asked for."""
    found: Encoder
    if isinstance(encoder, (ViTEncoder, Backbone)):
        found = encoder
    elif isinstance(encoder, nn.Module):
        found = Backbone(encoder)
    else:
        found = load_encoder(expand_path(os.fspath(encoder)))
    changes: dict[str, Any] = {}
    if crop_fraction is not None:
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"--crop-fraction {crop_fraction:g}: must be in (0, 1].")
        changes["crop_fraction"] = crop_fraction
    if size is not None:
        changes["image_size"] = read_size(size, found.settings)
    if not changes:
        return found
    seen = copy.copy(found)  # with the same weights
    seen.settings = replace(found.settings, **changes)
    if isinstance(seen, Backbone):
        seen.measure_width()  # refuses a size that it cannot take
    elif seen.settings.grid != seen.position_grid and is_first_rank():
        grids = [f"{rows} x {columns}" for rows, columns in (seen.position_grid, seen.settings.grid)]
        logger.info(f"images are seen in {grids[1]} patches; positions are interpolated from {grids[0]}")
    return seen


def _name(data: DataLike) -> str:
    """Data by one name."""
    return expand_path(name_of(data) or "")


def _pixel_model(run: str | os.PathLike[str] | IGPTModel, device: Device) -> IGPTModel:
    """A model of pixels by name or as it is, on a device."""
    model = run if isinstance(run, IGPTModel) else load_igpt(expand_path(os.fspath(run)))
    return model.to(pick_device(device))
