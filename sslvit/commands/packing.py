"""Commands for shards and palettes: pack, index, check, info, palette."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslvit.commands.files import only, report
from sslvit.commands.options import File, Reported
from sslvit.settings.choices import Arg
from sslvit.settings.pack import IndexOptions, PackSettings, SourceOptions


@dataclass(kw_only=True)
class Parallel:
    """Options of a command that works in several processes."""

    workers: int | None = None
    """Number of processes; null for one per core."""


@dataclass(kw_only=True)
class ShardsArg:
    """Existing shards."""

    shards: Annotated[str, Arg("SHARDS", position=1)]
    """Folder, pattern or URL of shards."""


@dataclass(kw_only=True)
class PackOptions(Reported, Parallel, SourceOptions, PackSettings):
    """Pack images into shards with an index.

    Example: sslvit shards pack photos shards/photos --holdout 0.1
    """

    source: Annotated[str, Arg("SRC", position=1)]
    """Images in class folders, or in one folder without labels; shards; a list (.csv, .tsv, .jsonl) with a column
    "path" and optionally "label"; an array (.npy, .npz); an IDX file; a Hugging Face data set, hf:NAME or a folder
    written by save_to_disk; a torchvision data set, such as torchvision:CIFAR100 with --root FOLDER."""
    destination: Annotated[str, Arg("DST", position=2)]
    """Folder for the shards."""
    holdout: float = 0.0
    """Fraction of each class to write to DST/val, taken from its last images; the rest goes to DST/train."""
    part: Annotated[str | None, Arg("I/N", is_path=False)] = None
    """Write only the I-th of N parts, to pack on several machines."""
    only: Annotated[str | None, File] = None
    """File with the names of the images to take, one per line, as written by shards check --write; SRC must be shards.
    """
    overwrite: bool = False
    """Replace shards that are already there."""


def run_pack(options: PackOptions) -> None:
    """Pack images, and print the content of the shards."""
    from sslvit.shards import pack

    given = vars(only(PackSettings, options)) | vars(only(SourceOptions, options))
    made = pack(
        options.source, options.destination, holdout=options.holdout, overwrite=options.overwrite,
        workers=options.workers, part=options.part, only=options.only, **given,
    )  # fmt: skip
    if made.indices:
        report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class IndexShardsOptions(Reported, Parallel, IndexOptions, ShardsArg):
    """Index shards written by other tools, or join the parts of a packing.

    Example: sslvit shards index shards/laion --labels json
    """

    merge: bool = False
    """Join the parts written by `shards pack --part`."""
    overwrite: bool = False
    """With --merge, replace shards that are already there."""


def run_index(options: IndexShardsOptions) -> None:
    """Index shards, or join the parts of a packing, and print their content."""
    from sslvit.data.index import is_unfinished
    from sslvit.data.inspect import Packing
    from sslvit.data.scan import index_shards
    from sslvit.data.unfinished import finish_packing

    folder = Path(options.shards)
    if options.merge:
        splits = [folder / name for name in ("train", "val") if is_unfinished(folder / name)]
        made = Packing([finish_packing(split, options.overwrite) for split in splits or [folder]])
    else:
        made = Packing([index_shards(folder, options.workers, only(IndexOptions, options))])
    report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class CheckOptions(Reported, Parallel, ShardsArg):
    """Verify checksums and decode everything; the exit code is 1 if something is wrong.

    With --near-duplicates ENCODER, also find images with nearly the same features. Nothing is deleted: --write lists
    the images to keep, for sslvit shards pack --only.

    Example: sslvit shards check shards/photos/train --near-duplicates runs/photos --write keep.txt
    """

    near_duplicates: Annotated[str | None, Arg("ENCODER")] = None
    """Encoder whose features are used to find near-duplicates: a run folder, encoder folder or checkpoint file."""
    threshold: float = 0.99
    """Smallest cosine similarity of near-duplicates."""
    against: Annotated[str | None, Arg("SHARDS")] = None
    """Shards whose images must not be in SHARDS, such as a validation set."""
    write: Annotated[str | None, File] = None
    """File for the names of the images to keep: one of each group, and none with a near-duplicate in --against."""
    figure: Annotated[str | None, File] = None
    """PNG file for the largest groups."""


def run_check(options: CheckOptions) -> int:
    """Check shards; returns the exit code."""
    from sslvit.shards import check

    checked = check(
        options.shards, near_duplicates=options.near_duplicates, threshold=options.threshold, against=options.against,
        write=options.write, figure=options.figure, workers=options.workers,
    )  # fmt: skip
    report(options, str(checked), checked.to_dict())
    return 0 if checked.is_whole else 1


@dataclass(kw_only=True)
class InfoOptions(Reported, ShardsArg):
    """Print the content of shards, and the requirements of a job that reads them.

    Example: sslvit shards info shards/photos/train --global-batch-size 4096
    """

    global_batch_size: int | None = None
    """Images per optimizer step; null for up to 4096, without a number of steps."""


def run_info(options: InfoOptions) -> None:
    """Print the content of shards."""
    from sslvit.data.inspect import describe_shards, shards_content
    from sslvit.shards import find_shards

    index = find_shards(options.shards)
    report(options, describe_shards(index, options.global_batch_size), shards_content(index))


@dataclass(kw_only=True)
class PaletteOptions(Reported):
    """Fit a color palette to images, for encoders of pixel sequences (iGPT).

    Example: sslvit palette shards/photos/train -o palette.json --colors 64
    """

    data: Annotated[str, Arg("SHARDS", position=1)]
    """Shards, or a folder of images."""
    output: Annotated[str, Arg("FILE", flag="-o")]
    """JSON file for the palette; a picture is written next to it as .png."""
    colors: int | None = None
    """Number of colors; null for 512, or 8 for gray images."""
    image_size: int = 32
    """Side in pixels of the encoder's input images."""
    seed: int = 0
    """Seed of the fit."""


def run_palette(options: PaletteOptions) -> None:
    """Fit a palette, and print its error."""
    from sslvit.shards import fit_palette

    made = fit_palette(
        options.data, options.output, colors=options.colors, image_size=options.image_size, seed=options.seed
    )
    report(options, str(made), made.to_dict())
