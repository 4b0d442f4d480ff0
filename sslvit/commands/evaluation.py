"""Commands that score encoders and plot pictures of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from sslvit.commands.files import foreign_overrides, only, report, write_json
from sslvit.commands.options import CroppedEncoder, File, Output, Recipe, Reported, Saved
from sslvit.files import check_new, check_new_arrays, check_new_picture
from sslvit.settings.choices import Arg
from sslvit.settings.probe import (
    BlocksReadout,
    KNNSettings,
    Passes,
    ProbeSettings,
    Readout,
    UnreadableImages,
)
from sslvit.stopping import is_first_process

if TYPE_CHECKING:
    from sslvit.models import Encoder


def load_scored(options: CroppedEncoder) -> Encoder:
    """Load the encoder to score, with the requested crop and size."""
    from sslvit.checkpoint import load_encoder
    from sslvit.evaluate.encoders import open_encoder

    encoder = load_encoder(options.encoder, options.layout, options.heads, **foreign_overrides(options))
    return open_encoder(encoder, options.crop_fraction, options.size)


@dataclass(kw_only=True)
class ProbeOptions(Saved, CroppedEncoder, ProbeSettings):
    """Score a frozen encoder: linear probe and kNN, with baselines.

    Example: sslvit probe runs/mae --train shards/train --val shards/val --protocol mae --protocol.epochs 20
    """

    layers: str | None = None
    """Blocks to score side by side and to plot: all, or numbers such as 1,4,8."""
    figure: Annotated[str | None, File] = None
    """PNG file for --layers; null for layers.png in ENCODER/figures, or in this folder if that does not exist."""


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
    check_new_picture(figure)
    from sslvit.evaluation import probe

    table = probe(load_scored(options), layers=options.layers, figure=figure, **vars(only(ProbeSettings, options)))
    if is_first_process():
        report(options, f"\n{table}", table.to_dict())


@dataclass(kw_only=True)
class KNNOptions(Saved, CroppedEncoder, KNNSettings):
    """Score a frozen encoder by its nearest neighbors alone.

    Example: sslvit knn runs/dino --train shards/train --val shards/val
    """


def run_knn(options: KNNOptions) -> None:
    """Score an encoder by its neighbors, and print the table."""
    check_new(options.output)
    from sslvit.evaluation import knn

    table = knn(load_scored(options), **vars(only(KNNSettings, options)))
    if is_first_process():
        report(options, f"\n{table}", table.to_dict())


@dataclass(kw_only=True)
class CompareOptions(Saved, ProbeSettings):
    """Score several frozen encoders in one table.

    Example: sslvit compare runs/before runs/after --train shards/train --val shards/val --labels-per-class 10
    """

    encoders: Annotated[list[str], Arg("ENCODER", position=1)]
    """Run folders, encoder folders or checkpoint files."""


def run_compare(options: CompareOptions) -> None:
    """Score encoders, and print the table."""
    check_new(options.output)
    from sslvit.evaluation import compare

    table = compare(options.encoders, **vars(only(ProbeSettings, options)))
    if is_first_process():
        report(options, f"\n{table}", table.to_dict())


@dataclass(kw_only=True)
class HealthOptions(Saved, Passes, UnreadableImages, Readout, CroppedEncoder):
    """Measure features without labels: rank, spectrum, uniformity, alignment.

    Example: sslvit health runs/dino shards/val
    """

    data: Annotated[str, Arg("SHARDS", position=2)]
    """Images, with or without labels."""
    images: int = 5000
    """Number of images to use, evenly spaced."""
    seed: int = 0
    """Seed of the crops and of the untrained weights."""


def run_health(options: HealthOptions) -> None:
    """Measure features without labels, and print the table."""
    check_new(options.output)
    from sslvit.evaluation import health

    given = vars(only(Passes, options)) | vars(only(UnreadableImages, options)) | vars(only(Readout, options))
    table = health(load_scored(options), options.data, images=options.images, seed=options.seed, **given)
    if is_first_process():
        report(options, f"\n{table}", table.to_dict())


@dataclass(kw_only=True)
class SegmentOptions(Saved, Passes, CroppedEncoder):
    """Score patch tokens by linear segmentation: mean IoU.

    Example: sslvit segment runs/dino --train voc/train --val voc/val --figure segments.png
    """

    train: Annotated[str, Arg("FOLDER")]
    """Folder with images/NAME.jpg and masks/NAME.png, used to fit the linear map."""
    val: Annotated[str, Arg("FOLDER")]
    """Folder of the same kind, used to compute the scores."""
    batch: int = 16
    baselines: bool = True
    """Also score raw pixels and the same architecture with untrained weights."""
    seed: int = 0
    """Seed of the untrained weights and of the choice of held-out images."""
    allow_same_data: bool = False
    """Allow the same images in both sets; the scores then say nothing about other images."""
    figure: Annotated[str | None, File] = None
    """PNG file for images, masks and predictions."""


def run_segment(options: SegmentOptions) -> None:
    """Score segmentation, and print the table."""
    check_new(options.output)
    check_new_picture(options.figure)
    from sslvit.segmentation import segment

    table = segment(
        load_scored(options), options.train, options.val, baselines=options.baselines, seed=options.seed,
        allow_same_data=options.allow_same_data, figure=options.figure, **vars(only(Passes, options)),
    )  # fmt: skip
    report(options, f"\n{table}", table.to_dict())


@dataclass(kw_only=True)
class ShowOptions(Recipe, Reported, CroppedEncoder):
    """Plot an encoder's attention, features or reconstructions, or a recipe's views or schedule.

    For views and schedule, settings of the recipe can be changed by --KEY VALUE.

    Example: sslvit show neighbors runs/dino photos -o neighbors.png
    """

    what: Annotated[
        Literal["attention", "distance", "field", "neighbors", "pca", "similarity", "reconstruct", "views", "schedule"],
        Arg("WHAT", position=-1),
    ]
    """What to plot: attention (of the class token), distance (of each head's attention), field (receptive field of a
    patch), neighbors (images with the nearest features), pca (principal components of the patches' features as
    colors), similarity (of one patch's features to those of all patches), reconstruct (an MAE run's reconstruction
    from visible patches), views (a recipe's input to its model; give the recipe instead of an encoder) or schedule (a
    recipe's learning rate and other scheduled values over the epochs)."""
    data: Annotated[str | None, Arg("SHARDS", position=2)] = None
    """Shards, or a folder of images; not needed for a schedule if the recipe specifies batch size and epochs."""
    images: int | None = None
    """Number of images, evenly spaced; null for 8."""
    among: int | None = None
    """Number of evenly spaced images in which neighbors are searched; null for 1,000."""
    patch: Annotated[str | None, Arg("ROW,COLUMN")] = None
    """Patch for similarity, counted from 0,0 at the top left; null for the middle one."""
    output: Annotated[str | None, Output] = None
    """PNG file; null for WHAT.png in ENCODER/figures, or in this folder if that does not exist."""


def run_show(options: ShowOptions) -> None:
    """Plot a picture, and print its path."""
    out = options.output and Path(options.output)
    if not out:
        folder = Path(options.encoder) / "figures"
        out = (folder if folder.is_dir() else Path()) / f"{options.what}.png"
    numbers_file = out.with_suffix(".json")
    if options.what == "distance":
        check_new(numbers_file)
    check_new_picture(out)
    from sslvit.reports.show import show

    is_run = options.what in ("reconstruct", "views", "schedule")  # not possible with an encoder alone
    for key in ("heads", "layout", "weights", "image_size", "palette") if is_run else ():
        if getattr(options, key, None) is not None:
            of_released = " A released MAE is opened from Python: sslvit.show('reconstruct', load_mae(FILE), IMAGES)."
            raise ValueError(
                f"show {options.what}: takes a run and no --{key.replace('_', '-')}."
                f"{of_released if options.what == 'reconstruct' else ''}"
            )
    picture = show(
        options.what, options.encoder if is_run else load_scored(options), options.data, out, images=options.images,
        among=options.among, patch=options.patch, crop_fraction=options.crop_fraction if is_run else None,
        size=options.size if is_run else None, **options.changes,
    )  # fmt: skip
    files = {"figure": str(out)}
    if picture.numbers:
        write_json(numbers_file, picture.numbers)
        files["numbers"] = str(numbers_file)
    report(options, "\n".join(files.values()), files)


@dataclass(kw_only=True)
class EmbedOptions(Reported, Passes, UnreadableImages, BlocksReadout, CroppedEncoder):
    """Write features of images to an .npz file.

    Example: sslvit embed runs/dino photos -o features.npz
    """

    data: Annotated[str, Arg("IMAGES", position=2)]
    """Shards or a folder of images, with or without labels."""
    output: Annotated[str, Output]
    """File for the features, with the suffix .npz."""


def run_embed(options: EmbedOptions) -> None:
    """Write features, and print the content of the file."""
    check_new_arrays(options.output)
    from sslvit.evaluation import embed

    given = vars(only(Passes, options)) | vars(only(UnreadableImages, options)) | vars(only(BlocksReadout, options))
    made = embed(load_scored(options), options.data, options.output, **given)
    if is_first_process():
        report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class BenchOptions(Reported, Recipe):
    """Fill a table of encoders x protocols x data sets, or resume where it stopped.

    Settings of the bench are given as --KEY VALUE, e.g. --out runs/bench, --encoders.MAE runs/mae or --seeds 3.

    Example: sslvit bench cifar10 --device cpu
    """

    config: Annotated[str, Arg("CONFIG", position=1)]
    """YAML file, or the name of one included in sslvit, such as cifar10; `sslvit recipes` lists them."""


def run_bench(options: BenchOptions) -> None:
    """Fill the tables, and print them."""
    from sslvit.settings.bench import check_sources, load_bench

    check_sources(load_bench(options.config, options.changes))  # before importing torch, which takes seconds
    from sslvit.reports.bench import bench

    made = bench(options.config, **options.changes)
    report(options, f"\n{made}", made.to_dict())
