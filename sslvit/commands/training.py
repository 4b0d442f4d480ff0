"""Training: the demo, pretraining, fine-tuning, and what a recipe may say."""

from __future__ import annotations

import argparse
import json


def run_demo(options: argparse.Namespace) -> None:
    from sslvit.report.demo import demo

    demo(options.data, options.archive, options.out, options.overwrite, options.seed, options.changes)


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


def run_replay(options: argparse.Namespace) -> None:
    from sslvit.train.replay import replay

    print("\n".join(replay(options.incident)))


def run_settings(options: argparse.Namespace) -> None:
    from sslvit.settings.load import describe_settings

    print(describe_settings())
