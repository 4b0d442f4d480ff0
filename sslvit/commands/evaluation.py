"""Scores and pictures of an encoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sslvit.commands.files import check_new, check_new_picture, foreign_overrides, only, report, table_of, write_json
from sslvit.commands.options import CroppedEncoder, File, Options, Output, Recipe, Reported, Saved
from sslvit.settings.choices import Arg, check_bounds
from sslvit.settings.probe import (
    BlocksReadout,
    KNNSettings,
    Passes,
    Precision,
    ProbeSettings,
    Readout,
    UnreadableImages,
)

if TYPE_CHECKING:
    from sslvit.models import ViTEncoder
    from sslvit.settings import EncoderSettings


def view_text(encoder: EncoderSettings, precision: Precision) -> str:
    """What is seen of each image, and how features are computed where that is not exact."""
    return encoder.crop_in_words + ("" if precision == "float32" else f"; features computed in {precision}")


def load_scored(options: CroppedEncoder) -> ViTEncoder:
    """The encoder that a command scores, with the crop that was asked for."""
    from sslvit.checkpoint import load_encoder

    encoder = load_encoder(options.encoder, options.layout, options.heads, **foreign_overrides(options))
    if options.crop_fraction is not None:
        if not 0 < options.crop_fraction <= 1:
            raise ValueError(f"--crop-fraction {options.crop_fraction:g}: must be in (0, 1].")
        encoder.settings.crop_fraction = options.crop_fraction
    return encoder


@dataclass(kw_only=True)
class ProbeOptions(Saved, CroppedEncoder, ProbeSettings):
    """Score a frozen encoder: linear probe and kNN, with baselines.

    Example: sslvit probe runs/mae --train shards/train --val shards/val --protocol mae --protocol.epochs 20
    """

    layers: str | None = None
    """Blocks to score side by side and to plot: all, or numbers such as 1,4,8."""
    figure: Annotated[str | None, File] = None
    """PNG file for --layers; null for one in the run's figures."""


def run_probe(options: ProbeOptions) -> None:
    """Score an encoder, and print the table."""
    figure = options.figure and Path(options.figure)
    if options.layers and not figure:
        folder = Path(options.encoder) / "figures"
        figure = folder / "layers.png" if folder.is_dir() else Path("layers.png")
    if options.figure and not options.layers:
        raise ValueError("--figure is for --layers.")
    if options.layers and options.layer:
        raise ValueError("--layer and --layers exclude each other: one block for the table, or several side by side?")
    check_new(options.output)
    check_new_picture(figure or None)
    from sslvit.evaluate.layers import layer_numbers, plot_layers, probe_layers
    from sslvit.ranks import all_ranks, is_first_rank

    settings = only(ProbeSettings, options)
    with all_ranks():
        encoder = load_scored(options)
        if not options.layers:
            show_probe(encoder, settings, options)
            return
        numbers = layer_numbers(options.layers, encoder.settings.depth)
        curve = probe_layers(encoder, settings, numbers)
        if is_first_rank():
            assert figure
            drawn = plot_layers(curve, numbers, figure)
            report(options, f"\n{curve.text()}\n{drawn}", curve.as_dict())


@dataclass(kw_only=True)
class KNNOptions(Saved, CroppedEncoder, KNNSettings):
    """Score a frozen encoder by its nearest neighbors alone.

    Example: sslvit knn runs/dino --train shards/train --val shards/val
    """


def run_knn(options: KNNOptions) -> None:
    """Score an encoder by its neighbors, and print the table."""
    check_new(options.output)
    from sslvit.ranks import all_ranks

    settings = ProbeSettings(**vars(only(KNNSettings, options)), protocol=None)
    with all_ranks():
        show_probe(load_scored(options), settings, options)


def show_probe(encoder: ViTEncoder, settings: ProbeSettings, options: Saved) -> None:
    """Probe one encoder, and print the table with all that a reader needs to quote it."""
    from sslvit.evaluate.probe import probe
    from sslvit.ranks import is_first_rank

    table = probe({"encoder": encoder}, settings)
    if not is_first_rank():
        return
    about = table.about
    skipped = {part: f" ({about[f'{part}_unreadable']:,} cannot be read)" if about[f"{part}_unreadable"] else ""
               for part in ("train", "val")}  # fmt: skip
    of_encoder = about["probed"]["encoder"]
    has_own_views = "fraction" in of_encoder.get("linear", {})  # a paper's protocol says its own below
    view = view_text(encoder.settings, settings.precision)
    lines = [
        f"\nTop-1 accuracy (%) on {about['val_images']:,} images{skipped['val']} of {about['val']}",
        f"(heads fitted on {about['train_images']:,}{skipped['train']} of {about['train']})",
        f"each image{', of few labels and kNN' if has_own_views else ''}: {view}",
    ]
    if about["protocol"]:
        lines.append(f"linear probe: {about['protocol']} ({about['source']})")
        lines.append("  " + "; ".join(in_words(key, value) for key, value in of_encoder["linear"].items()))
    lines.append(
        f"few labels and kNN: {of_encoder['features']}; temperature {about['temperature']}; seed {about['seed']}"
    )
    report(options, "\n".join([*lines, "", table.text()]), table.as_dict())


def in_words(key: str, value: Any) -> str:
    """A setting or a result of a probe, with as many digits as somebody reads."""
    if "accuracy" in key or "score" in key:
        return f"{key} {value:.1f} %"
    return f"{key.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"


@dataclass(kw_only=True)
class HealthOptions(Saved, Passes, UnreadableImages, Readout, CroppedEncoder):
    """Measure features without labels: rank, spectrum, uniformity, alignment.

    Example: sslvit health runs/dino shards/val
    """

    data: Annotated[str, Arg("SHARDS", position=2)]
    """Images, with labels or without."""
    images: int = 5000
    """Number of images, evenly spaced."""
    seed: int = 0
    """Seed of the crops and of the untrained weights."""


def run_health(options: HealthOptions) -> None:
    """Measure features without labels, and print the table."""
    if options.images < 2:
        raise ValueError(f"--images {options.images}: how images differ takes 2 or more.")
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.environment import pick_device
    from sslvit.evaluate.label_free import evenly_spaced, measure_health
    from sslvit.evaluate.sources import LabeledSet

    encoder = load_scored(options)
    index = open_shards(options.data)
    data = LabeledSet(
        index, encoder.settings.channels, evenly_spaced(len(index), options.images), options.max_unreadable_fraction
    )
    rows = measure_health(
        encoder.to(pick_device(options.device)), data, options.layer, options.pooling, options.batch, options.workers,
        options.seed, options.precision,
    )  # fmt: skip
    text = (
        f"\nwithout labels, on {data.count_text} of {index.location}\n"
        f"each image: {view_text(encoder.settings, options.precision)}\n\n{table_of(rows, 3)}"
    )
    report(options, text, rows)


@dataclass(kw_only=True)
class SegmentOptions(Saved, Passes, CroppedEncoder):
    """Score patch tokens by linear segmentation: mean IoU.

    Example: sslvit segment runs/dino --train voc/train --val voc/val --figure segments.png
    """

    train: Annotated[str, Arg("FOLDER")]
    """Folder with images/NAME.jpg and masks/NAME.png that the linear map is fitted on."""
    val: Annotated[str, Arg("FOLDER")]
    """Folder of the same kind that is scored."""
    batch: int = 16
    baselines: bool = True
    """Also score raw pixels and the same architecture with untrained weights."""
    seed: int = 0
    """Seed of the untrained weights and the folds."""
    figure: Annotated[str | None, File] = None
    """PNG file for images, masks and predictions."""


def run_segment(options: SegmentOptions) -> None:
    """Score segmentation, and print the table."""
    check_new(options.output)
    check_new_picture(options.figure)
    from sslvit.evaluate.dense import segment
    from sslvit.evaluate.masks import MaskedImages
    from sslvit.evaluate.probe import untrained
    from sslvit.report.show import plot_predictions

    train, val = (MaskedImages.open(folder) for folder in (options.train, options.val))
    encoder = load_scored(options)
    rows: dict[str, ViTEncoder | None] = {"encoder": encoder}
    if options.baselines:
        rows = {"raw pixels": None, "untrained encoder": untrained(encoder, options.seed), **rows}
    table = segment(
        rows, train, val, options.batch, seed=options.seed, device=options.device, workers=options.workers,
        precision=options.precision,
    )  # fmt: skip
    view = view_text(encoder.settings, options.precision)
    text = (
        f"\nPercent on {len(val):,} images of {val.folder} (maps fitted on {len(train):,} of {train.folder});\n"
        f"of each image and mask: {view}; L2 penalty {table.about['l2']}\n\n{table.text()}"
    )
    if options.figure:
        text += f"\n{plot_predictions(table, val, encoder.settings, options.figure)}"
    report(options, text, {"rows": table.scores, "about": table.about})


@dataclass(kw_only=True)
class ShowOptions(Reported, CroppedEncoder):
    """Plot what an encoder does with images.

    Example: sslvit show attention runs/dino shards/val -o attention.png
    """

    what: Annotated[Literal["attention", "distance", "field"], Arg("WHAT", position=-1)]
    """What to plot: attention (of the class token), distance (of each head's attention) or field (the pixels that reach
    a patch)."""
    data: Annotated[str, Arg("SHARDS", position=2)]
    """Shards, or a folder of images."""
    images: int = 8
    """Number of images, evenly spaced."""
    output: Annotated[str | None, Output] = None
    """PNG file; null for WHAT.png, below ENCODER/figures."""


def run_show(options: ShowOptions) -> None:
    """Plot what an encoder does, and print where the picture is."""
    out = options.output and Path(options.output)
    if not out:
        folder = Path(options.encoder) / "figures"
        out = (folder if folder.is_dir() else Path()) / f"{options.what}.png"
    check_bounds(options, "--", "1 or more", "images")
    check_new_picture(out)
    numbers_file = out.with_suffix(".json")
    if options.what == "distance":
        check_new(numbers_file)
    from sslvit.report import show

    encoder = load_scored(options)
    images = show.some_images(encoder.settings, options.data, options.images)
    if options.what == "attention":
        files = {"figure": show.plot_attention(encoder, images, out)}
    elif options.what == "field":
        files = {"figure": show.plot_field(encoder, images, out)}
    else:
        path, numbers = show.plot_distance(encoder, images, out)
        write_json(numbers_file, numbers)
        files = {"figure": path, "numbers": numbers_file}
    names = {what: str(file) for what, file in files.items()}
    report(options, "\n".join(names.values()), names)


@dataclass(kw_only=True)
class EmbedOptions(Options, Passes, UnreadableImages, BlocksReadout, CroppedEncoder):
    """Write features of images as arrays in one .npz file.

    Example: sslvit embed runs/dino photos -o features.npz
    """

    data: Annotated[str, Arg("IMAGES", position=2)]
    """Shards or a folder, with labels or without."""
    output: Annotated[str, Output]
    """File for the features, which ends in .npz."""


def run_embed(options: EmbedOptions) -> None:
    """Write features, and print what is in the file."""
    if Path(options.output).suffix != ".npz":
        raise ValueError(f"{options.output}: features are written as .npz. Choose a name that ends in .npz.")
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.environment import pick_device
    from sslvit.evaluate.embed import embed
    from sslvit.evaluate.sources import FrozenEncoder, LabeledSet

    encoder = load_scored(options)
    source = FrozenEncoder(encoder.to(pick_device(options.device)), options.precision)
    readouts = source.readouts(options.layer, options.blocks, options.pooling)
    index = open_shards(options.data)
    data = LabeledSet(index, encoder.settings.channels, None, options.max_unreadable_fraction)
    made = embed(source, data, readouts, options.batch, options.workers)
    made.save(Path(options.output))
    arrays = "features, keys, labels and classes" if made.labels is not None else "features and keys"
    print(f"{options.output}: {arrays} of {data.count_text}, {made.features.shape[1]} numbers each")
    print(f"each image: {view_text(encoder.settings, options.precision)}")


@dataclass(kw_only=True)
class BenchOptions(Reported, Recipe):
    """Fill a table of encoders x protocols x data sets, or resume where it stopped.

    Settings of the bench are given as --KEY VALUE, e.g. --out runs/bench, --encoders.MAE runs/mae or --seeds 3.

    Example: sslvit bench cifar10 --device cpu
    """

    config: Annotated[str, Arg("CONFIG", position=1)]
    """YAML file, or the name of one that comes with sslvit, such as cifar10; `sslvit recipes` lists them."""


def run_bench(options: BenchOptions) -> None:
    """Fill the tables."""
    from sslvit.settings.bench import check_sources, load_bench

    settings = load_bench(options.config, options.changes)
    check_sources(settings)
    from sslvit.report.bench import bench

    files = bench(settings)
    if options.json:
        print(json.dumps(json.loads(files["table.json"].read_text()), indent=1))
