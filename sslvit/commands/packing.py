"""Shards and palettes: pack, index, check, info, palette."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_pack(options: argparse.Namespace) -> None:
    from sslvit.data.any_source import SourceOptions
    from sslvit.data.pack import pack_source
    from sslvit.data.store import PackSettings

    settings = PackSettings(
        options.shard_mb, options.resize, options.encode, options.quality,
        options.orientation or "upright", options.decode, options.max_pixels,
    )  # fmt: skip
    of_source = SourceOptions(options.labels, options.label_column, options.images, options.layout, options.convert)
    indices = pack_source(
        options.source, options.destination, settings, options.holdout, options.overwrite, options.workers,
        options.part, of_source,
    )  # fmt: skip
    for index in indices:
        show_shards(index)


def run_index(options: argparse.Namespace) -> None:
    from sslvit.data.scan import IndexOptions, index_shards
    from sslvit.data.unfinished import finish_packing

    folder = Path(options.folder)
    if not options.merge:
        given = IndexOptions(options.labels, options.image, options.orientation)
        show_shards(index_shards(folder, options.workers, given))
        return
    parts = [folder / name for name in ("train", "val") if (folder / name / "packing").is_dir()]
    for part in parts or [folder]:
        show_shards(finish_packing(part, options.overwrite))


def run_check(options: argparse.Namespace) -> int:
    from sslvit.data.inspect import check_shards

    index = find_shards(options.folder)
    found = check_shards(index, options.workers)
    print(found.text(index))
    return 0 if found.is_whole else 1


def run_info(options: argparse.Namespace) -> None:
    show_shards(find_shards(options.folder), options.global_batch_size)


def find_shards(name: str):
    """Shards by folder, pattern or address; those without an index are indexed, but no image folder is packed."""
    from sslvit.data.index import load_index
    from sslvit.data.open import open_shards

    folder = Path(name)
    has_shards = not folder.is_dir() or any(folder.glob("*.tar"))
    return open_shards(name) if has_shards else load_index(folder)


def show_shards(index, global_batch_size: int | None = None) -> None:
    from sslvit.data.inspect import describe_shards

    print(describe_shards(index, global_batch_size))


def run_palette(options: argparse.Namespace) -> None:
    from sslvit.data.open import open_shards
    from sslvit.data.pixels import check_palette_options, make_palette

    check_palette_options(options.output, options.colors, options.image_size, options.seed)
    index = open_shards(options.shards)
    made = make_palette(index, options.output, options.colors, options.image_size, options.seed)
    error, uniform = made["mean_squared_error"], made["mean_squared_error_uniform"]
    print(
        f"{options.output}: {len(made['colors'])} colors fitted on {made['pixels']:,} pixels; "
        f"mean squared error {error:.2e} of values in [-1, 1], {error**0.5 * 127.5:.1f} of 255 on average "
        f"{f' (uniform palette: {uniform:.2e}, {uniform**0.5 * 127.5:.1f})' if uniform is not None else ''}\n"
        f"use it with --encoder.palette {options.output}; drawn in {Path(options.output).with_suffix('.png')}"
    )
