"""Evaluation of frozen encoders from Python, with the same names and paths as on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from torch import nn

from sslvit.data.open import open_shards
from sslvit.data.plan import evenly_spaced
from sslvit.data.python_data import DataLike, path_of, takes_datasets
from sslvit.environment import pick_device
from sslvit.evaluate import embed as embedding
from sslvit.evaluate import probe as probing
from sslvit.evaluate.encoders import EncoderLike, Size, borrows_modules, open_encoder
from sslvit.evaluate.label_free import measure_health
from sslvit.evaluate.layers import layer_numbers, plot_layers, probe_layers
from sslvit.evaluate.probe import ProbeTable
from sslvit.evaluate.scores import MeasureTable
from sslvit.evaluate.sources import LabeledSet, describe_views, frozen, heading_of_views
from sslvit.files import check_new_arrays, check_new_picture, expand_path
from sslvit.messages import for_python
from sslvit.models import Encoder
from sslvit.ranks import all_ranks, is_first_rank
from sslvit.settings import ProbeSettings
from sslvit.settings.bench import PIXELS
from sslvit.settings.keywords import KNNKeywords, ProbeKeywords
from sslvit.settings.load import from_keywords
from sslvit.settings.probe import Device, KNNSettings, Pooling, Precision


@for_python
@takes_datasets("train", "val", labels="needed")
@borrows_modules
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
        encoder: An encoder, any module that maps images to vectors 'b d', or anything that `load_encoder` accepts.
        train: Labeled shards, class folders, or a data set with labels (as in `pretrain`), used to fit the heads.
        val: Data of the same kind, used to compute the scores.
        layers: Blocks to score side by side: "all", or numbers such as [1, 4, 8].
        figure: PNG file for a plot of `layers`.
        crop_fraction: Side of the center crop as a fraction of the image's; None for the encoder's own.
        size: Input size in pixels, 64 or "48x64"; None for the encoder's own.
        settings: Further fields of `ProbeSettings`, such as labels_per_class=10 or protocol="mae"; settings of a
            protocol are given as {"name": "mae", "epochs": 10}.

    Returns:
        The table; a `LayerTable` if `layers` is given.

    Raises:
        ValueError: Data without labels, different classes, too few labels, or invalid settings.
        FileNotFoundError: The encoder or the shards do not exist.

    Example:
        table = sslvit.probe("runs/mae", "shards/train", "shards/val", labels_per_class=10)
        print(table.rows["encoder"])
    """
    found = from_keywords(ProbeSettings, {"train": path_of(train), "val": path_of(val), **settings})
    if figure and not layers:
        raise ValueError("--figure is for --layers.")
    if layers and found.layer:
        raise ValueError("--layer and --layers exclude each other: one block for the table, or several side by side?")
    figure = figure and expand_path(figure)
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
@borrows_modules
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
        encoder: An encoder, any module that maps images to vectors 'b d', or anything that `load_encoder` accepts.
        train: Labeled shards, class folders, or a data set with labels (as in `pretrain`), from which neighbors vote.
        val: Data of the same kind, used to compute the scores.
        crop_fraction: Side of the center crop as a fraction of the image's; None for the encoder's own.
        size: Input size in pixels, 64 or "48x64"; None for the encoder's own.
        settings: Further fields of `KNNSettings`, such as neighbors=[20].

    Returns:
        The table.

    Raises:
        ValueError: Data without labels, different classes, or invalid settings.
        FileNotFoundError: The encoder or the shards do not exist.

    Example:
        table = sslvit.knn("runs/dino", "shards/train", "shards/val", neighbors=[20])
        print(table.rows["encoder"]["kNN, k = 20"])
    """
    found = from_keywords(KNNSettings, {"train": path_of(train), "val": path_of(val), **settings})
    with all_ranks():
        network = open_encoder(encoder, crop_fraction, size)
        return probing.probe({"encoder": network}, ProbeSettings(**vars(found), protocol=None))


@for_python
@takes_datasets("train", "val", labels="read")
@borrows_modules
def compare(
    encoders: Mapping[str, EncoderLike] | Sequence[str | os.PathLike[str]],
    train: DataLike,
    val: DataLike | None = None,
    **settings: Unpack[ProbeKeywords],
) -> ProbeTable | MeasureTable:
    """Score several frozen encoders in one table; without labels, by the measures of `health`.

    Args:
        encoders: Row name -> encoder, or a list of paths or runs, whose paths name the rows.
        train: Labeled shards or class folders used to fit the heads, or images without labels.
        val: Data used to compute the scores; may be None only for images without labels.
        settings: Further fields of `ProbeSettings`; protocol=None scores by nearest neighbors only.

    Returns:
        A `ProbeTable`; without labels, a `MeasureTable` of at most 5,000 images.

    Raises:
        ValueError: No encoders, modules without names, the same path twice, encoders for images of different channels,
            or data that cannot be probed.
        FileNotFoundError: An encoder or the shards do not exist.

    Example:
        table = sslvit.compare({"MAE": "runs/mae", "DINO": "runs/dino"}, "shards/train", "shards/val")
        print(table)
    """
    named = _by_row(encoders)
    found = from_keywords(ProbeSettings, {"train": path_of(train), "val": path_of(val or train), **settings})
    with all_ranks():
        networks = {name: open_encoder(encoder) for name, encoder in named.items()}
        if open_shards(found.val).classes is None:
            return _measured(networks, found.val, 5000, found)
        if val is None:
            raise ValueError("--val: labeled images are scored on others than heads are fitted on. Give --val, too.")
        return probing.probe(networks, found)


def _by_row(encoders: Mapping[str, EncoderLike] | Sequence[str | os.PathLike[str]]) -> Mapping[str, EncoderLike]:
    """Row name -> encoder, where paths name their own rows.

    Raises:
        ValueError: There are no encoders, several with the same row, or modules, which have no name.
    """
    if not isinstance(encoders, Mapping):
        paths = [encoders] if isinstance(encoders, (str, os.PathLike, nn.Module)) else list(encoders)
        if any(isinstance(path, nn.Module) for path in paths):
            raise ValueError('encoders: a module has no name for its row. Give a dict, such as {"MAE": encoder}.')
        rows = [os.fspath(path) for path in paths]
        if len(set(rows)) < len(rows):
            raise ValueError("encoders: the same one twice. Name each encoder once.")
        encoders = dict(zip(rows, paths, strict=True))
    if not encoders:
        raise ValueError("encoders: none given. Give a dict of names and encoders, or a list of paths.")
    if PIXELS in encoders:
        raise ValueError(f"encoders: {PIXELS} is the name of the baseline's row. Choose another.")
    return encoders


@for_python
@takes_datasets("data")
@borrows_modules
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
        encoder: An encoder, any module that maps images to vectors 'b d', or anything that `load_encoder` accepts.
        data: Images, with or without labels.
        images: Number of images to use, evenly spaced over the data set.
        layer: Number of the block whose output is used; None for the encoder's own.
        pooling: Pooling of the tokens; None for the encoder's own.
        batch: Images per forward pass.
        workers: Number of loader processes; None to choose by the device.
        device: auto, cpu or cuda.
        precision: float32 or bf16.
        max_unreadable_fraction: Largest tolerated fraction of unreadable images.
        seed: Seed of the crops and of the untrained weights.
        crop_fraction: Side of the center crop as a fraction of the image's; None for the encoder's own.
        size: Input size in pixels, 64 or "48x64"; None for the encoder's own.

    Returns:
        The table, which also has rows for raw pixels and for the same network with untrained weights.

    Raises:
        ValueError: Invalid settings, or unreadable images.
        FileNotFoundError: The encoder or the images do not exist.

    Example:
        table = sslvit.health("runs/dino", "photos")
        print(table.rows["encoder"]["rankme"])
    """
    if images < 2:
        raise ValueError(f"--images {images}: how images differ takes 2 or more.")
    found = from_keywords(ProbeSettings, {
        "train": "", "val": "", "layer": layer, "pooling": pooling, "batch": batch, "workers": workers,
        "device": device, "seed": seed, "precision": precision, "max_unreadable_fraction": max_unreadable_fraction,
    })  # fmt: skip
    with all_ranks():
        return _measured({"encoder": open_encoder(encoder, crop_fraction, size)}, path_of(data), images, found)


def _measured(encoders: dict[str, Encoder], data: str, images: int, settings: ProbeSettings) -> MeasureTable:
    """Measure encoders without labels, with the details needed to report the numbers."""
    index, device = open_shards(data), pick_device(settings.device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    first = next(iter(encoders.values())).settings
    subset = evenly_spaced(len(index), images)
    seen = LabeledSet(index, first.channels, subset, settings.max_unreadable_fraction)
    rows = measure_health(encoders, seen, settings)
    views = describe_views({"raw pixels": first} | {name: encoder.settings for name, encoder in encoders.items()})
    lines = heading_of_views("each image", views["views"], settings.precision)
    heading = "\n".join([f"without labels, on {seen.count_text} of {index.location}", *lines])
    about = {
        "data": index.location, "fingerprint": index.fingerprint(), "images": seen.images,
        "unreadable": seen.unreadable, **views, "precision": settings.precision,
    }  # fmt: skip
    return MeasureTable(rows, heading, 3, about)


@for_python
@takes_datasets("data")
@borrows_modules
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
    """Compute features of images as arrays.

    Args:
        encoder: An encoder, any module that maps images to vectors 'b d', or anything that `load_encoder` accepts.
        data: Shards, a folder of images or a data set (as in `pretrain`), with or without labels.
        output: File for the arrays, with the suffix .npz.
        layer: Number of the block whose output is used; None for the encoder's own.
        pooling: Pooling of the tokens; None for the encoder's own.
        blocks: Number of consecutive blocks, ending with `layer`, whose features are concatenated.
        batch: Images per forward pass.
        workers: Number of loader processes; None to choose by the device.
        device: auto, cpu or cuda.
        precision: float32 or bf16.
        max_unreadable_fraction: Largest tolerated fraction of unreadable images.
        crop_fraction: Side of the center crop as a fraction of the image's; None for the encoder's own.
        size: Input size in pixels, 64 or "48x64"; None for the encoder's own.

    Returns:
        Arrays `features` ('n d') and `keys`, and `labels` with `classes` if the data has labels. If several processes
        share the work, the first one gets the arrays and writes the file, and the others get empty ones.

    Raises:
        ValueError: The file exists already, invalid settings, or unreadable images.
        FileNotFoundError: The encoder or the images do not exist.

    Example:
        found = sslvit.embed("runs/dino", "photos")
        print(found.keys[0], found.features[0])
    """
    output = output and expand_path(output)
    check_new_arrays(output)
    given = {
        "layer": layer, "pooling": pooling, "blocks": blocks, "batch": batch, "workers": workers, "device": device,
        "precision": precision, "max_unreadable_fraction": max_unreadable_fraction,
    }  # fmt: skip
    found = from_keywords(KNNSettings, {"train": "", "val": "", **given})
    with all_ranks():
        network = open_encoder(encoder, crop_fraction, size).to(pick_device(device))
        source = frozen(network, precision)
        readouts = source.readouts(layer, found.blocks, pooling)
        images = LabeledSet(open_shards(path_of(data)), network.settings.channels, None, max_unreadable_fraction)
        made = embedding.embed(source, images, readouts, batch, workers)
        if output is not None and is_first_rank():
            made.save(Path(output))
        return made
