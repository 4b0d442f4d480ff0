"""Training and exporting from Python, with the same names and paths as on the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from sslvit import __version__
from sslvit.checkpoint import load_encoder
from sslvit.data.python_data import DataLike, name_of, takes_datasets
from sslvit.data.transform import named_function
from sslvit.exporters import Export, export_encoder, hub
from sslvit.files import expand_path, printable
from sslvit.layouts import backbones
from sslvit.messages import for_python
from sslvit.models.networks import BackboneLike, given_backbone
from sslvit.settings import EncoderSettings, RunSettings, SupervisedSettings
from sslvit.settings.encoder import OWN
from sslvit.settings.load import leaves, load_recipe, merge_recipe
from sslvit.train.backbones import refuse_transformer_keys
from sslvit.train.folder import RunFolder
from sslvit.train.hardware import launched
from sslvit.train.prepare import pretraining_settings
from sslvit.train.run import pretrain as run_settings


@for_python
@takes_datasets("data", "online.train", "online.val")
def pretrain(
    config: str | Path,
    data: DataLike | None = None,
    out: str | Path | None = None,
    init: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
    transform: Callable[[Any], Any] | None = None,
    backbone: BackboneLike | None = None,
    **changes: Any,
) -> RunFolder:
    """Pretrain an encoder with a recipe.

    Args:
        config: YAML file, or the name of a recipe such as mae/vit_tiny_cifar10.
        data: Folder of images or shards, several .tar files, or a data set that supports data[i] and len(data), such
            as a torch or Hugging Face data set or an array. It replaces the recipe's data.shards.
        out: Run folder; replaces the recipe's.
        init: Encoder whose weights initialize the run; mae/continue and dino/continue also use its architecture.
        resume: Resume from the run folder's last checkpoint.
        overwrite: Delete an earlier run in the folder first.
        callbacks: Lightning callbacks. They run after sslvit's own callbacks and before a checkpoint is written.
        loggers: Lightning loggers, in addition to those in the settings.
        transform: Function from a PIL image to its view or views: one or several tensors 'c h w', either uint8 or
            floats in [0, 1]. None for data.view.
        backbone: Your own module instead of the vision transformer (DINO only), or a function that makes one. It maps
            images 'b c h w', normalized by encoder.mean and encoder.std, to vectors 'b d'.
        changes: Other settings by dotted key, ``**{"train.epochs": 10}``, or by section, ``optim={"base_lr": 1e-3}``.
            They are merged into the recipe, and later ones win.

    Returns:
        The run folder: its paths, metrics, scores and health.

    Raises:
        FileNotFoundError: The recipe or the data does not exist.
        ValueError: The settings are invalid, or the folder is in use.

    Example:
        run = sslvit.pretrain("mae/vit_tiny_cifar10", data="photos", out="runs/photos", **{"train.epochs": 10})
        encoder = sslvit.load_encoder(run)
    """
    with named_function(transform) as view, given_backbone(backbone):
        changes |= view | own_key(backbone, changes)
        settings = pretraining_settings(config, changes, name_of(data), out, init)
        return run_settings(settings, resume, overwrite, callbacks, loggers)


@for_python
@takes_datasets("data", "val", "online.train", "online.val")
def resume(
    run: str | os.PathLike[str],
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
    data: DataLike | None = None,
    val: DataLike | None = None,
    transform: Callable[[Any], Any] | None = None,
    backbone: BackboneLike | None = None,
    **changes: Any,
) -> RunFolder:
    """Resume a stopped run from its own config.yaml.

    Args:
        run: Run folder, which may have moved.
        callbacks: Lightning callbacks, as in `pretrain`.
        loggers: Lightning loggers, as in `pretrain`.
        data: The data set object that the run was started with (`train` when fine-tuning), or the new location of
            data that has moved.
        val: The same for the validation data when fine-tuning.
        transform: The function that the run was started with.
        backbone: Your own module that the run trains; its weights are loaded from the checkpoint.
        changes: Changed settings, as in `pretrain`. They are printed; a change that would make it a different run is
            refused.

    Returns:
        The run folder.

    Raises:
        ValueError: Not a run folder, or a change that a resumed run does not allow.

    Example:
        run = sslvit.resume("runs/photos", **{"train.epochs": 20})
        print(run)
    """
    folder = RunFolder(expand_path(run))
    if not folder.config.is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml). Give what was given as --out.")
    for key in ("out", "init"):
        if key in changes:
            raise ValueError(f"--{key}: a run that goes on keeps its folder and its start. Leave it out.")
    with named_function(transform) as view, given_backbone(backbone):
        for key in ("data.shards", "data.mixture"):
            if data is not None and key in changes:
                raise ValueError(f"--data and --{key} exclude each other: give one of them.")
        again = {"data.shards": name_of(data), "task.val": name_of(val), **view}
        changes |= {key: name for key, name in again.items() if name is not None}
        before = folder.given_from_python()
        if missing := [key for key in before if key not in changes]:
            raise ValueError(
                f"{printable(folder.path)}: was given {before[missing[0]]}, which no file holds. Resume it from Python "
                f"with the same: {folder.resume_call(before)}"
            )
        processes = {"train.devices": None, "train.nodes": None} if launched() else {}  # the launcher decides
        settings = load_recipe(folder.config, {"out": str(folder.path)} | processes | changes)
        return run_settings(settings, resume=True, callbacks=callbacks, loggers=loggers)


@for_python
@takes_datasets("train", "val", labels="needed")
def finetune(
    encoder: str | os.PathLike[str] | None,
    train: DataLike,
    val: DataLike,
    config: str | Path = "finetune/small_images",
    out: str | Path | None = None,
    scratch: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
    backbone: BackboneLike | None = None,
    **changes: Any,
) -> RunFolder:
    """Fine-tune an encoder with labels, and score it on validation data.

    Args:
        encoder: Run folder, encoder folder, checkpoint file, or the name of a network such as torchvision:resnet18,
            which starts from random weights unless the name includes pretrained ones. None for the recipe's own
            encoder from random weights.
        train: Labeled shards, a folder of class folders, or a data set with labels, as in `pretrain`.
        val: Validation data of the same kind.
        config: YAML file, or the name of a recipe; its encoder settings override the encoder's.
        out: Run folder; replaces the recipe's.
        scratch: Start from random weights instead, as a baseline.
        resume: Resume from the run folder's last checkpoint.
        overwrite: Delete an earlier run in the folder first.
        callbacks: Lightning callbacks, as in `pretrain`.
        loggers: Lightning loggers, as in `pretrain`.
        backbone: Your own module to train, as in `pretrain`.
        changes: Other settings, as in `pretrain`.

    Returns:
        The run folder, with the scores.

    Raises:
        ValueError: The recipe is not for fine-tuning, or the data has no labels.

    Example:
        run = sslvit.finetune("runs/photos", "shards/train", "shards/val", out="runs/finetuned")
        print(run.to_dict()["scores"]["top1"])
    """
    name = None if encoder is None else _path_of(encoder)
    changes |= own_key(backbone, changes)
    with given_backbone(backbone):
        start = None if name is None else for_labels(load_encoder(name).settings)
    if start is None:
        check_described(config, changes)
    task = load_recipe(config, base=start).task
    if not isinstance(task, SupervisedSettings):
        raise ValueError(f"--config {config}: trains {task.name}, not with labels. Use finetune/small_images.")
    for key, instead in (("init", "ENCODER"), ("data", "--train"), ("data.shards", "--train"), ("task.val", "--val")):
        if key in changes:
            raise ValueError(f"--{key}: fine-tuning takes {instead} for that.")
    is_random = scratch or name is None or (backbones.is_name(name) and not backbones.has_weights(name))
    given = {
        "data.shards": name_of(train), "task.val": name_of(val), "out": out, "init": None if is_random else name
    }  # fmt: skip
    changes |= {key: os.fspath(value) for key, value in given.items() if value is not None}
    if is_random:
        changes["init"] = None  # overrides the recipe's
    settings = load_recipe(config, changes, start)
    if settings.encoder.backbone is not None:
        refuse_transformer_keys(settings.encoder, changes)
    with given_backbone(backbone):
        return run_settings(settings, resume, overwrite, callbacks, loggers)


def own_key(backbone: BackboneLike | None, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the setting that marks the encoder as a module passed from Python.

    Raises:
        ValueError: The changes name another network.
    """
    if backbone is None:
        return {}
    named = dict(leaves(RunSettings, changes)).get("encoder.backbone", OWN)
    if named != OWN:
        raise ValueError(f"backbone: and encoder.backbone {named} exclude each other: give one of them.")
    return {"encoder.backbone": OWN}


def check_described(config: str | Path, changes: dict[str, Any]) -> None:
    """Raise ValueError if neither the recipe nor the changes describe the encoder to train from random weights."""
    found = merge_recipe(config, changes).get("encoder", {})
    if not {"width", "depth", "backbone"} & found.keys():
        raise ValueError(
            f"none: says to train the encoder that --config '{config}' describes, and it describes none. Give "
            "--encoder.preset with --encoder.image_size and --encoder.patch, or a network such as torchvision:resnet18 "
            "in the place of none."
        )


def for_labels(settings: EncoderSettings) -> EncoderSettings:
    """Encoder settings as fine-tuning recipes start from them: features after the last block and the final norm."""
    return replace(settings, feature_layer=None, feature_norm="final")


def _path_of(encoder: str | os.PathLike[str]) -> str:
    """An encoder's path or name.

    Raises:
        ValueError: It is the encoder itself, whose origin and decoder or classifier are unknown.
    """
    if not isinstance(encoder, (str, os.PathLike)):
        raise ValueError(
            f"encoder: {type(encoder).__name__} is a network, and this takes a path or a name. Give its run, or "
            "save it first: sslvit.save_encoder(encoder, FOLDER)."
        )
    return expand_path(encoder)


@for_python
def export(
    encoder: str | os.PathLike[str],
    out: str | Path,
    format: str,
    *,
    outputs: str = "features",
    size: str | None = None,
    scores: str | Path | Sequence[str | Path] = (),
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Export:
    """Export an encoder for another library, and verify that its outputs match there.

    Args:
        encoder: Anything that `load_encoder` accepts.
        out: Folder for the export.
        format: timm, transformers, onnx, torch, safetensors, or the name of a plugin's format.
        outputs: tokens (the encoder alone), features (pooled), logits (a fine-tuned run's classifier) or reconstruction
            (an MAE run with its decoder, for transformers).
        size: fixed (images of one size) or dynamic (any size that the patch size divides); None for the format's
            default.
        scores: File with scores for the model card, or several.
        license: License on the model card, by its identifier on the Hugging Face hub, such as "apache-2.0".
        push: ORG/NAME of a model on the hub, to which the export is committed. The model is created if it does not
            exist.
        private: Create a new model on the hub as private.
        overwrite: Replace an earlier export in the folder and, with `push`, files of the same names on the hub.
        overrides: Settings that a released file does not include, as in `load_encoder`: layout, heads, weights,
            image_size, palette.

    Returns:
        The folder, and the largest difference between its outputs and the encoder's.

    Raises:
        ValueError: The folder is in use, the format is unknown or cannot represent the encoder, or the hub refuses it.
        RuntimeError: The exported model gives different outputs.

    Example:
        made = sslvit.export("runs/photos", "exports/photos", "timm")
        print(made.verdict["largest_difference"])
    """
    if private and push is None:
        raise ValueError("--private: is of a model on the hub. Name it with --push.")
    if push is not None:
        hub.check(push, overwrite)
    out = expand_path(out)
    scores = [scores] if isinstance(scores, (str, Path)) else scores
    verdict = export_encoder(
        _path_of(encoder), out, format, outputs=outputs, size=size, scores=scores, license=license,
        overwrite=overwrite, **overrides,
    )  # fmt: skip
    made = Export(Path(out), verdict)
    if push is not None:
        message = f"sslvit {__version__}: {outputs} for {format}"
        made.pushed = hub.push(made.path, verdict["files"], push, private, message)
    return made
