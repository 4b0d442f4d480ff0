"""Scores and pictures of an encoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sslvit.commands.files import check_new, check_new_picture, unsaid, write_json


def load_scored(options: argparse.Namespace):
    """The encoder that a command scores, with the crop that was asked for."""
    from sslvit.checkpoint import load_encoder

    encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
    if options.crop_fraction is not None:
        if not 0 < options.crop_fraction <= 1:
            raise ValueError(f"--crop-fraction {options.crop_fraction:g}: must be above 0 and at most 1.")
        encoder.settings.crop_fraction = options.crop_fraction
    return encoder


def run_probe(options: argparse.Namespace) -> None:
    settings = probe_settings(options)
    figure = options.figure
    if options.layers and figure is None:
        folder = Path(options.encoder) / "figures"
        figure = folder / "layers.png" if folder.is_dir() else Path("layers.png")
    if options.figure and not options.layers:
        raise ValueError("--figure is for --layers.")
    if options.layers and options.layer:
        raise ValueError("--layer and --layers exclude each other: one block for the table, or several side by side?")
    check_new(options.output)
    check_new_picture(figure)
    from sslvit.evaluate.layers import layer_numbers, plot_layers, probe_layers
    from sslvit.ranks import all_ranks, is_first_rank

    with all_ranks():
        encoder = load_scored(options)
        if not options.layers:
            show_probe(encoder, settings, options.output)
            return
        numbers = layer_numbers(options.layers, encoder.settings.depth)
        curve = probe_layers(encoder, settings, numbers)
        if is_first_rank():
            print(f"\n{curve.text()}")
            write_json(options.output, curve.as_dict())
            print(plot_layers(curve, numbers, figure))


def run_knn(options: argparse.Namespace) -> None:
    settings = probe_settings(options)
    check_new(options.output)
    from sslvit.ranks import all_ranks

    with all_ranks():
        encoder = load_scored(options)
        show_probe(encoder, settings, options.output)


def probe_settings(options: argparse.Namespace):
    """What `probe` and `knn` have in common, and what only one of them knows."""
    from sslvit.settings import ProbeSettings
    from sslvit.settings.load import read_protocol

    common = (
        "train", "val", "layer", "blocks", "pooling", "neighbors", "temperature", "max_unreadable_fraction", "batch",
        "workers", "seeds", "seed", "device",
    )  # fmt: skip
    given = {key: getattr(options, key) for key in common}
    if options.command == "probe":
        given |= {key: getattr(options, key) for key in ("labels_per_class", "labels_percent", "draws")}
        given["protocol"] = read_protocol(options.protocol, options.changes)
    else:
        given["protocol"] = None
    cache = None if options.cache == "none" else options.cache
    return ProbeSettings(**given, baselines=not options.no_baselines, cache=cache)


def show_probe(encoder, settings, output: str | None) -> None:
    """Probe one encoder, print the table with all that a reader needs to quote it, and write it down."""
    from sslvit.evaluate.probe import probe
    from sslvit.ranks import is_first_rank

    table = probe({"encoder": encoder}, settings)
    if not is_first_rank():
        return
    about = table.about
    left_out = {part: f" ({about[f'{part}_unreadable']:,} cannot be read)" if about[f"{part}_unreadable"] else ""
                for part in ("train", "val")}  # fmt: skip
    print(f"\nTop-1 accuracy (%) on {about['val_images']:,} images{left_out['val']} of {about['val']}")
    print(f"(heads fitted on {about['train_images']:,}{left_out['train']} of {about['train']})")
    of_encoder = about["probed"]["encoder"]
    has_own_views = "fraction" in of_encoder.get("linear", {})  # a paper's protocol says its own below
    print(f"each image{', of few labels and kNN' if has_own_views else ''}: {about['view']}")
    if about["protocol"]:
        print(f"linear probe: {about['protocol']} ({about['source']})")
        print("  " + "; ".join(in_words(key, value) for key, value in of_encoder["linear"].items()))
    print(f"few labels and kNN: {of_encoder['features']}; temperature {about['temperature']}; seed {about['seed']}")
    print(f"\n{table.text()}")
    write_json(output, table.as_dict())


def in_words(key: str, value: Any) -> str:
    """A setting or a result of a probe, with as many digits as somebody reads."""
    if "accuracy" in key or "score" in key:
        return f"{key} {value:.1f} %"
    return f"{key.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Refuse options below their least value."""
    for key, value in least.items():
        if getattr(options, key) < value:
            raise ValueError(f"--{key} {getattr(options, key)}: must be {value} or more.")


def run_health(options: argparse.Namespace) -> None:
    if options.images < 2:
        raise ValueError(f"--images {options.images}: how images differ takes 2 or more.")
    check_least(options, batch=1, workers=0, seed=0)
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.environment import pick_device
    from sslvit.evaluate.label_free import evenly_spaced, measure_health
    from sslvit.evaluate.scores import format_table
    from sslvit.evaluate.sources import LabeledSet

    encoder = load_scored(options)
    index = open_shards(options.data)
    data = LabeledSet(
        index, encoder.settings.channels, evenly_spaced(len(index), options.images), options.max_unreadable_fraction
    )
    rows = measure_health(
        encoder.to(pick_device(options.device)), data, options.layer, options.pooling, options.batch, options.workers,
        options.seed,
    )  # fmt: skip
    print(f"\nwithout labels, on {data.count_text} of {index.location}")
    print(f"each image: {encoder.settings.crop_in_words}\n")
    print(format_table({row: {name: [value] for name, value in of.items()} for row, of in rows.items()}, 3))
    write_json(options.output, rows)


def run_segment(options: argparse.Namespace) -> None:
    check_least(options, batch=1, seed=0)
    check_new(options.output)
    check_new_picture(options.figure)
    from sslvit.evaluate.dense import segment
    from sslvit.evaluate.masks import MaskedImages
    from sslvit.evaluate.probe import untrained
    from sslvit.report.show import plot_predictions

    train, val = (MaskedImages.open(folder) for folder in (options.train, options.val))
    encoder = load_scored(options)
    rows = {"encoder": encoder}
    if not options.no_baselines:
        rows = {"raw pixels": None, "untrained encoder": untrained(encoder, options.seed), **rows}
    table = segment(rows, train, val, options.batch, seed=options.seed, device=options.device)
    print(f"\nPercent on {len(val):,} images of {val.folder} (maps fitted on {len(train):,} of {train.folder});")
    print(f"of each image and mask: {table.about['view']}; L2 penalty {table.about['l2']}\n\n{table.text()}")
    write_json(options.output, {"rows": table.scores, "about": table.about})
    if options.figure:
        print(plot_predictions(table, val, encoder.settings, options.figure))


def run_show(options: argparse.Namespace) -> None:
    out = options.output
    if out is None:
        folder = Path(options.encoder) / "figures"
        out = (folder if folder.is_dir() else Path()) / f"{options.what}.png"
    if options.images < 1:
        raise ValueError(f"--images {options.images}: must be 1 or more.")
    check_new_picture(out)
    numbers_file = Path(out).with_suffix(".json")
    if options.what == "distance":
        check_new(numbers_file)
    from sslvit.report import show

    encoder = load_scored(options)
    images = show.some_images(encoder.settings, options.data, options.images)
    if options.what == "attention":
        print(show.plot_attention(encoder, images, out))
    elif options.what == "field":
        print(show.plot_field(encoder, images, out))
    else:
        path, numbers = show.plot_distance(encoder, images, out)
        write_json(numbers_file, numbers)
        print(f"{path}\n{numbers_file}")


def run_embed(options: argparse.Namespace) -> None:
    check_least(options, batch=1, workers=0, blocks=1)
    if Path(options.output).suffix != ".npz":
        raise ValueError(f"{options.output}: features are written as .npz. Choose a name that ends in .npz.")
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.environment import pick_device
    from sslvit.evaluate.embed import embed
    from sslvit.evaluate.sources import FrozenEncoder, LabeledSet

    encoder = load_scored(options)
    source = FrozenEncoder(encoder.to(pick_device(options.device)))
    readouts = source.readouts(options.layer, options.blocks, options.pooling)
    index = open_shards(options.data)
    data = LabeledSet(index, encoder.settings.channels, None, options.max_unreadable_fraction)
    made = embed(source, data, readouts, options.batch, options.workers)
    made.save(Path(options.output))
    arrays = "features, keys, labels and classes" if made.labels is not None else "features and keys"
    print(f"{options.output}: {arrays} of {data.count_text}, {made.features.shape[1]} numbers each")
    print(f"each image: {encoder.settings.crop_in_words}")


def run_bench(options: argparse.Namespace) -> None:
    from sslvit.report.bench import bench
    from sslvit.settings.bench import load_bench

    given = {key: getattr(options, key) for key in ("out", "device")}
    bench(load_bench(options.config, {key: value for key, value in given.items() if value is not None}))
