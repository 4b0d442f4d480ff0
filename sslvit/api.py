"""The Python doors that take names and paths instead of settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sslvit.checkpoint import load_encoder
from sslvit.files import expand_path
from sslvit.settings import EncoderSettings, SupervisedSettings
from sslvit.settings.load import load_recipe
from sslvit.train.folder import RunFolder
from sslvit.train.run import pretrain as run_settings


def pretrain(
    config: str | Path,
    data: str | Path | None = None,
    out: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **changes: Any,
) -> RunFolder:
    """Pretrain by a recipe.

    Args:
        config: a YAML file, or the name of a recipe such as mae/vit_tiny_cifar10.
        data: a folder of images or of shards; replaces the recipe's data.shards.
        out: the run folder; replaces the recipe's.
        init: an encoder to start from.
        resume: go on from the run folder's last checkpoint.
        overwrite: delete an earlier run there first.
        changes: other settings by dotted key: ``**{"train.epochs": 10}``.
    """
    for key in ("data.shards", "data.mixture"):
        if data is not None and key in changes:
            raise ValueError(f"--data and --{key} exclude each other: give one of them.")
    given = {"data.shards": data, "out": out, "init": init}
    changes |= {key: str(value) for key, value in given.items() if value is not None}
    return run_settings(load_recipe(config, changes), resume=resume, overwrite=overwrite)


def resume(run: str | Path, **changes: Any) -> RunFolder:
    """Go on with a run that has stopped, by its own config.yaml.

    Args:
        run: its folder, which may have moved.
        changes: settings that become others by dotted key: ``**{"train.steps": 1000}``. They are printed; what would
            make another run of it is refused.

    Raises:
        ValueError: not a run folder, or a change that a run cannot take.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml). Give the folder that --out named.")
    for key in ("out", "init"):
        if key in changes:
            raise ValueError(f"--{key}: a run that goes on keeps its folder and its start. Leave it out.")
    folder.read_config()  # says in one line if it is damaged
    return run_settings(load_recipe(folder.config, {"out": str(run)} | changes), resume=True)


def finetune(
    encoder: str | Path,
    train: str | Path,
    val: str | Path,
    config: str | Path = "finetune/small_images",
    out: str | Path | None = None,
    scratch: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    **changes: Any,
) -> RunFolder:
    """Train an encoder on with labels, and score it on others.

    Args:
        encoder: anything that holds one.
        train: labeled shards, or a folder of class folders.
        val: the same, to report on.
        config: a YAML file, or the name of a recipe; its encoder settings change the encoder's.
        out: the run folder; replaces the recipe's.
        scratch: start from random weights instead: the baseline.
        resume: go on from the run folder's last checkpoint.
        overwrite: delete an earlier run there first.
        changes: other settings by dotted key: ``**{"train.epochs": 10}``.

    Raises:
        ValueError: a recipe for something else, or data without labels.
    """
    encoder = expand_path(encoder)
    start = for_labels(load_encoder(encoder).settings)
    task = load_recipe(config, base=start).task
    if not isinstance(task, SupervisedSettings):
        raise ValueError(f"--config {config}: trains {task.name}, not with labels. Use finetune/small_images.")
    for key, instead in (("init", "ENCODER"), ("data", "--train"), ("data.shards", "--train"), ("task.val", "--val")):
        if key in changes:
            raise ValueError(f"--{key}: fine-tuning takes {instead} for that.")
    given = {"data.shards": train, "task.val": val, "out": out, "init": None if scratch else encoder}
    changes |= {key: str(value) for key, value in given.items() if value is not None}
    return run_settings(load_recipe(config, changes, start), resume=resume, overwrite=overwrite)


def for_labels(settings: EncoderSettings) -> EncoderSettings:
    """The settings that a recipe of fine-tuning changes: the encoder's, read out behind its last block."""
    return replace(settings, feature_layer=None, feature_norm="final")
