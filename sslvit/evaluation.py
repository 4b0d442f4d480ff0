"""Frozen encoders from Python: scores, measures and features, by names and paths as the commands take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from sslvit.data.open import open_shards
from sslvit.data.plan import evenly_spaced
from sslvit.data.python_data import DataLike, path_of, takes_datasets
from sslvit.environment import pick_device
from sslvit.evaluate import embed as embedding
from sslvit.evaluate import probe as probing
from sslvit.evaluate.encoders import EncoderLike, Size, keeps_devices, open_encoder
from sslvit.evaluate.label_free import measure_health
from sslvit.evaluate.layers import layer_numbers, plot_layers, probe_layers
from sslvit.evaluate.probe import ProbeTable
from sslvit.evaluate.scores import MeasureTable
from sslvit.evaluate.sources import LabeledSet, frozen, view_in_words
from sslvit.files import check_new_arrays, check_new_picture, expand_path
from sslvit.messages import for_python
from sslvit.models import Encoder
from sslvit.ranks import all_ranks, is_first_rank
from sslvit.settings import ProbeSettings
from sslvit.settings.keywords import KNNKeywords, ProbeKeywords
from sslvit.settings.load import from_keywords
from sslvit.settings.probe import Device, KNNSettings, Pooling, Precision


@for_python
@takes_datasets("train", "val", labels="needed")
@keeps_devices
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
@keeps_devices
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
    found = from_keywords(KNNSettings, {"train": path_of(train), "val": path_of(val), **settings})
    with all_ranks():
        network = open_encoder(encoder, crop_fraction, size)
        return probing.probe({"encoder": network}, ProbeSettings(**vars(found), protocol=None))


@for_python
@takes_datasets("train", "val", labels="read")
@keeps_devices
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
    found = from_keywords(ProbeSettings, {"train": path_of(train), "val": path_of(val or train), **settings})
    with all_ranks():
        networks = {name: open_encoder(encoder) for name, encoder in named.items()}
        if open_shards(found.val).classes is None:
            return _measured(networks, found.val, 5000, found)
        if val is None:
            raise ValueError("--val: labeled images are scored on others than heads are fitted on. Give --val, too.")
        return probing.probe(networks, found)


@for_python
@takes_datasets("data")
@keeps_devices
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
    found = from_keywords(ProbeSettings, {
        "train": "", "val": "", "layer": layer, "pooling": pooling, "batch": batch, "workers": workers,
        "device": device, "seed": seed, "precision": precision, "max_unreadable_fraction": max_unreadable_fraction,
    })  # fmt: skip
    with all_ranks():
        return _measured({"encoder": open_encoder(encoder, crop_fraction, size)}, path_of(data), images, found)


def _measured(encoders: dict[str, Encoder], data: str, images: int, settings: ProbeSettings) -> MeasureTable:
    """Measures without labels of encoders, with what a reader needs to quote them."""
    index, device = open_shards(data), pick_device(settings.device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    first = next(iter(encoders.values())).settings
    subset = evenly_spaced(len(index), images)
    seen = LabeledSet(index, first.channels, subset, settings.max_unreadable_fraction)
    rows = measure_health(encoders, seen, settings)
    heading = f"without labels, on {seen.count_text} of {index.location}\neach image: "
    about = {
        "data": index.location, "fingerprint": index.fingerprint(), "images": seen.images,
        "unreadable": seen.unreadable, "view": first.crop_in_words, "image_size": first.image_size,
        "precision": settings.precision,
    }  # fmt: skip
    return MeasureTable(rows, heading + view_in_words(first, settings.precision), 3, about)


@for_python
@takes_datasets("data")
@keeps_devices
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
    output = output and expand_path(output)
    check_new_arrays(output)
    given = {
        "layer": layer, "pooling": pooling, "blocks": blocks, "batch": batch, "workers": workers, "device": device,
        "precision": precision, "max_unreadable_fraction": max_unreadable_fraction,
    }  # fmt: skip
    found = from_keywords(KNNSettings, {"train": "", "val": "", **given})
    network = open_encoder(encoder, crop_fraction, size).to(pick_device(device))
    source = frozen(network, precision)
    readouts = source.readouts(layer, found.blocks, pooling)
    images = LabeledSet(open_shards(path_of(data)), network.settings.channels, None, max_unreadable_fraction)
    made = embedding.embed(source, images, readouts, batch, workers)
    if output is not None:
        made.save(Path(output))
    return made
