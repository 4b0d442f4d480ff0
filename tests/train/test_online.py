"""Scores during pretraining: there when asked for, and not felt by the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import metrics, run, weights

from sslvit.data.arrays import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate.label_free import spread
from sslvit.settings import load
from sslvit.train.online import ScoringCallback, looking

ONLINE = ("online_knn", "online_linear")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 21)):
        labels = np.arange(count) % 2
        images = source.integers(0, 100, (count, 8, 8)) + labels[:, None, None] * 100
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["dark", "light"])
    return tmp_path


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_online_scores_leave_the_training_as_it_was(shards: Path, recipe: str) -> None:
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.every": 3,
              "online.images": 15}  # fmt: skip
    # dropout draws from torch's stream, so a look that draws from it would show
    changes = {"train.log_every": 2, "recipe": recipe, "encoder.dropout": 0.1}
    with_them = run(shards / "train", shards / "with", **changes, **online)
    without = run(shards / "train", shards / "without", **changes)
    one, other = weights(with_them), weights(without)
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = metrics(with_them)
    assert [line["step"] for line in lines if "online_knn" in line] == [4, 7]  # 3 rounded up to a line; the last step
    assert all(0 <= line[name] <= 100 for line in lines if "online_knn" in line for name in ONLINE)
    assert [{k: v for k, v in line.items() if not k.startswith("online_")} for line in lines] == metrics(without)


def test_a_look_gives_back_the_mode_of_every_part() -> None:
    class Task(torch.nn.Sequential):
        def whole(self):
            return self

    module = Task(torch.nn.Linear(2, 2), torch.nn.Dropout())
    module[1].eval()
    with looking(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in module.modules()] == [True, True, False]


def test_looks_are_due_with_a_line_and_after_the_last_step() -> None:
    assert ScoringCallback(25, 10, 60).every == 30
    assert ScoringCallback(None, 10, 60).every == 60
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert spread(3, 9).tolist() == [0, 1, 2]


def test_data_for_online_scores_is_checked_before_anything_is_written(shards: Path) -> None:
    pack(array_samples(np.zeros((4, 8, 8), np.uint8)), shards / "plain")
    with pytest.raises(ValueError, match="online.train and online.val belong together"):
        load.load_recipe("mae/digits", {"online.train": "x"})
    with pytest.raises(ValueError, match="have no labels"):
        run(shards / "train", shards / "run", **{"online.train": str(shards / "train"),
                                                 "online.val": str(shards / "plain")})  # fmt: skip
    assert not (shards / "run").exists()
