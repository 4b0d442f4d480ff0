"""Two ranks train encoders with parts that no step passes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import run_ranks, weights

from sslvit.checkpoint import save_encoder
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.train.folder import RunFolder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae/digits", pytest.param("dino/digits", marks=pytest.mark.smoke), "igpt/digits"])
def test_two_ranks_pretrain_an_encoder_with_parts_that_are_not_used(tmp_path: Path, recipe: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (16, 8, 8)).astype(np.uint8)
    pack(array_samples(images, np.arange(16) % 2), tmp_path / "shards", ["a", "b"])
    options = {"encoder.mask_token": True, "encoder.fc_norm": True, "train.devices": 2, "train.steps": 3}
    run = run_ranks(tmp_path / "shards", tmp_path / "run", recipe=recipe, **options)
    assert read_checkpoint(run.checkpoint)["global_step"] == 3


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
        "data.global_batch_size": 8, "data.workers": 0, "train.steps": 4, "train.log_every": 1,
        "train.accelerator": "cpu",
        "train.precision": "float64", "task.mixup": 0, "task.cutmix": 0, "optim.base_lr": 0.05,
    }  # fmt: skip
    found = {}
    for ranks in (1, 2):
        words = [f"--{key}={json.dumps(value)}" for key, value in (changes | {"train.devices": ranks}).items()]
        done = subprocess.run(
            [sys.executable, "-m", "sslvit.cli", "finetune", str(tmp_path / "encoder"), "--train",
             str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--out", str(tmp_path / str(ranks)), *words],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found[ranks] = weights(RunFolder(tmp_path / str(ranks)))
    for key, value in found[1].items():
        torch.testing.assert_close(found[2][key], value, rtol=1e-6, atol=1e-9)
