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
from sslvit.train.prepare import launched
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
        config: YAML file, or the name of a recipe such as mae/vit_tiny_cifar10.
        data: Folder of images or of shards; replaces the recipe's data.shards.
        out: Run folder; replaces the recipe's.
        init: Encoder whose weights are the initialization.
        resume: Resume from the run folder's last checkpoint.
        overwrite: Delete an earlier run there first.
        changes: Other settings by dotted key, ``**{"train.epochs": 10}``, or by section, ``optim={"base_lr": 1e-3}``;
            they are merged with the recipe's, and later ones win.
    """
    for key in ("data.shards", "data.mixture"):
        if data is not None and key in changes:
            raise ValueError(f"--data and --{key} exclude each other: give one of them.")
    given = {"data.shards": data, "out": out, "init": init}
    changes |= {key: str(value) for key, value in given.items() if value is not None}
    settings = load_recipe(config, changes)
    if isinstance(settings.task, SupervisedSettings):
        raise ValueError(
            f"--config {config}: trains with labels. Use: sslvit finetune ENCODER --train SHARDS --val SHARDS "
            f"--out RUN --config {config} (--scratch for one without pretraining)."
        )
    return run_settings(settings, resume=resume, overwrite=overwrite)


def resume(run: str | Path, **changes: Any) -> RunFolder:
    """Resume a run that has stopped, with its own config.yaml.

    Args:
        run: Run folder, which may have moved.
        changes: Settings that change, as in `pretrain`. They are printed; those that would make it another run are
            refused.

    Raises:
        ValueError: Not a run folder, or a change that a run cannot take.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml). Give the folder that --out named.")
    for key in ("out", "init"):
        if key in changes:
            raise ValueError(f"--{key}: a run that goes on keeps its folder and its start. Leave it out.")
    folder.read_config()  # says in one line if it is damaged
    processes = {"train.devices": None, "train.nodes": None} if launched() else {}  # then they are those of now
    return run_settings(load_recipe(folder.config, {"out": str(run)} | processes | changes), resume=True)


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
    """Fine-tune an encoder with labels, and score it on others.

    Args:
        encoder: Run folder, encoder folder or checkpoint file.
        train: Labeled shards, or a folder of class folders.
        val: Data of the same kind that is scored.
        config: YAML file, or the name of a recipe; its encoder settings change the encoder's.
        out: Run folder; replaces the recipe's.
        scratch: Start from random weights instead: the baseline.
        resume: Resume from the run folder's last checkpoint.
        overwrite: Delete an earlier run there first.
        changes: Other settings, as in `pretrain`.

    Raises:
        ValueError: A recipe for something else, or data without labels.
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
