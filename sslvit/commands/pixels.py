"""Models of pixels: sampling and likelihood."""

from __future__ import annotations

import argparse
from pathlib import Path

from sslvit.commands.files import check_new, check_new_picture, unsaid, write_json


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
    from sslvit.report.samples import plot_completions, plot_samples

    task = load_task(options)
    if options.complete:
        count, draws = options.count or 8, options.draws or 3
        given = 0.5 if options.given is None else options.given
        plot_completions(task, options.complete, out, count, given, draws, settings)
    else:
        plot_samples(task, out, options.count or 16, settings)
    print(out)


def run_likelihood(options: argparse.Namespace) -> None:
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.evaluate.likelihood import likelihood
    from sslvit.evaluate.scores import format_table
    from sslvit.evaluate.sources import LabeledSet

    task = load_task(options)
    settings, limit = task.encoder.settings, options.max_unreadable_fraction
    train, val = (
        LabeledSet(open_shards(source), settings.channels, None, limit) for source in (options.train, options.val)
    )
    rows = likelihood(task, train, val, options.batch)
    print(f"\n{val.count_text} of {val.index.location}; counted on {train.count_text} of {train.index.location}")
    print(f"each image: {settings.crop_in_words}\n")
    print(format_table({row: {column: [value] for column, value in of.items()} for row, of in rows.items()}, 4))
    write_json(options.output, rows)


def load_task(options: argparse.Namespace):
    """An iGPT with its output matrix, on the device asked for."""
    from sslvit.environment import pick_device
    from sslvit.tasks.igpt import load_igpt

    return load_igpt(options.run, options.heads, **unsaid(options)).to(pick_device(options.device))
