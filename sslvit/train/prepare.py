"""Decisions and checks before the first step of a run."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sslvit.checkpoint import load_encoder
from sslvit.data.folders import check_labeled
from sslvit.data.mixture import Index, Plan
from sslvit.data.open import check_channels, check_present
from sslvit.data.overlap import check_same_source
from sslvit.data.stream import StreamIndex
from sslvit.data.transform import first_call, function_of, in_words
from sslvit.files import counted, expand_path
from sslvit.run_plan import RunPlan
from sslvit.settings import VIEW_SETTINGS, RunSettings, SupervisedSettings
from sslvit.settings.load import brief, by_dotted_key, load_recipe, merge_recipe, recipe_names, takes_init
from sslvit.settings.views import AugmentSettings, MultiCropSettings, TransformSettings
from sslvit.tasks import task_class
from sslvit.train.backbones import check_backbone, refuse_transformer_keys
from sslvit.train.folder import RunFolder
from sslvit.train.loggers import check_loggers

logger = logging.getLogger(__name__)

SHRINKS, GROWS = 10, 7  # factors by which images' shorter side must shrink or grow for a notice


def read_settings(config: str | Path, changes: dict[str, Any]) -> RunSettings:
    """The settings of a recipe; with `encoder.preset: init`, its encoder is the one that --init names.

    Raises:
        ValueError: The recipe needs --init, which is not given.
    """
    if not takes_init(config, changes):
        settings = load_recipe(config, changes)
        if settings.encoder.backbone is not None:
            refuse_transformer_keys(settings.encoder, changes)
        return settings
    init = merge_recipe(config, changes).get("init")
    if not isinstance(init, str):
        raise ValueError(
            f"--config {config}: goes on from an encoder, and none is given. Name it with --init: a run, a folder, a "
            "file, or timm:MODEL."
        )
    return load_recipe(config, changes, load_encoder(expand_path(init)).settings)


def pretraining_settings(
    config: str | Path,
    changes: dict[str, Any],
    data: str | None = None,
    out: str | Path | None = None,
    init: str | os.PathLike[str] | None = None,
) -> RunSettings:
    """The settings of a pretraining run, from the arguments of its command or caller.

    Args:
        config: YAML file, or the name of a recipe.
        changes: Other settings, by dotted key.
        data: Location of the images; None for the recipe's data.shards.
        out: Run folder; None for the recipe's.
        init: Encoder whose weights are the initialization; None for the recipe's.

    Raises:
        ValueError: Settings that do not fit, or a recipe that trains with labels.
    """
    for key in ("data.shards", "data.mixture"):
        if data is not None and key in changes:
            raise ValueError(f"--data and --{key} exclude each other: give one of them.")
    given = {"data.shards": data, "out": out, "init": init}
    settings = read_settings(
        config, changes | {key: os.fspath(value) for key, value in given.items() if value is not None}
    )
    if isinstance(settings.task, SupervisedSettings):
        raise ValueError(
            f"--config {config}: trains with labels. Use: sslvit finetune ENCODER --train SHARDS --val SHARDS "
            f"--out RUN --config {config} (--scratch for one without pretraining)."
        )
    return settings


def check_machine(settings: RunSettings, is_planned: bool = False) -> None:
    """Refuse settings that cannot run here, before data is touched.

    Args:
        settings: Settings of the run.
        is_planned: Whether the run is only planned, perhaps for a GPU that is not here.
    """
    train, data, encoder = settings.train, settings.data, settings.encoder
    if data.global_batch_size is not None:
        run = RunPlan.make(replace(train, steps=1), 1, data.global_batch_size, settings.seed)
        settings.task.check_micro_batch(run.images_per_pass)
    task_class(settings.task.name).refuse_backbone(encoder)
    sides = [("data.resolutions", side) for side in data.resolutions or []]
    if isinstance(data.view, MultiCropSettings) and data.view.local_crops:
        sides.append(("data.view.local_size", data.view.local_size))
    if encoder.backbone is not None:
        check_backbone(settings, [side for _, side in sides])
    kinds = task_class(settings.task.name).view_kinds
    if isinstance(data.view, TransformSettings):
        function_of(data.view)  # refuses a function that was not given
        if data.resolutions:
            raise ValueError("data.resolutions: a function of your own decides the sizes of its views. Leave it out.")
    elif settings.data.view.kind in VIEW_SETTINGS and settings.data.view.kind not in kinds:  # other kinds are plugins
        raise ValueError(
            f"data.view.kind: {settings.data.view.kind} is not for {settings.task.name}. Use {' or '.join(kinds)}."
        )
    for key, side in sides:
        if side % encoder.patch:
            raise ValueError(
                f"{key}: {side} is not a multiple of encoder.patch ({encoder.patch}). The next one is "
                f"{-(-side // encoder.patch) * encoder.patch}."
            )
    if encoder.has_fixed_size and data.resolutions:
        raise ValueError(
            f"data.resolutions: a pixel sequence with encoder.pos_embed {encoder.pos_embed} is tied to its size "
            "(encoder.image_size). Set encoder.pos_embed to rotary_2d, or leave data.resolutions out."
        )
    if isinstance(settings.task, SupervisedSettings):
        check_labeled("--train", data.shards)
        check_labeled("--val", settings.task.val)
        check_same_source(data.shards, settings.task.val, settings.task.allow_same_data, "--task.allow_same_data true")
    check_loggers(train)
    if settings.optim.name == "muon" and train.strategy == "fsdp" and train.ranks > 1:
        raise ValueError(
            "optim.name: muon needs whole matrices, and train.strategy fsdp shards them. Use ddp, or adamw."
        )
    if train.accelerator == "gpu" and not is_planned and not torch.cuda.is_available():
        raise ValueError("train.accelerator: gpu, but torch sees none here. Use auto or cpu.")


def check_data(settings: RunSettings, index: Index | StreamIndex, plan: Plan) -> None:
    """Refuse data that this run cannot read, before step 0."""
    data, encoder = settings.data, settings.encoder
    check_channels(encoder.channels, index.channels, index.location)
    if data.ledger and isinstance(index, StreamIndex):
        raise ValueError("data.ledger: a stream cannot promise each sample once. Pack it into shards, or leave it off.")
    if data.resolutions and isinstance(index, StreamIndex):
        raise ValueError(
            "data.resolutions: the images of a stream have one size (encoder.image_size). Pack it into shards, or "
            "leave data.resolutions out."
        )
    if isinstance(data.view, AugmentSettings) and (index.bits != 8 or encoder.channels not in (1, 3)):
        raise ValueError(
            "data.view.kind: augment changes 8-bit images of 1 or 3 channels only, "
            f"not {index.bits}-bit ones of {encoder.channels}. Use crop."
        )
    check_present(index, data.max_unreadable_fraction)
    largest = max(shard.bytes for shard in index.shards) if index.is_remote else 0
    needed = plan.shards_at_once(0, plan.global_batch_size // (settings.train.nodes or 1)) * largest / 2**30
    if needed > data.cache_gb:
        raise ValueError(
            f"data.cache_gb: {data.cache_gb:g} GB cannot hold the shards that each machine reads side by side "
            f"({needed:.1f} GB). Raise it, or set data.lanes or data.window_shards lower."
        )


def look_at_views(settings: RunSettings, index: Index | StreamIndex) -> RunSettings:
    """The settings with the number and sizes of the views that the user's own function makes; unchanged without one.

    Raises:
        ValueError: the task takes other views.
    """
    view, encoder, task = settings.data.view, settings.encoder, settings.task.name
    if not isinstance(view, TransformSettings):
        return settings
    if isinstance(index, StreamIndex):
        raise ValueError("transform: a stream is not looked at before the run. Pack it into shards.")
    view = first_call(view, encoder, index, settings.seed)
    count, takes_one = len(view.sizes), "multi_crop" not in task_class(task).view_kinds
    main = view.sizes[: 1 if takes_one else 2]
    if (takes_one and count != 1) or (not takes_one and count < 2):
        needed = "one view of each image" if takes_one else "two global views of each image, then local ones"
        raise ValueError(f"transform: it gives {count}, and {task} takes {needed}.")
    if any(size != encoder.image_size for size in main):
        raise ValueError(
            f"transform: it gives {'views' if len(main) > 1 else 'a view'} of {in_words(main)} pixels, and encoder."
            f"image_size is {in_words([encoder.image_size])}. Change one of them."
        )
    odd = next((size for size in view.sizes if any(side % encoder.patch for side in size)), None)
    if odd is not None:
        raise ValueError(f"transform: {in_words([odd])} pixels are not a multiple of encoder.patch ({encoder.patch}).")
    return replace(settings, data=replace(settings.data, view=view))


def size_notice(settings: RunSettings, location: str, size: tuple[int, int] | None) -> str | None:
    """A notice, with a remedy, if images are seen far smaller or larger than they are; None otherwise.

    Args:
        settings: Settings of the run.
        location: Location of its images.
        size: Their height and width in pixels, the median if they differ; None if unknown.
    """
    encoder = settings.encoder
    if size is None:
        return None
    scale = min(size) / min(encoder.image_size)
    if 1 / GROWS < scale < SHRINKS:
        return None
    seen = f"images of about {size[0]} x {size[1]} pixels are seen at {encoder.image_size[0]} x {encoder.image_size[1]}"
    if scale >= SHRINKS:
        larger = f"{settings.task.name}/own_images"
        has_recipe = encoder.tokens == "patch" and larger in recipe_names()
        remedy = f"Take {larger}, or raise encoder.image_size." if has_recipe else "encoder.image_size says the size."
        return f"{location}: {seen}, {scale:.0f} times smaller, where what is small in them is lost. {remedy}"
    small = f"{settings.task.name}/vit_tiny_cifar10"
    recipe = f", or take a recipe for small images ({small})" if small in recipe_names() else ""
    return (
        f"{location}: {seen}, {1 / scale:.0f} times larger, which costs time and adds nothing. Lower "
        f"encoder.image_size with encoder.patch{recipe}."
    )


def resolve_defaults(
    settings: RunSettings, earlier: RunFolder | None, index: Index | StreamIndex, run: RunPlan
) -> RunSettings:
    """The settings with every null resolved for the job; a resumed run keeps the values it resolved before.

    Args:
        settings: Settings as requested.
        earlier: The folder of the resumed run; None for a new run.
        index: The data set.
        run: Steps and batch sizes.
    """
    task = settings.task.fitted(
        len(index), run.global_batch_size, run.total_steps, len(index.classes) if index.classes else None
    )
    base_lr = task.usual.base_lr_at(run.global_batch_size)
    optim = settings.optim.fitted(run.steps_per_epoch, run.total_steps, base_lr)
    data = replace(settings.data, global_batch_size=run.global_batch_size, fit_batch=False, fit_normalization=False)
    encoder = settings.encoder
    if settings.data.fit_normalization and len(index.mean) == encoder.channels:  # a stream has no statistics
        encoder = replace(encoder, mean=list(index.mean), std=[std or 1.0 for std in index.std])  # 0: constant
    fitted = replace(settings, task=task, optim=optim, data=data, encoder=encoder)
    if data.global_batch_size != settings.data.global_batch_size:
        check_machine(fitted)
    if earlier is not None:
        before, requested = by_dotted_key(earlier.read_config()), by_dotted_key(asdict(settings))

        def as_before(name: str, section: Any) -> Any:
            was_open = {key: before.get(f"{name}.{key}") for key in vars(section) if requested[f"{name}.{key}"] is None}
            return replace(section, **{key: value for key, value in was_open.items()
                                       if value is not None and vars(section)[key] is not None})  # fmt: skip

        fitted = replace(fitted, task=as_before("task", task), optim=as_before("optim", optim))
    return fitted


def describe_resolved(
    requested: RunSettings, settings: RunSettings, run: RunPlan, notes: dict[str, str] | None = None
) -> list[str]:
    """Settings that were null or did not fit, with their new values, as in "task.out_dim 256".

    Args:
        requested: Settings as requested.
        settings: Settings as resolved.
        run: Steps and batch sizes.
        notes: Further notes, by key.
    """
    before, after = by_dotted_key(asdict(requested)), by_dotted_key(asdict(settings))
    found = []
    for key, value in after.items():
        if before[key] == value or key in ("data.fit_batch", "data.fit_normalization"):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else brief(value)
        if key.endswith("_epochs"):
            text = f"{counted(round(value * run.steps_per_epoch), 'step')} ({value:.2g} epochs)"
        if before[key] is not None:
            was = before[key]
            text += f" instead of {was:g}" if isinstance(was, float) else f" instead of {brief(was)}"
            if key in ("optim.warmup_epochs", "optim.freeze_encoder_epochs"):
                text += f", since the run has {run.total_steps / run.steps_per_epoch:.2g} epochs"
        found.append(f"{key} {text}" + (f" ({note})" if (note := (notes or {}).get(key)) else ""))
    return found
