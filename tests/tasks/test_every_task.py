"""What holds for every task: each trained weight is used, what is not used is frozen, on any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import BERT, run_ranks, weights

from sslvit.checkpoint import save_encoder
from sslvit.data.arrays import array_samples
from sslvit.data.batch import Batch
from sslvit.data.pack import pack
from sslvit.data.views import Views
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.tasks.base import PretextTask
from sslvit.train.folder import RunFolder
from sslvit.weight_files import read_torch_file

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "bench"
)
SMALL = {"encoder.width": 16, "encoder.depth": 2, "encoder.heads": 2}
HEADS = {
    "mae": {"task.decoder_width": 16, "task.decoder_depth": 1, "task.decoder_heads": 2},
    "dino": {"task.out_dim": 16, "task.head_width": 16, "task.bottleneck": 8},
}  # fmt: skip
OPTIONS = {
    "as the recipe": {},
    "mask token and norm of the pooled vector": {"encoder.mask_token": True, "encoder.fc_norm": True},
    "registers, learned 2-D positions, scales, norms of queries": {
        "encoder.registers": 2, "encoder.positions": "learned_2d", "encoder.prefix_positions": "all",
        "encoder.layer_scale": 0.1, "encoder.qk_norm": True,
    },
    # the mean over patches: a class token has no bias to any patch, so in the last block none would count for it
    "relative bias and locality": {
        "encoder.positions": "relative_bias", "encoder.locality": True, "encoder.pooling": "mean",
    },
}  # fmt: skip


def task_of(recipe: str, **changes) -> tuple[PretextTask, Batch]:
    """A small task after a recipe, and a batch as it would get it."""
    settings = load_recipe(recipe, SMALL | {"data.shards": "none"} | changes)
    torch.manual_seed(0)
    task = task_class(settings.task.name)(
        settings.task.fitted(1000, 8, 100, 3), settings.encoder, replace(settings.optim, warmup_epochs=1),
        total_steps=100, steps_per_epoch=10, global_batch=8,
    ).train()  # fmt: skip
    with torch.no_grad():
        for parameter in task.parameters():  # no weight is silent because another one is still zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).of_size()
    images = [torch.randn(4, settings.encoder.channels, *view.size) for view in views]
    number = torch.arange(4)
    return task, Batch(images, number % 3, number, torch.ones(4, dtype=torch.bool), number)


def shrunk(recipe: str) -> dict:
    """What makes a recipe's images and head small."""
    settings = load_recipe(recipe, {"data.shards": "none"})
    encoder, name = settings.encoder, settings.task.name
    if encoder.tokens == "pixel":
        return {"encoder.image_size": 4, "encoder.feature_layer": 1}
    local = {"data.view.local_size": 2 * encoder.patch} if name == "dino" else {}
    return {"encoder.image_size": 4 * encoder.patch, **local, **HEADS.get(name, {})}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_trained_weight_of_every_recipe_gets_a_gradient(recipe: str, options: str) -> None:
    changes = OPTIONS[options]
    is_pixel = load_recipe(recipe, {"data.shards": "none"}).encoder.tokens == "pixel"
    if is_pixel:
        alone = ("encoder.registers", "encoder.locality")  # not for a causal sequence of pixels
        changes = {key: value for key, value in changes.items() if key not in alone}
    task, batch = task_of(recipe, **shrunk(recipe), **changes)
    task.training_step(batch, 0).backward()
    idle = [name for name, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    frozen = {name for name, p in task.encoder.named_parameters() if not p.requires_grad}
    assert frozen <= {"mask_token", "fc_norm.weight", "fc_norm.bias"}
    assert ("mask_token" in frozen) == task.encoder.settings.mask_token


@pytest.mark.parametrize(
    ("recipe", "changes", "frozen"),
    [
        ("mae/digits", {}, {"mask_token", "fc_norm.weight", "fc_norm.bias"}),
        ("dino/digits", {}, {"mask_token"}),
        ("igpt/digits", {}, {"mask_token", "fc_norm.weight"}),  # its norms have no bias
        ("igpt/digits", BERT, {"fc_norm.weight"}),
        ("finetune/small_images", {}, {"mask_token"}),
    ],
)
def test_what_no_step_passes_through_is_frozen_and_nothing_else(recipe: str, changes: dict, frozen: set) -> None:
    options = {"encoder.mask_token": True, "encoder.fc_norm": True, **changes}
    task, _ = task_of(recipe, **shrunk(recipe), **options)
    assert {name for name, p in task.encoder.named_parameters() if not p.requires_grad} == frozen
    moved = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert moved == {id(p) for p in task.parameters() if p.requires_grad}


@pytest.mark.parametrize("recipe", ["dino/digits", "finetune/small_images"])
def test_a_class_token_that_sees_no_patch_is_not_trained(recipe: str) -> None:
    with pytest.raises(ValueError, match="in front of a causal encoder, which sees no patch.*encoder.pooling to mean"):
        task_of(recipe, **{"encoder.causal": True, "encoder.pooling": "class", "encoder.class_token": True,
                           "encoder.tokens": "patch"})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_two_ranks_pretrain_an_encoder_with_parts_that_are_not_used(tmp_path: Path, recipe: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (16, 8, 8)).astype(np.uint8)
    pack(array_samples(images, np.arange(16) % 2), tmp_path / "shards", ["a", "b"])
    options = {"encoder.mask_token": True, "encoder.fc_norm": True, "train.devices": 2, "train.steps": 3}
    run = run_ranks(tmp_path / "shards", tmp_path / "run", recipe=recipe, **options)
    assert read_torch_file(run.checkpoint)["global_step"] == 3


@pytest.mark.slow
def test_two_ranks_fine_tune_an_encoder_with_a_mask_token_as_one_does(tmp_path: Path) -> None:
    """DDP stops at the second step where a trained weight got no gradient in the first."""
    source = np.random.default_rng(0)
    for name in ("train", "val"):
        images = source.integers(0, 255, (24, 8, 8, 3)).astype(np.uint8)
        pack(array_samples(images, np.arange(24) % 3), tmp_path / name, ["a", "b", "c"])
    settings = EncoderSettings(image_size=8, patch=4, width=16, depth=2, heads=2, mask_token=True)
    torch.manual_seed(0)
    save_encoder(ViTEncoder(settings), tmp_path / "encoder")
    changes = {
        "data.global_batch": 8, "data.workers": 0, "train.steps": 4, "train.log_every": 1, "train.accelerator": "cpu",
        "train.precision": "float64", "task.mixup": 0, "task.cutmix": 0, "optim.base_rate": 0.05,
    }  # fmt: skip
    found = {}
    for ranks in (1, 2):
        words = [f"--{key}={json.dumps(value)}" for key, value in (changes | {"train.devices": ranks}).items()]
        done = subprocess.run(
            [sys.executable, "-m", "sslvit.cli", "finetune", str(tmp_path / "encoder"), "--train",
             str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--out", str(tmp_path / str(ranks)), *words],
            env=os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found[ranks] = weights(RunFolder(tmp_path / str(ranks)))
    for key, value in found[1].items():
        torch.testing.assert_close(found[2][key], value, rtol=1e-6, atol=1e-9)
