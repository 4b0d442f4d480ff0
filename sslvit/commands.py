"""The commands: each imports what it needs, calls it and prints. Looking at this file costs no torch."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def run_demo(options: argparse.Namespace) -> None:
    from sslvit.report.demo import demo

    demo(options.data, options.archive, options.out, options.overwrite, options.seed, options.changes)


def run_pack(options: argparse.Namespace) -> None:
    from sslvit.data.pack import pack_source
    from sslvit.data.store import PackSettings

    settings = PackSettings(options.shard_mb, options.resize, options.encode, options.quality)
    indices = pack_source(
        options.source, options.destination, settings, options.holdout, options.overwrite, options.workers,
        options.part,
    )  # fmt: skip
    for index in indices:
        show_shards(index)


def run_index(options: argparse.Namespace) -> None:
    from sslvit.data.pack import finish_packing
    from sslvit.data.scan import index_shards

    folder = Path(options.folder)
    if not options.merge:
        show_shards(index_shards(folder, options.workers))
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
    show_shards(find_shards(options.folder), options.global_batch)


def find_shards(name: str):
    """Shards with an index, a pattern or an address; nothing is packed or indexed in a folder of the user's."""
    from sslvit.data.index import load_index
    from sslvit.data.open import open_shards

    return load_index(name) if "{" not in name and "://" not in name else open_shards(name, "")


def show_shards(index, global_batch: int | None = None) -> None:
    from sslvit.data.inspect import describe_shards

    print(describe_shards(index, global_batch))


def run_palette(options: argparse.Namespace) -> None:
    from sslvit.data.open import open_shards
    from sslvit.data.pixels import make_palette

    index = open_shards(options.shards, f"{options.shards.rstrip('/')}-shards")
    made = make_palette(index, options.output, options.colours, options.image_size, options.seed)
    error, uniform = made["mean_squared_error"], made["mean_squared_error_uniform"]
    print(
        f"{options.output}: {len(made['colours'])} colours fitted on {made['pixels']:,} pixels; "
        f"mean squared error {error:.2e} of values in [-1, 1], {error**0.5 * 127.5:.1f} of 255 on average "
        f"{f' (uniform palette: {uniform:.2e}, {uniform**0.5 * 127.5:.1f})' if uniform is not None else ''}\n"
        f"use it with --encoder.palette {options.output}; drawn in {Path(options.output).with_suffix('.png')}"
    )


def run_pretrain(options: argparse.Namespace) -> None:
    from sslvit.api import pretrain

    pretrain(
        options.config, options.data, options.out, options.init, options.resume, options.overwrite,
        **options.changes,
    )  # fmt: skip


def run_finetune(options: argparse.Namespace) -> None:
    from sslvit.api import finetune

    folder = finetune(
        options.encoder, options.train, options.val, options.config, options.out, options.scratch, options.resume,
        options.overwrite, **options.changes,
    )  # fmt: skip
    found = json.loads(folder.scores.read_text())
    among = "" if found["top5"] is None else f", {found['top5']:.1f} % among five"
    print(
        f"{found['top1']:.1f} % right{among} of {found['images']:,} images of {found['val']}, after the last step; "
        f"more in {folder.scores}"
    )


def run_settings(options: argparse.Namespace) -> None:
    from sslvit.settings.load import describe_settings

    print(describe_settings())


def unsaid(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that a released file does not say, where they are given."""
    from sslvit.settings.palette import UNIFORM, read_palette

    given = {"image_size": options.image_size} if options.image_size else {}
    if options.palette:
        given["palette"] = UNIFORM if options.palette == UNIFORM else read_palette(options.palette)
    return given


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
    from sslvit.checkpoint import load_encoder
    from sslvit.evaluate.layers import draw_layers, layer_numbers, probe_layers
    from sslvit.ranks import all_ranks, is_first_rank

    with all_ranks():
        encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
        if not options.layers:
            show_probe(encoder, settings, options.output)
            return
        numbers = layer_numbers(options.layers, encoder.settings.depth)
        curve = probe_layers(encoder, settings, numbers)
        if is_first_rank():
            print(f"\n{curve.text()}")
            write_table(curve, options.output)
            print(draw_layers(curve, numbers, figure))


def run_knn(options: argparse.Namespace) -> None:
    settings = probe_settings(options)
    check_new(options.output)
    from sslvit.checkpoint import load_encoder
    from sslvit.ranks import all_ranks

    with all_ranks():
        encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
        show_probe(encoder, settings, options.output)


def probe_settings(options: argparse.Namespace):
    """What `probe` and `knn` have in common, and what only one of them knows."""
    from sslvit.settings import ProbeSettings
    from sslvit.settings.load import read_protocol

    common = ("train", "val", "layer", "blocks", "pooling", "neighbours", "batch", "workers", "seeds", "seed", "device")
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
    print(f"\nRight answers in percent on {about['val_images']:,} images of {about['val']}")
    print(f"(heads fitted on {about['train_images']:,} of {about['train']})")
    of_encoder = about["probed"]["encoder"]
    if about["protocol"]:
        print(f"linear probe: {about['protocol']} ({about['source']})")
        print("  " + "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in of_encoder["linear"].items()))
    print(f"few labels and kNN: {of_encoder['features']}; temperature {about['temperature']}; seed {about['seed']}")
    print(f"\n{table.text()}")
    write_table(table, output)


def write_table(table, output: str | None) -> None:
    if output:
        Path(output).write_text(json.dumps(table.as_dict(), indent=1) + "\n")


def run_health(options: argparse.Namespace) -> None:
    if options.images < 2:
        raise ValueError(f"--images {options.images}: how images differ takes 2 or more.")
    check_new(options.output)
    from sslvit.checkpoint import load_encoder
    from sslvit.data.open import open_shards
    from sslvit.environment import pick_device
    from sslvit.evaluate.label_free import measure_health
    from sslvit.evaluate.scores import format_table

    encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
    index = open_shards(options.data, f"{options.data.rstrip('/')}-shards")
    rows = measure_health(
        encoder.to(pick_device(options.device)), index, options.images, options.layer, options.pooling, options.batch,
        options.workers, options.seed,
    )  # fmt: skip
    print(f"\nwithout labels, on {min(options.images, len(index)):,} images of {index.location}\n")
    print(format_table({row: {name: [value] for name, value in of.items()} for row, of in rows.items()}, 3))
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=1) + "\n")


def run_segment(options: argparse.Namespace) -> None:
    check_new(options.output)
    check_new_picture(options.figure)
    from sslvit.checkpoint import load_encoder
    from sslvit.evaluate.dense import MaskedImages, segment
    from sslvit.evaluate.probe import untrained
    from sslvit.figures import image_rows
    from sslvit.report.show import mask_colours

    train, val = (MaskedImages.open(folder) for folder in (options.train, options.val))
    encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
    rows = {"encoder": encoder}
    if not options.no_baselines:
        rows = {"raw pixels": None, "untrained encoder": untrained(encoder, options.seed), **rows}
    table = segment(rows, train, val, options.batch, seed=options.seed, device=options.device)
    print(f"\nPercent on {len(val):,} images of {val.folder} (maps fitted on {len(train):,} of {train.folder});")
    print(f"images and masks at {encoder.settings.image_size}, {table.about['strength']}\n\n{table.text()}")
    if options.output:
        content = {"rows": table.draws, "about": table.about}
        Path(options.output).write_text(json.dumps(content, indent=1) + "\n")
    if options.figure:
        pairs = [val.read(number, encoder.settings) for number in range(len(table.guesses["encoder"]))]
        masks = np_stack([mask for _, mask in pairs])
        classes = table.about["classes"]
        drawn = [np_stack([image.numpy() / 255 for image, _ in pairs]), mask_colours(masks, classes)]
        drawn += [mask_colours(guess, classes) for guess in table.guesses.values()]
        print(image_rows(options.figure, drawn, ["image", "mask", *table.guesses]))


def np_stack(arrays: list):
    import numpy as np

    return np.stack(arrays)


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
    from sslvit.checkpoint import load_encoder
    from sslvit.report import show

    encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
    images = show.first_images(encoder.settings, options.data, options.images)
    if options.what == "attention":
        print(show.draw_attention(encoder, images, out))
    elif options.what == "field":
        print(show.draw_field(encoder, images, out))
    else:
        path, numbers = show.draw_distance(encoder, images, out)
        numbers_file.write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"{path}\n{numbers_file}")


def run_bench(options: argparse.Namespace) -> None:
    from sslvit.report.bench import bench
    from sslvit.settings.bench import load_bench

    given = {key: getattr(options, key) for key in ("out", "device")}
    bench(load_bench(options.config, {key: value for key, value in given.items() if value is not None}))


def check_new(path: str | Path | None) -> None:
    """Refuse, before any work, a file that could not be written or would replace another."""
    if path is None:
        return
    if Path(path).exists():
        raise ValueError(f"{path}: already exists. Choose another file.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist. Make it first.")
    if not os.access(Path(path).parent, os.W_OK):
        raise ValueError(f"{path}: its folder cannot be written to. Choose another.")


def check_new_picture(path: str | Path | None) -> None:
    """check_new for a picture."""
    if path is not None and Path(path).suffix != ".png":
        raise ValueError(f"{path}: a picture is written as PNG. Choose a name that ends in .png.")
    check_new(path)


def run_sample(options: argparse.Namespace) -> None:
    from sslvit.settings.sample import SampleSettings

    settings = SampleSettings(options.temperature, options.top_k, options.top_p, options.seed, options.batch)
    for key in ("count", "draws"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"--{key} {value}: must be 1 or more.")
    out = options.output
    if out is None:
        if not Path(options.run).exists():
            raise FileNotFoundError(f"{options.run}: no such file or folder. Give the folder of an iGPT run.")
        if not Path(options.run).is_dir():
            raise ValueError(f"{options.run}: not a run folder, so say where the picture goes: -o FILE.png")
        out = Path(options.run) / "figures" / ("completions.png" if options.complete else "samples.png")
    if Path(out).parent.is_dir() or options.output:
        check_new_picture(out)
    if not options.complete and (options.draws, options.given) != (None, None):
        raise ValueError("--draws and --given are for --complete IMAGES.")
    from sslvit.report.samples import draw_completions, draw_samples

    task = load_task(options)
    if options.complete:
        count, draws = options.count or 8, options.draws or 3
        given = 0.5 if options.given is None else options.given
        draw_completions(task, options.complete, out, count, given, draws, settings)
    else:
        draw_samples(task, out, options.count or 16, settings)
    print(out)


def run_likelihood(options: argparse.Namespace) -> None:
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.evaluate.likelihood import likelihood
    from sslvit.evaluate.scores import format_table

    task = load_task(options)
    train, val = (open_shards(source, f"{source.rstrip('/')}-shards") for source in (options.train, options.val))
    rows = likelihood(task, train, val, options.batch)
    print(f"\n{len(val):,} images of {val.location}; counted on {len(train):,} of {train.location}\n")
    print(format_table({row: {column: [value] for column, value in of.items()} for row, of in rows.items()}, 4))
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=1) + "\n")


def load_task(options: argparse.Namespace):
    """An iGPT with its output matrix, on the device asked for."""
    from sslvit.environment import pick_device
    from sslvit.tasks.igpt import load_igpt

    return load_igpt(options.run, options.heads, **unsaid(options)).to(pick_device(options.device))


def run_export(options: argparse.Namespace) -> None:
    from sslvit.export import export_encoder

    verdict = export_encoder(options.encoder, options.out, options.format, options.overwrite)
    print(
        f"{options.out}: reopened in {options.format} and compared; largest difference "
        f"{verdict['largest_difference']:.1e} (allowed {verdict['tolerance']:.0e})"
    )


def run_import(options: argparse.Namespace) -> None:
    from sslvit.checkpoint import load_encoder, save_encoder

    if Path(options.out).exists():
        raise ValueError(f"{options.out}: already exists. Choose another folder.")
    encoder = load_encoder(options.checkpoint, options.layout, options.heads, **unsaid(options))
    save_encoder(encoder, options.out, {"imported_from": Path(options.checkpoint).name})
    print(f"encoder in {options.out}")
