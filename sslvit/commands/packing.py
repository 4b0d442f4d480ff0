"""Shards and palettes: pack, index, check, info, palette."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sslvit.commands.files import only, report
from sslvit.commands.options import File, Reported
from sslvit.files import check_new, check_new_picture
from sslvit.settings.choices import Arg
from sslvit.settings.pack import IndexOptions, PackSettings, SourceOptions

if TYPE_CHECKING:
    from sslvit.data.index import ShardIndex


@dataclass(kw_only=True)
class Parallel:
    """Work in processes."""

    workers: int | None = None
    """Number of processes; null for one per core."""


@dataclass(kw_only=True)
class ShardsArg:
    """Shards that are there."""

    folder: Annotated[str, Arg("SHARDS", position=1)]
    """Folder, pattern or address of shards."""


@dataclass(kw_only=True)
class PackOptions(Reported, Parallel, SourceOptions, PackSettings):
    """Pack images into shards with an index.

    Example: sslvit shards pack photos shards/photos --holdout 0.1
    """

    source: Annotated[str, Arg("SRC", position=1)]
    """Images in class folders, or side by side without labels; shards; a list (.csv, .tsv, .jsonl) with a column path
    and perhaps label; an array (.npy, .npz); an IDX file; a data set of Hugging Face, hf:NAME or a folder of
    save_to_disk; one of torchvision, such as torchvision:CIFAR100 with --root FOLDER."""
    destination: Annotated[str, Arg("DST", position=2)]
    """Folder for the shards."""
    holdout: float = 0.0
    """Fraction of each class, its last images, that goes into DST/val; the rest goes into DST/train."""
    part: Annotated[str | None, Arg("I/N", is_path=False)] = None
    """Write the I-th of N parts only, as one machine of several."""
    only: Annotated[str | None, File] = None
    """File with the names of the images that are taken, one a line, as shards check --write makes it for SRC, which are
    shards."""
    overwrite: bool = False
    """Replace shards that are already there."""


def run_pack(options: PackOptions) -> None:
    """Pack images, and print what is in the shards."""
    from sslvit.api import pack

    given = vars(only(PackSettings, options)) | vars(only(SourceOptions, options))
    made = pack(
        options.source, options.destination, holdout=options.holdout, overwrite=options.overwrite,
        workers=options.workers, part=options.part, only=options.only, **given,
    )  # fmt: skip
    if made.indices:
        report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class IndexShardsOptions(Reported, Parallel, IndexOptions, ShardsArg):
    """Index shards that others wrote, or join the parts of a packing.

    Example: sslvit shards index shards/laion --labels json
    """

    merge: bool = False
    """Join what `shards pack --part` wrote."""
    overwrite: bool = False
    """Replace shards that are already there; for --merge."""


def run_index(options: IndexShardsOptions) -> None:
    """Index shards, or join the parts of a packing, and print what is in them."""
    from sslvit.data.inspect import Packing
    from sslvit.data.scan import index_shards
    from sslvit.data.unfinished import finish_packing

    folder = Path(options.folder)
    if options.merge:
        parts = [folder / name for name in ("train", "val") if (folder / name / "packing").is_dir()]
        made = Packing([finish_packing(part, options.overwrite) for part in parts or [folder]])
    else:
        made = Packing([index_shards(folder, options.workers, only(IndexOptions, options))])
    report(options, str(made), made.to_dict())


@dataclass(kw_only=True)
class CheckOptions(Reported, Parallel, ShardsArg):
    """Verify checksums and decode everything; the exit code is 1 if something is wrong.

    With --near-duplicates ENCODER it also finds images whose features are nearly the same. Nothing is deleted: --write
    lists what to keep, for sslvit shards pack --only.

    Example: sslvit shards check shards/photos/train --near-duplicates runs/photos --write keep.txt
    """

    near_duplicates: Annotated[str | None, Arg("ENCODER")] = None
    """Encoder by whose features near-duplicates are found: a run folder, encoder folder or checkpoint file."""
    threshold: float = 0.99
    """Least cosine similarity of two near-duplicates."""
    against: Annotated[str | None, Arg("SHARDS")] = None
    """Shards whose images must not be among these, such as a validation set."""
    write: Annotated[str | None, File] = None
    """File for the names of the images to keep: one of each group, none that is among those of --against."""
    figure: Annotated[str | None, File] = None
    """PNG file for the largest groups."""


def run_check(options: CheckOptions) -> int:
    """Check shards; returns the exit code."""
    if options.near_duplicates is None and any((options.against, options.write, options.figure)):
        raise ValueError("--against, --write and --figure are for --near-duplicates ENCODER.")
    check_new(options.write)
    check_new_picture(options.figure)
    from sslvit.data.inspect import check_shards

    index = find_shards(options.folder)
    found = check_shards(index, options.workers)
    content = {
        "location": index.location, "is_whole": found.is_whole, "images": sum(found.modes.values()),
        "damaged": found.damaged, "corrupt": found.corrupt, "large": found.large, "modes": found.modes,
        "duplicates": [[index.key(sample) for sample in same] for same in found.duplicates],
    }  # fmt: skip
    text = found.text(index)
    if options.near_duplicates is not None:
        more, content["near_duplicates"] = near_duplicates(options, index)
        text += f"\n{more}"
    report(options, text, content)
    return 0 if found.is_whole else 1


def near_duplicates(options: CheckOptions, index: ShardIndex) -> tuple[str, dict[str, Any]]:
    """Near-duplicates of shards, as text and for programs, and the files that were asked for."""
    from sslvit.checkpoint import load_encoder
    from sslvit.evaluate.duplicates import find_near_duplicates

    assert options.near_duplicates is not None
    encoder = load_encoder(options.near_duplicates)
    against = None if options.against is None else find_shards(options.against)
    found = find_near_duplicates(encoder, index, options.threshold, against)
    lines, content = [found.text()], found.to_dict()
    if options.write is not None:
        content |= {"keep": options.write, "kept": found.write_kept(options.write)}
        lines.append(f"  {options.write}: {content['kept']:,} of {len(index):,} images to keep")
    if options.figure is not None and (figure := found.plot(encoder, options.figure)):
        content["figure"] = str(figure)
        lines.append(f"  {figure}")
    return "\n".join(lines), content


@dataclass(kw_only=True)
class InfoOptions(Reported, ShardsArg):
    """Print what is in shards, and what a job on them needs.

    Example: sslvit shards info shards/photos/train --global-batch-size 4096
    """

    global_batch_size: int | None = None
    """Images per optimizer step; null for up to 4096."""


def run_info(options: InfoOptions) -> None:
    """Print what is in shards."""
    from sslvit.data.inspect import describe_shards, shards_content

    index = find_shards(options.folder)
    report(options, describe_shards(index, options.global_batch_size), shards_content(index))


def find_shards(name: str) -> ShardIndex:
    """Shards by folder, pattern or address; those without an index are indexed, but no image folder is packed."""
    from sslvit.data.index import load_index
    from sslvit.data.open import open_shards

    folder = Path(name)
    has_shards = not folder.is_dir() or any(folder.glob("*.tar"))
    return open_shards(name) if has_shards else load_index(folder)


@dataclass(kw_only=True)
class PaletteOptions(Reported):
    """Fit a palette of few colors for pixel sequences on images.

    Example: sslvit palette shards/photos/train -o palette.json --colors 64
    """

    shards: Annotated[str, Arg("SHARDS", position=1)]
    """Shards, or a folder of images."""
    output: Annotated[str, Arg("FILE", flag="-o")]
    """File for the palette as JSON; FILE.png shows it."""
    colors: int | None = None
    """Number of colors; null for 512, or 8 for gray images."""
    image_size: int = 32
    """Side in pixels of the images that the encoder will see."""
    seed: int = 0
    """Seed of the fit."""


def run_palette(options: PaletteOptions) -> None:
    """Fit a palette, and print how well it fits."""
    from sslvit.data.open import open_shards
    from sslvit.data.pixels import check_palette_options, make_palette

    check_palette_options(options.output, options.colors, options.image_size, options.seed)
    index = open_shards(options.shards)
    made = make_palette(index, options.output, options.colors, options.image_size, options.seed)
    error, uniform = made["mean_squared_error"], made["mean_squared_error_uniform"]
    text = (
        f"{options.output}: {len(made['colors'])} colors fitted on {made['pixels']:,} pixels; "
        f"mean squared error {error:.2e} of values in [-1, 1], {error**0.5 * 127.5:.1f} of 255 on average"
        f"{f' (uniform palette: {uniform:.2e}, {uniform**0.5 * 127.5:.1f})' if uniform is not None else ''}\n"
        f"use it with --encoder.palette {options.output}; drawn in {Path(options.output).with_suffix('.png')}"
    )
    report(options, text, made | {"file": options.output, "figure": str(Path(options.output).with_suffix(".png"))})
