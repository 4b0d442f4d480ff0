"""What the trials work on: small shards, tiny uninterrupted runs of each task, encoders, images."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from children import Child, command, in_child
from export_fixtures import saved
from run_fixtures import command as pretrain_command
from run_fixtures import metrics, read_keys
from shard_fixtures import numbered_shards, photograph

from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.train.folder import RunFolder

TASKS = ("mae", "dino", "igpt")
COMMON = {"train.steps": 40, "train.checkpoint_every": 3, "train.threads": 1, "data.ledger": True}
SPECIAL = {  # each task meets another way of reading and keeping
    "mae": {"data.workers": 2, "data.memory_limit_mb": 0},
    "dino": {"train.keep_last": 2},
    "igpt": {"train.checkpoint_in_background": True},
}
ENCODER = {"image_size": 8, "patch": 2, "width": 16, "depth": 1, "heads": 2}


class Workshop:
    """Things that many trials use, each made once, when the first asks for it.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.helpers: list[Child] = []  # processes that go on beside the trials

    def close(self) -> None:
        for child in self.helpers:
            child.kill_all()

    @cache  # noqa: B019 there is one workshop
    def shards(self) -> Path:
        """Thirty labeled images in a few shards."""
        in_child(lambda: _nothing(numbered_shards(self.folder / "shards", 30, shard_mb=0.02)), self.log)
        return self.folder / "shards"

    @cache  # noqa: B019
    def images(self) -> Path:
        """Class folders of JPEGs."""

        def make() -> None:
            for number in range(120):
                folder = self.folder / "images" / ("cat", "dog", "owl")[number % 3]
                folder.mkdir(parents=True, exist_ok=True)
                photograph(60 + number % 7, 80, number).save(folder / f"{number:03d}.jpg")

        in_child(make, self.log)
        return self.folder / "images"

    @cache  # noqa: B019
    def encoder(self, **changes: Any) -> Path:
        """A small encoder, saved."""
        name = "encoder" + "".join(f"-{key}-{value}" for key, value in changes.items())
        in_child(lambda: _nothing(saved(self.folder / name, **ENCODER | changes)), self.log)
        return self.folder / name

    @cache  # noqa: B019
    def whole_run(self, task: str) -> tuple[RunFolder, float]:
        """A run that was never stopped, and how many seconds it took."""
        import time

        folder = RunFolder(self.folder / f"whole-{task}")
        start = time.monotonic()
        in_child(command(*self.pretrain(task, folder.path)), self.log)
        return folder, time.monotonic() - start

    def pretrain(self, task: str, out: Path, *flags: str, **changes: Any) -> list[str]:
        """Words of the command that makes a run."""
        options = COMMON | SPECIAL[task] | changes
        return pretrain_command(self.shards(), out, *flags, recipe=f"{task}/digits", **options)[3:]

    def go_on(self, task: str, out: Path, by_folder: bool = False, **changes: Any) -> list[str]:
        """Words of the command that goes on with a run, or begins it where nothing was saved yet, as docs/cluster.md
        has it in a job's script; `by_folder` asks the run folder alone."""
        if not RunFolder(out).checkpoint.exists():
            return self.pretrain(task, out, **changes)
        if by_folder:
            return ["resume", str(out)]
        return self.pretrain(task, out, "--resume", **changes)


def import_libraries() -> None:
    """timm and transformers take seconds: once here, not in every child."""
    import timm
    import transformers

    timm.list_models("vit_tiny*")
    transformers.logging.set_verbosity_error()


def differences(one: RunFolder, other: RunFolder) -> list[str]:
    """In what two runs are not the same to the last bit: weights, moments, metrics, ledger, encoder."""
    found = []
    a, b = (read_checkpoint(folder.checkpoint) for folder in (one, other))
    for key in ("state_dict", "optimizer_states", "global_step"):
        if not same_values(a[key], b[key]):
            found.append(key)
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    if json.loads(one.ledger.read_text()) != json.loads(other.ledger.read_text()):
        found.append("ledger.json")
    if read_keys(one) != read_keys(other):
        found.append("ledger/")
    if tree(one.encoder).get("encoder.safetensors") != tree(other.encoder).get("encoder.safetensors"):
        found.append("encoder.safetensors")
    return found


def same_values(one: Any, other: Any) -> bool:
    """Whether nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(same_values(one[k], other[k]) for k in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_values(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the checksum of its content; locks are no content."""
    if not folder.exists():
        return {}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def left_parts(folder: Path) -> list[str]:
    """Unfinished files that nobody cleared away."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part*"))


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def _nothing(*_: Any) -> None:
    """The value of a child's work is an exit code."""
