"""Every key of the settings, changed between a run and its resume, is refused, or trains as it says, or is not felt.

A checkpoint brings more than weights: hyperparameters in the optimizer's groups, tables that a setting computed, what a
callback knew. A key that such a value silently overrides would be said to have changed and would not have.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_fixtures import RECIPES

from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.settings.load import by_dotted_key, load_recipe
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.train.run import pretrain

REFUSED = r"resume: |another architecture|written with other data"
SHARED = {
    "encoder.depth": 2, "encoder.dropout": 0.1, "optim.clip_grad": 0.05, "optim.clip_grad_by": "all",
    "optim.warmup_epochs": 0.3,
    "train.steps": 6, "train.keep_every": 3, "train.log_every": 3, "encoder.layer_scale": 0.5, "train.threads": 1,
}  # fmt: skip
SUPERVISED = {
    key: value for key, value in RECIPES["mae/digits"].items() if not key.startswith(("task.", "data.view."))
} | {"encoder.channels": 1, "encoder.mean": [0.2], "encoder.std": [0.33], "encoder.pos_embed": "sincos_2d",
     "data.view.kind": "augment", "task.mixup": 0.0, "task.cutmix": 0.8, "task.erase": 0.25}  # fmt: skip
RUNS = {
    "mae/digits": RECIPES["mae/digits"],
    "dino/digits": RECIPES["dino/digits"] | {"task.freeze_last_layer": 0.1, "task.warmup_teacher_temp_epochs": 3.0},
    "igpt/digits": RECIPES["igpt/digits"],
    "finetune/small_images": SUPERVISED,
}

# how a run is carried out and what is read from it beside its weights: nothing that a step computes
UNFELT = {
    "encoder.crop_mode": "squash", "encoder.crop_fraction": 0.5, "encoder.feature_layer": 1,
    "encoder.feature_norm": "next", "encoder.activation_checkpointing": True, "encoder.interpolate_antialias": False,
    "encoder.interpolate_offset": 0.1, "encoder.pooling": "class", "encoder.pool_mlp": True,
    "data.shards": "copy", "data.fit_batch": True,
    "data.workers": 1, "data.memory_limit_mb": 0, "data.window_shards": 2, "data.color_on": "workers",
    "data.cache_on_device": False, "data.cache": "cache", "data.cache_gb": 3.0, "data.stream_samples": 30,
    "data.allow_pipe": True,
    "data.max_pixels": 1000, "data.max_unreadable_fraction": 0.5, "data.ledger": True, "train.accelerator": "auto",
    "train.strategy": "fsdp", "train.timeout_seconds": 300.0, "train.compile": "default", "train.log_every": 2,
    "train.checkpoint_every": 1, "train.skip_limit": 3, "train.requeue": False, "train.keep_last": 2,
    "train.keep_every": 6, "train.checkpoint_in_background": True, "train.tensorboard": True,
    "train.peak_tflops": 2.0, "train.deterministic": True, "online.every": 3, "online.images": 9,
    "online.neighbors": 3, "online.precision": "bf16", "online.train": "copy", "online.val": "copy",
}  # fmt: skip
FELT = {
    "train.epochs": 3.0,  # said last, it takes the place of train.steps
    "encoder.interpolation": "bicubic", "encoder.dropout": 0.3, "encoder.drop_path": 0.4, "data.view.kind": "square",
    "data.view.scale": [0.2, 0.3], "data.view.ratio": [0.5, 2.0], "data.view.flip": 0.9, "data.resolutions": [4],
    "optim.base_lr": 0.01, "optim.min_lr": 0.02, "optim.warmup_epochs": 2.0, "optim.weight_decay": 0.9,
    "optim.final_weight_decay": 0.9, "optim.freeze_encoder_epochs": 1.5,
    "optim.lr_schedule": "wsd", "optim.cooldown_fraction": 0.5, "data.resolution_fractions": [0.9, 0.1],
    "optim.clip_grad": 0.01, "optim.clip_grad_by": "parameter", "train.steps": 7,
    "train.micro_batch_size": 4, "train.precision": "float64", "task.mask_ratio": 0.5,
}  # fmt: skip
REFUSED_VALUES = {
    "encoder.image_size": [4, 4], "encoder.channels": 3, "encoder.mean": [0.3], "encoder.std": [0.5],
    "encoder.patch": 4, "encoder.hybrid_backbone": "resnet18",
    "encoder.palette": [[-1.0], [1.0]], "encoder.color_init": "fourier", "encoder.width": 32, "encoder.depth": 1,
    "encoder.heads": 4, "encoder.mlp_ratio": 2.0, "encoder.mlp": "quick_gelu", "encoder.norm": "rms",
    "encoder.norm_eps": 1e-5, "encoder.bias": False, "encoder.key_bias": False,
    "encoder.layer_scale": 0.1, "encoder.qk_norm": True,
    "encoder.locality_self_attention": True, "encoder.pos_embed": "sincos_1d",
    "encoder.prefix_positions": "none", "encoder.class_token": False, "encoder.registers": 1,
    "encoder.patch_bias": False, "encoder.pre_norm": True,
    "encoder.mask_token": True, "encoder.final_norm": False, "encoder.fc_norm": True,
    "encoder.init": "normal", "data.mixture": "copy", "data.global_batch_size": 6, "data.limit": 24,
    "data.limit_per_class": 9,
    "data.fit_normalization": True, "data.lanes": 2, "optim.betas": [0.8, 0.9], "optim.layer_decay": 0.9,
    "optim.name": "muon", "seed": 1,
    "init": "copy", "task.target": "normalized", "task.hog_weight": 1.0, "task.decoder_width": 32,
    "task.decoder_depth": 2, "task.decoder_heads": 4, "task.decoder_mlp_ratio": 2.0,
}  # fmt: skip
# processes, an account, another folder; threads change the order of sums
STARTED_OTHERWISE = {"train.devices", "train.nodes", "train.wandb", "train.mlflow", "train.threads", "train.budget",
                     "out"}  # fmt: skip
CNN = "torchvision:shufflenet_v2_x0_5"
TASKS = {
    "dino/digits": (
        {},
        {"task.student_temp": 0.2, "task.teacher_temp": 0.5, "task.warmup_teacher_temp": 0.5,
         "task.warmup_teacher_temp_epochs": 9.0, "task.momentum": 0.3, "task.final_momentum": 0.95,
         "task.centering": "sinkhorn", "task.center_momentum": 0.1, "task.koleo": 0.5,
         "encoder.interpolate_antialias": False, "encoder.interpolate_offset": 0.1,
         "data.view.global_scale": [0.3, 0.4],
         "data.view.local_scale": [0.5, 0.9], "data.view.local_crops": 1, "data.view.local_size": 6,
         "data.view.ratio": [0.5, 2.0], "data.view.flip": 0.5, "data.view.jitter": 1.0, "data.view.brightness": 0.9,
         "data.view.contrast": 0.9, "data.view.blur": [1.0, 1.0, 1.0], "data.view.blur_sigma": [1.0, 3.0],
         "data.view.solarize": [1.0, 1.0, 1.0]},
        {"task.out_dim": 9, "task.head_layers": 2, "task.head_width": 8, "task.bottleneck": 4, "task.batch_norm": True,
         "task.norm_last_layer": False, "encoder.pooling": "mean", "encoder.backbone": CNN, "encoder.small_stem": True},
    ),
    "igpt/digits": ({"task.mask_ratio": 0.3}, {}, {"task.objective": "bert"}),
    "finetune/small_images": (
        {"task.val": "copy", "task.validate_every": 3, "task.allow_same_data": True},
        {"task.smoothing": 0.5, "task.mixup": 0.8, "task.cutmix": 0.0, "task.erase": 0.9, "data.view.operations": 1,
         "data.view.magnitude": 1, "data.view.magnitude_std": 5.0, "data.view.probability": 1.0,
         "optim.weight_decay": 0.9},
        {"encoder.pooling": "class", "encoder.tokens": "shifted_patch",
         "encoder.causal": True},
    ),
}  # fmt: skip
WITH = {  # keys that must change together
    "data.mixture": {"data.shards": None}, "online.train": {"online.val": "copy"},
    "online.val": {"online.train": "copy"},
    "online.every": {"online.val": "copy", "online.train": "copy"}, "encoder.class_token": {"encoder.pooling": "mean"},
    "online.images": {"online.val": "copy", "online.train": "copy"},
    "online.neighbors": {"online.val": "copy", "online.train": "copy"},
    "online.precision": {"online.val": "copy", "online.train": "copy"},
    "encoder.channels": {"encoder.mean": [0.5] * 3, "encoder.std": [0.5] * 3},
    "encoder.patch": {"data.view.kind": "crop"},
    "encoder.small_stem": {"encoder.backbone": "torchvision:resnet18"},
    "optim.cooldown_fraction": {"optim.lr_schedule": "wsd"}, "data.resolution_fractions": {"data.resolutions": [4, 8]},
    "data.view.kind": {"data.view.scale": None, "data.view.ratio": None},
    "task.objective": {"encoder.causal": False, "encoder.mask_token": True},
    "task.validate_every": {"task.val": "copy", "task.allow_same_data": True},
    "task.val": {"task.allow_same_data": True},
    "data.view.brightness": {"data.view.jitter": 1.0}, "data.view.contrast": {"data.view.jitter": 1.0},
    "data.view.blur_sigma": {"data.view.blur": [1.0, 1.0, 1.0]},
}  # fmt: skip
ONE_CHANNEL = {"data.view.saturation", "data.view.hue", "data.view.gray"}  # change nothing of gray images
# felt with centering sinkhorn; that of the data; over by then; with other keys of
# its own (test_resume.py); of rotary_2d
NEEDS_ANOTHER = {
    "task.sinkhorn_iterations", "task.classes", "task.freeze_last_layer", "task.name", "encoder.rotary_grid",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    pixels = source.integers(0, 255, (30, 10, 12)).astype(np.uint8)
    pack(array_samples(pixels, np.arange(30) % 3), folder / "s", ["a", "b", "c"])
    shutil.copytree(folder / "s", folder / "copy")
    return folder


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    """No pictures, and torch's own switches as they were."""
    monkeypatch.setattr("sslvit.train.run._finish", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def settings_of(recipe: str, images: Path, out: Path, changes: dict[str, Any]) -> Any:
    known = {"copy": str(images / "copy"), "cache": str(images / "cache")}
    changes = {key: known.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    if "data.mixture" in changes:
        changes["data.mixture"] = {str(images / "copy"): 1.0}
    if changes.get("data.view.kind"):
        kept = {key: value for key, value in RUNS[recipe].items() if not key.startswith("data.view.")}
        changes = {key: value for key, value in changes.items() if value is not None or not key.startswith("data.view")}
    else:
        kept = RUNS[recipe]
    return load_recipe(recipe, kept | SHARED | {"data.shards": str(images / "s"), "out": str(out)} | changes)


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory):
    """recipe -> a run at step 3 of 6, and the weights of its unchanged end."""
    made: dict[str, tuple[Path, dict]] = {}

    def make(recipe: str) -> tuple[Path, dict]:
        if recipe not in made:
            out = tmp_path_factory.mktemp("run") / "run"
            folder = pretrain(settings_of(recipe, images, out, {}))
            end = read_checkpoint(folder.checkpoint)
            folder.checkpoint.with_name("step-00000003.ckpt").rename(folder.checkpoint)
            folder.checkpoint.with_name("step-00000006.ckpt").unlink()
            made[recipe] = out, end
        return made[recipe]

    return make


def resumed(recipe: str, images: Path, begun, out: Path, changes: dict[str, Any]) -> dict:
    """The last checkpoint of a run that goes on with changed settings."""
    shutil.copytree(begun(recipe)[0], out)
    return read_checkpoint(pretrain(settings_of(recipe, images, out, changes), resume=True).checkpoint)


def is_same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())


CASES = [
    *(("mae/digits", "unfelt", key, value) for key, value in UNFELT.items()),
    *(("mae/digits", "felt", key, value) for key, value in FELT.items()),
    *(("mae/digits", "refused", key, value) for key, value in REFUSED_VALUES.items()),
    *((recipe, fate, key, value) for recipe, of in TASKS.items()
      for fate, keys in zip(("unfelt", "felt", "refused"), of, strict=True) for key, value in keys.items()),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["unfelt", "felt", "refused"])
@pytest.mark.parametrize("recipe", RUNS)
def test_a_key_changed_at_a_resume_is_refused_or_does_what_it_says(
    images: Path, begun, tmp_path: Path, recipe: str, fate: str
) -> None:
    end = begun(recipe)[1]
    wrong = []
    for _, _, key, value in (case for case in CASES if case[:2] == (recipe, fate)):
        changes = {key: value} | WITH.get(key, {})
        out = tmp_path / key
        try:
            after = resumed(recipe, images, begun, out, changes)
        except (ValueError, FileNotFoundError) as error:
            found = "refused" if re.search(REFUSED, str(error)) else str(error)
        else:
            found = "unfelt" if is_same(after, end) else "felt"
            name = key.removeprefix("encoder.")
            if key.startswith("encoder."):
                assert after["sslvit"]["encoder"][name] == value, key  # what is saved is what was asked for
        if found != fate:
            wrong.append(f"{key} {value}: {found}")
        shutil.rmtree(out, ignore_errors=True)
    assert not wrong


def test_every_key_is_among_those_that_are_tried(images: Path) -> None:
    tried = {key for _, _, key, _ in CASES} | STARTED_OTHERWISE | ONE_CHANNEL | NEEDS_ANOTHER
    for recipe in RUNS:
        every = by_dotted_key(asdict(settings_of(recipe, images, images, {})))
        assert not set(every) - tried
