"""Tiny runs of each task, and what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from sslvit.cli import read_command
from sslvit.settings.load import load_recipe
from sslvit.settings.protocols import ProtocolSettings
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.train.folder import RunFolder
from sslvit.train.run import pretrain

TINY = {
    "encoder.image_size": 8, "encoder.patch": 2, "encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2,
    "encoder.drop_path": 0.2, "task.decoder_width": 16, "task.decoder_depth": 1, "task.decoder_heads": 2,
    "data.global_batch_size": 8, "data.workers": 0, "data.view.kind": "crop", "data.view.scale": [0.5, 1.0],
    "train.steps": 7, "train.log_every": 1, "train.checkpoint_every": 3, "train.precision": "float32",
    "train.accelerator": "cpu", "optim.warmup_epochs": 0.5,
}  # fmt: skip


TINY_DINO = {key: value for key, value in TINY.items() if not key.startswith(("task.", "data.view."))} | {
    "encoder.tokens": "patch", "encoder.pooling": "class", "data.view.local_crops": 2, "data.view.local_size": 4,
    "data.view.jitter": 0.5, "task.batch_norm": False, "task.koleo": 0.0, "task.out_dim": 12, "task.head_width": 16,
    "task.bottleneck": 8, "task.momentum": 0.9, "task.teacher_temp": 0.06, "task.freeze_last_layer": 0.5,
}  # fmt: skip


TINY_IGPT = {key: value for key, value in TINY.items() if not key.startswith("task.")} | {
    "encoder.patch": 1, "encoder.feature_layer": 1,
}  # fmt: skip
BERT = {"task.objective": "bert", "encoder.causal": False, "encoder.mask_token": True}

RECIPES = {"mae/digits": TINY, "dino/digits": TINY_DINO, "igpt/digits": TINY_IGPT}


def run(
    shards: Path, out: Path, resume: bool = False, overwrite: bool = False, recipe: str = "mae/digits", **changes
) -> RunFolder:
    settings = load_recipe(recipe, RECIPES[recipe] | {"data.shards": str(shards), "out": str(out)} | changes)
    return pretrain(settings, resume=resume, overwrite=overwrite)


def command(shards: Path, out: Path, *flags: str, recipe: str = "mae/digits", **changes) -> list[str]:
    """The same as words of a command line."""
    given = [f"--{key}={json.dumps(value)}" for key, value in (RECIPES[recipe] | changes).items()]
    words = ["--config", recipe, "--data", str(shards), "--out", str(out), *given, *flags]
    return [sys.executable, "-m", "sslvit.cli", "pretrain", *words]


def run_ranks(shards: Path, out: Path, *flags: str, **changes) -> RunFolder:
    """A run in processes of its own."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(shards, out, *flags, **changes), env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return RunFolder(out)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder.checkpoint)["state_dict"]


def is_timing(name: str) -> bool:
    """Names of metrics that differ from run to run."""
    return name.startswith("time/")


def metrics(folder: RunFolder) -> list[dict]:
    return [{k: v for k, v in line.items() if not is_timing(k)} for line in folder.read_metrics()]


def losses(folder: RunFolder) -> list[float]:
    return [line["train/loss"] for line in folder.read_metrics()]


def same(one: RunFolder, other: RunFolder) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and metrics(one) == metrics(other)


def read_keys(folder: RunFolder) -> dict[int, list[str]]:
    """The keys that all ranks read, by epoch, in the order of the steps."""
    texts = [path.read_text() for path in sorted(folder.samples.glob("*.jsonl"))]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    lines.sort(key=lambda line: line["step"])
    return {epoch: [line["key"] for line in lines if line["epoch"] == epoch] for epoch in {x["epoch"] for x in lines}}


def read_protocol(name: str, changes: dict[str, object]) -> ProtocolSettings:
    """The linear probe of a name as `sslvit probe` reads it, with changes such as {"protocol.epochs": 1}."""
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    command = ["probe", "encoder", "--train", "t", "--val", "v", "--protocol", name, *words]
    return read_command(command)[1].protocol
