"""Training: the demo, pretraining, fine-tuning, and what a recipe may say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sslvit.commands.files import check_new_picture, one_source


def run_demo(options: argparse.Namespace) -> None:
    from sslvit.report.demo import demo

    demo(options.data, options.archive, options.out, options.overwrite, options.seed, options.changes)


def run_pretrain(options: argparse.Namespace) -> None:
    from sslvit.api import pretrain

    pretrain(
        options.config, one_source(options.data), options.out, options.init, options.resume, options.overwrite,
        **options.changes,
    )  # fmt: skip


def run_finetune(options: argparse.Namespace) -> None:
    from sslvit.api import finetune

    if "encoder" in options.changes:
        raise ValueError("--encoder: ENCODER is what is trained on; its settings are --encoder.KEY value.")
    folder = finetune(
        options.encoder, options.train, options.val, options.config, options.out, options.scratch, options.resume,
        options.overwrite, **options.changes,
    )  # fmt: skip
    show_scores(folder)


def run_resume(options: argparse.Namespace) -> None:
    from sslvit.api import resume

    folder = resume(options.run, **options.changes)
    if folder.scores.exists():
        show_scores(folder)


def wants_requeue(options: argparse.Namespace) -> bool:
    """Whether a training command that was stopped before it read its settings is to be put into the queue again."""
    from sslvit.settings.load import load_recipe

    if options.function not in (run_pretrain, run_finetune, run_resume):
        return False
    config = Path(options.run) / "config.yaml" if options.function is run_resume else options.config
    try:
        return load_recipe(config, options.changes).train.requeue
    except (ValueError, OSError):
        return bool(options.changes.get("train.requeue", True))


def show_scores(folder) -> None:
    found = json.loads(folder.scores.read_text())
    among = "" if found["top5"] is None else f", {found['top5']:.1f} % among five"
    print(
        f"{found['top1']:.1f} % right{among} of {found['images']:,} images of {found['val']}, after the last step; "
        f"more in {folder.scores}"
    )


def run_plan(options: argparse.Namespace) -> None:
    check_new_picture(options.figure)
    if options.images is not None and options.data is not None:
        raise ValueError("--images and --data: give one, a number of images or the images.")
    if not 0 < options.utilization <= 1:
        raise ValueError(f"--utilization {options.utilization:g}: must be above 0 and at most 1.")
    if options.tflops is not None and not options.tflops > 0:
        raise ValueError(f"--tflops {options.tflops:g}: must be above zero.")
    from sslvit.data.open import open_shards
    from sslvit.settings.load import load_recipe
    from sslvit.train.forecast import PEAKS, forecast, plot_schedules

    settings = load_recipe(options.config, options.changes)
    data = one_source(options.data) or settings.data.shards
    images, classes = options.images, options.classes
    if images is None:
        if data is None:
            raise ValueError("--images N or --data SHARDS: how many images are there?")
        index = open_shards(str(data))
        images, classes = len(index), len(index.classes) if index.classes else None
    found, task = forecast(settings, images, classes)
    print(found.text())
    if found.run.global_batch_size != settings.data.global_batch_size:
        print(f"             instead of the recipe's {settings.data.global_batch_size:,} images, more than there are")
    for name, tflops in ({"given": options.tflops} if options.tflops else PEAKS).items():
        hours = found.hours(tflops, options.utilization)
        print(
            f"hours        {hours:,.1f} on {found.run.ranks} x {name} "
            f"({tflops:g} TFLOP/s, {options.utilization:.0%} used)"
        )
    if options.figure:
        print(plot_schedules(task, Path(options.figure)))


def run_replay(options: argparse.Namespace) -> None:
    from sslvit.train.replay import replay

    print("\n".join(replay(options.incident)))


def run_settings(options: argparse.Namespace) -> None:
    import shutil

    from sslvit.settings.load import describe_settings, recipe_names, recipes_folder

    if not options.recipes:
        print(describe_settings(width=min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)))
        return
    for name in recipe_names():
        first = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<28} {first.removeprefix('# ')}")
