"""Packing and checking shards and fitting palettes from Python, with names and paths as on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Unpack

from sslvit.data.index import ShardIndex, load_index
from sslvit.data.inspect import Packing, ShardCheck, check_shards
from sslvit.data.open import open_shards
from sslvit.data.pack import pack_source
from sslvit.data.pixels import check_palette_options, make_palette
from sslvit.data.python_data import DataLike, MapDataset, path_of, takes_datasets
from sslvit.evaluate.duplicates import NearDuplicates, check_comparable, find_near_duplicates
from sslvit.evaluate.encoders import EncoderLike, borrows_modules, open_encoder
from sslvit.files import check_new, check_new_picture, expand_path
from sslvit.messages import for_python
from sslvit.results import Result
from sslvit.settings.keywords import PackKeywords
from sslvit.settings.load import from_keywords
from sslvit.settings.pack import PackSettings, SourceOptions


@dataclass(repr=False)
class CheckedShards(Result):
    """Result of checking shards.

    Args:
        index: The shards.
        found: Damaged shards, corrupt and large images, and exact duplicates.
        near_duplicates: Groups of nearly identical images, if requested.
        files: Written files: "keep" with the names of the images to keep, and "figure".
        kept: Number of images to keep, if their names were written.
    """

    index: ShardIndex
    found: ShardCheck
    near_duplicates: NearDuplicates | None = None
    files: dict[str, Path] = field(default_factory=dict)
    kept: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every shard is undamaged and every image can be decoded."""
        return self.found.is_whole

    def text(self) -> str:
        """The report."""
        lines = [self.found.text(self.index)]
        lines += [self.near_duplicates.text()] if self.near_duplicates else []
        if "keep" in self.files:
            lines.append(f"  {self.files['keep']}: {self.kept:,} of {len(self.index):,} images to keep")
        return "\n".join(lines + ([f"  {self.files['figure']}"] if "figure" in self.files else []))

    def to_dict(self) -> dict[str, Any]:
        """The findings, with images by name."""
        found = self.found
        content = {
            "location": self.index.location, "is_whole": found.is_whole, "images": sum(found.modes.values()),
            "damaged": found.damaged, "corrupt": found.corrupt, "large": found.large, "modes": found.modes,
            "duplicates": [[self.index.key(sample) for sample in same] for same in found.duplicates],
        }  # fmt: skip
        if self.near_duplicates is not None:
            near = self.near_duplicates.to_dict() | {name: str(path) for name, path in self.files.items()}
            content["near_duplicates"] = near if self.kept is None else near | {"kept": self.kept}
        return content

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """A row for each kind of finding."""
        near = self.near_duplicates
        counts = {
            "images": sum(self.found.modes.values()), "damaged shards": len(self.found.damaged),
            "corrupt images": len(self.found.corrupt), "large images": len(self.found.large),
            "images that occur more than once": len(self.found.duplicates),
            **({} if near is None else {"groups of near-duplicates": len(near.within)}),
            **({} if near is None or near.against is None else {"groups across both sets": len(near.leaks)}),
        }  # fmt: skip
        return ("", "number"), counts.items()


@dataclass(repr=False)
class Palette(Result):
    """A fitted palette.

    Args:
        path: The JSON file, for the setting encoder.palette.
        figure: Picture of the palette, and of images in its colors.
        content: Content of the JSON file.
    """

    path: Path
    figure: Path
    content: dict[str, Any]

    @property
    def colors(self) -> list[list[float]]:
        """The colors from dark to light, one value in [-1, 1] per channel."""
        return self.content["colors"]

    def text(self) -> str:
        """The palette's error, and how to use the palette."""
        error, uniform = self.content["mean_squared_error"], self.content["mean_squared_error_uniform"]
        beside = f" (uniform palette: {uniform:.2e}, {uniform**0.5 * 127.5:.1f})" if uniform is not None else ""
        return (
            f"{self.path}: {len(self.colors)} colors fitted on {self.content['pixels']:,} pixels; mean squared error "
            f"{error:.2e} of values in [-1, 1], {error**0.5 * 127.5:.1f} of 255 on average{beside}\n"
            f"use it with --encoder.palette {self.path}; drawn in {self.figure}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Content and paths of the files."""
        return self.content | {"file": str(self.path), "figure": str(self.figure)}

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """Everything but the colors."""
        return ("", ""), ((key, value) for key, value in self.to_dict().items() if key != "colors")


@for_python
def pack(
    source: str | Path | MapDataset,
    destination: str | Path,
    *,
    holdout: float = 0.0,
    part: str | None = None,
    only: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    **settings: Unpack[PackKeywords],
) -> Packing:
    """Pack images into shards with an index.

    Args:
        source: Class folders, a flat folder, shards, a list (.csv, .tsv, .jsonl), an array (.npy, .npz), an IDX file,
            hf:NAME, torchvision:NAME, or a data set object, as in `pretrain`.
        destination: Folder for the shards.
        holdout: Fraction of each class to write to destination/val, taken from its last images; the rest goes to
            destination/train.
        part: "3/64" writes only the third of 64 parts, to pack on several machines.
        only: File with the names of the images to take from existing shards, one per line.
        overwrite: Replace shards that are already there.
        workers: Number of processes; None for one per core.
        settings: Fields of `PackSettings` and `SourceOptions`, such as resize=256 or label_column="species".

    Returns:
        The indices of the shards, with their folders and the skipped images.

    Raises:
        ValueError: No images, shards that are already there, or invalid settings.

    Example:
        packed = sslvit.pack("photos", "shards/photos", holdout=0.1)
        print(packed)
    """
    names = {field.name for field in fields(SourceOptions)}
    of_source = {key: value for key, value in settings.items() if key in names}
    of_packing = {key: value for key, value in settings.items() if key not in names}
    given = expand_path(source) if isinstance(source, (str, Path)) else source
    indices = pack_source(
        given, expand_path(destination), from_keywords(PackSettings, of_packing), holdout, overwrite, workers, part,
        from_keywords(SourceOptions, of_source), only and expand_path(only),
    )  # fmt: skip
    return Packing(indices)


@for_python
@takes_datasets("against")
@borrows_modules
def check(
    shards: str | Path,
    *,
    near_duplicates: EncoderLike | None = None,
    threshold: float = 0.99,
    against: DataLike | None = None,
    write: str | Path | None = None,
    figure: str | Path | None = None,
    workers: int | None = None,
) -> CheckedShards:
    """Verify checksums and decode everything; with an encoder, also find near-duplicates.

    Args:
        shards: Folder, pattern or URL of shards.
        near_duplicates: Encoder whose features are used to find near-duplicates; None to skip this.
        threshold: Smallest cosine similarity of near-duplicates.
        against: Shards or a data set whose images must not be in these shards, such as a validation set.
        write: File for the names of the images to keep, for `pack(..., only=)`.
        figure: PNG file for the largest groups.
        workers: Number of processes; None for one per core.

    Returns:
        The findings.

    Raises:
        ValueError: Invalid options, or a file that exists already.
        FileNotFoundError: The shards or the encoder do not exist.

    Example:
        checked = sslvit.check("shards/photos/train", near_duplicates="runs/photos", against="shards/photos/val")
        print(checked.is_whole, checked.near_duplicates.leaks)
    """
    if near_duplicates is None and any((against, write, figure)):
        raise ValueError("--against, --write and --figure are for --near-duplicates ENCODER.")
    write, figure = (path and expand_path(path) for path in (write, figure))
    check_new(write)
    check_new_picture(figure)
    index = find_shards(expand_path(shards))
    encoder = None if near_duplicates is None else open_encoder(near_duplicates)
    other = None if against is None else find_shards(path_of(against))
    if encoder is not None:
        check_comparable(index, threshold, other)  # before hours of decoding
    made = CheckedShards(index, check_shards(index, workers))
    if encoder is None:
        return made
    made.near_duplicates = found = find_near_duplicates(encoder, index, threshold, other)
    if write is not None:
        made.kept, made.files["keep"] = found.write_kept(write), Path(write)
    if figure is not None and (drawn := found.plot(encoder, figure)):
        made.files["figure"] = drawn
    return made


def find_shards(name: str) -> ShardIndex:
    """Open shards by folder, pattern or URL; shards without an index are indexed, but image folders are not packed."""
    folder = Path(name)
    has_shards = not folder.is_dir() or any(folder.glob("*.tar"))
    return open_shards(name) if has_shards else load_index(folder)


@for_python
@takes_datasets("data")
def fit_palette(
    data: DataLike,
    output: str | Path,
    *,
    colors: int | None = None,
    image_size: int = 32,
    seed: int = 0,
) -> Palette:
    """Fit a color palette to images, for encoders of pixel sequences (iGPT).

    Args:
        data: Shards, a folder of images or a data set, as in `pretrain`.
        output: File for the palette, with the suffix .json; a picture is written next to it.
        colors: Number of colors; None for 512, or 8 for gray images.
        image_size: Side in pixels of the encoder's input images.
        seed: Seed of the fit.

    Returns:
        The palette and its errors.

    Raises:
        ValueError: More colors than the images have, or a file that exists already.
        FileNotFoundError: The images do not exist.

    Example:
        palette = sslvit.fit_palette("shards/photos/train", "palette.json", colors=64)
        run = sslvit.pretrain("igpt/own_images", data="photos", encoder={"palette": str(palette.path)})
    """
    output = expand_path(output)
    check_palette_options(output, colors, image_size, seed)
    content = make_palette(open_shards(path_of(data)), output, colors, image_size, seed)
    return Palette(Path(output), Path(output).with_suffix(".png"), content)
