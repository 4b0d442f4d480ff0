"""A step that logs nothing makes the host wait for nothing: seen on a GPU that is not there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda_fixtures import on_fake_cuda, take_fake_cuda
from run_fixtures import BERT, run

from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.train.callbacks.step_times import WaitForData

pytestmark = pytest.mark.filterwarnings("ignore:.*device_type of 'cuda'.*", "ignore:.*no accelerator is found.*")
STEPS = 6

RUNS = {
    "mae": ("mae/digits", {"encoder.drop_path": 0.1}, 1),
    "dino": ("dino/digits", {"task.koleo": 0.1, "task.batch_norm": True, "encoder.drop_path": 0.1}, 4),
    "dino sinkhorn": ("dino/digits", {"task.centering": "sinkhorn", "optim.clip_grad_by": "parameter"}, 4),
    "igpt": ("igpt/digits", {}, 1),
    "bert": ("igpt/digits", BERT, 1),
}  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    for name, count in (("train", 30), ("val", 21)):
        labels = np.arange(count) % 3
        images = source.integers(0, 90, (count, 8, 8)) + labels[:, None, None] * 80
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["a", "b", "c"])
    return tmp_path


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transfers and waits of each step of a run on the fake device."""
    take_fake_cuda(monkeypatch)
    steps: list[tuple[Counter, Counter]] = []
    with on_fake_cuda() as where:

        def count(*_: Any) -> None:
            steps.append((where.transfers.copy(), where.waits.copy()))
            where.transfers.clear()
            where.waits.clear()

        monkeypatch.setattr(WaitForData, "on_train_batch_end", count)
        yield steps


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_logs_nothing_waits_for_nothing(name: str, shards: Path, tmp_path: Path, counts: list) -> None:
    recipe, changes, views = RUNS[name]
    run(
        shards / "train", tmp_path / "run", recipe=recipe, **changes,
        **{"train.steps": STEPS, "train.log_every": 100, "train.checkpoint_every": 100},
    )  # fmt: skip
    for transfers, waits in counts[1:-1]:  # the first one prepares, the last one logs
        assert not waits
        assert transfers.total() <= views, transfers
