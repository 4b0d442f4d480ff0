"""A step that logs nothing makes the host wait for nothing: seen on a GPU that is not there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_fixtures import on_fake_cuda, take_fake_cuda
from run_fixtures import BERT, run
from shard_fixtures import labeled_shards

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.train.timing import WaitForData

pytestmark = pytest.mark.filterwarnings("ignore:.*device_type of 'cuda'.*", "ignore:.*no accelerator is found.*")
STEPS = 6

RUNS = {
    "mae": ("mae/digits", {"encoder.drop_path": 0.1}),
    "mae by muon": ("mae/digits", {"optim.name": "muon"}),
    "mae and edges": ("mae/digits", {"task.hog_weight": 1.0}),
    "mae, cached on the device": ("mae/digits", {"data.cache_on_device": True}),
    "dino": ("dino/digits", {"task.koleo": 0.1, "task.batch_norm": True, "encoder.drop_path": 0.1}),
    "dino, cached on the device": ("dino/digits", {"data.cache_on_device": True}),
    "dino sinkhorn": ("dino/digits", {"task.centering": "sinkhorn", "optim.clip_grad_by": "parameter"}),
    "igpt": ("igpt/digits", {}),
    "bert": ("igpt/digits", BERT),
}  # fmt: skip
NO_LINES = {"train.steps": STEPS, "train.log_every": 100, "train.checkpoint_every": 100}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transfers and waits of each step of a run on the fake device."""
    take_fake_cuda(monkeypatch)
    steps: list[tuple[Counter, Counter]] = []
    with on_fake_cuda() as where:
        monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: where.waits.update(["Event.synchronize"]))

        def count(*_: Any) -> None:
            steps.append((where.transfers.copy(), where.waits.copy()))
            where.transfers.clear()
            where.waits.clear()

        monkeypatch.setattr(WaitForData, "on_train_batch_end", count)
        yield steps


def check(steps: list[tuple[Counter, Counter]], most: int = 1) -> None:
    """The first step prepares (constants, tables), and the last one logs."""
    assert len(steps) == STEPS
    for transfers, waits in steps[1:-1]:
        assert not waits
        assert transfers.total() <= most, transfers


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_logs_nothing_waits_for_nothing(name: str, shards: Path, tmp_path: Path, counts: list) -> None:
    recipe, changes = RUNS[name]
    run(shards / "train", tmp_path / "run", recipe=recipe, **changes, **NO_LINES)
    check(counts)


def test_a_step_of_fine_tuning_that_logs_nothing_waits_for_nothing(shards: Path, tmp_path: Path, counts: list) -> None:
    encoder = EncoderSettings(image_size=8, channels=1, patch=4, width=16, depth=2, heads=2)
    save_encoder(ViTEncoder(encoder), tmp_path / "encoder")
    sslvit.finetune(
        tmp_path / "encoder", shards / "train", shards / "val", out=tmp_path / "run", **NO_LINES,
        **{"data.global_batch_size": 10, "data.workers": 0, "task.erase": 0.5, "train.precision": "float32",
           "train.accelerator": "cpu", "encoder.image_size": 16},
    )  # fmt: skip
    check(counts, most=2)  # the batch, and what is erased with what
