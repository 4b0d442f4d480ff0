"""Settings that a resumed run keeps from its start, and settings that it refuses to change."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sslvit.compatibility import check_same, settings_from
from sslvit.data.module import ShardDataModule
from sslvit.settings import RunSettings
from sslvit.settings.load import brief, by_dotted_key
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.tasks.base import Task
from sslvit.tasks.start import changes_in_words
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)

# settings that a resumed run must keep: (key, tasks for which it is fixed or None for all, why); the shapes of its
# weights and the identity of its data are compared with the checkpoint
FIXED = [
    ("task.name", None, "the checkpoint holds the weights of one task"),
    ("seed", None, "masks, crops and the order of the data follow from it"),
    ("data.global_batch_size", None, "the order of the data and the learning rate follow from it"),
    ("data.limit", None, "the images were drawn with it"),
    ("data.limit_per_class", None, "the images were drawn with it"),
    ("optim.name", None, "the optimizer's state in the checkpoint is of the other"),
    ("optim.betas", None, "the optimizer's averages in the checkpoint were made with it"),
    ("encoder.backbone", None, "the checkpoint holds the weights of one network"),
    ("encoder.pos_embed", None, "the checkpoint holds the table"),
    ("encoder.key_bias", None, "the weights were trained with it"),
    ("encoder.init", None, "the weights have started already"),
    ("encoder.color_init", None, "the weights have started already"),
    ("encoder.mean", None, "the weights were trained on images normalized by it"),
    ("encoder.std", None, "the weights were trained on images normalized by it"),
    ("encoder.pooling", ("dino", "supervised"), "the head was trained on what it gives"),
    ("optim.layer_decay", None, "the checkpoint's parameter groups hold each layer's rate"),
    ("task.decoder_heads", ("mae",), "it cuts the decoder's weights into heads"),
    ("task.target", ("mae",), "the decoder was trained for the other"),
    ("task.hog_weight", ("mae",), "the decoder was trained with the other"),
    ("task.objective", ("igpt",), "the head was trained for the other"),
]


# sections that are felt in a step only
OF_STEPS = ("optim.", "task.", "data.view.")


def keep_resolved(settings: RunSettings, earlier: RunFolder) -> RunSettings:
    """The settings of a resumed run, with the batch size and the length that were chosen for it before."""
    before = by_dotted_key(earlier.read_config())
    batch, epochs = before.get("data.global_batch_size"), before.get("train.epochs")
    if settings.data.global_batch_size is None and batch is not None:
        settings = replace(settings, data=replace(settings.data, global_batch_size=batch))
    budget, steps = settings.train.budget, before.get("train.steps")
    if budget is not None and settings.train.steps is None:
        if budget != before.get("train.budget"):
            raise ValueError(
                f"resume: train.budget {budget}: the schedules of this run go over {brief(steps)} steps. Leave the "
                "budget out, or give another length with --train.steps."
            )
        settings = replace(settings, train=replace(settings.train, steps=steps))
    if settings.train.epochs is None and epochs is not None:
        settings = replace(settings, train=replace(settings.train, epochs=epochs))
    return settings


def keep_start(settings: RunSettings, earlier: RunFolder) -> RunSettings:
    """The settings of a resumed run, with the encoder that it was initialized from.

    Raises:
        ValueError: another encoder is given.
    """
    before = earlier.read_config().get("init")
    if settings.init and (not before or os.path.realpath(settings.init) != os.path.realpath(before)):
        raise ValueError(
            f"resume: this run started from {before or 'random weights'}, and goes on from its checkpoint, not from "
            f"{settings.init}. Leave that out, or choose another --out for a new run."
        )
    return replace(settings, init=before)


def check_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse settings that a resumed run cannot change.

    Args:
        old: Settings of the run so far, by dotted key.
        new: Settings that it would be resumed with.

    Raises:
        ValueError: such settings have changed; the message names them all, each with its reason.
    """
    refused = [
        f"{key} was {brief(old[key])} and cannot become {brief(new[key])}, since {reason}"
        for key, tasks, reason in FIXED
        if key in new and key in old and old[key] != new[key] and (tasks is None or new["task.name"] in tasks)
    ]
    if refused:
        raise ValueError(
            f"resume: {'; '.join(refused)}. Restore {'it' if len(refused) == 1 else 'them'}, or start a new run from "
            "this one's encoder with --init."
        )
    steps, epochs = new["train.steps"], new["train.epochs"]
    if steps is not None and old.get("train.steps") == steps and old.get("train.epochs") != epochs:
        raise ValueError(
            f"resume: train.epochs {brief(epochs)} would change nothing, since train.steps ({steps}) decides. Give "
            "--train.steps."
        )


def check_resumed(
    folder: RunFolder, checkpoint: Path, settings: RunSettings, data: ShardDataModule, task: Task
) -> None:
    """Check that a resumed run trains the same encoder on the same data in the same order; log other changes."""
    content = read_checkpoint(checkpoint, mmap=True, map_location="meta")  # shapes without values
    try:
        trained, position = content["sslvit"]["encoder"], content[ShardDataModule.__qualname__]
        shapes = {key: value.shape for key, value in content["state_dict"].items()}
        moved = [len(group["params"]) for group in content["optimizer_states"][0]["param_groups"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"resume: {folder.path} is not a run of sslvit that can go on ({error}).") from error
    old, new = by_dotted_key(folder.read_config()), by_dotted_key(asdict(settings))
    check_changes(old, new)
    check_same(settings_from(trained, checkpoint), settings.encoder, str(checkpoint))
    data.load_state_dict(position)
    if data.start_step > data.run.total_steps:
        raise ValueError(f"resume: {folder.path} is at step {data.start_step} already, past {data.run.total_steps}.")
    changed = changes_in_words(old, new)
    same_length = all(old.get(key) == new[key] for key in ("train.steps", "train.epochs"))
    if data.start_step == data.run.total_steps and same_length:
        refused = [change for change in changed if change.startswith(OF_STEPS) and not change.startswith("task.val ")]
        if refused:
            raise ValueError(
                f"resume: {'; '.join(refused)} would change nothing, since all {data.start_step:,} steps are done. "
                "Give it more with --train.steps, or leave that out."
            )
    same_shapes = shapes == {key: value.shape for key, value in task.state_dict().items()}
    if not same_shapes or moved != [len(group["params"]) for group in task.parameter_groups()]:
        guilty = [change for change in changed if change.startswith("task.")] or changed or ["another task"]
        raise ValueError(
            f"resume: the weights in {checkpoint} do not fit these settings ({'; '.join(guilty)}). "
            "Restore them, or start a new run from its encoder with --init."
        )
    if changed:
        logger.info(f"resuming with changes: {'; '.join(changed)}")
