"""Dropout is a function of the seed, the step and the place in the global batch, as all chance is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_fixtures import RECIPES, run, same
from test_resume import interrupted

from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.tasks.base import Task
from sslvit.train.fake_step import example

DROPOUT = {"encoder.dropout": 0.3}


def make_task(seed: int = 0, **changes) -> Task:
    settings = load_recipe("mae/digits", RECIPES["mae/digits"] | DROPOUT | changes)
    torch.manual_seed(0)
    return task_class("mae")(settings.task, settings.encoder, settings.optim, RunPlan(9, 3, 8, seed=seed))


def dropped(seed: int = 0, step: int = 0, first_row: int = 0, drawn: int = 0) -> list[bool]:
    """Which units the encoder's dropout drops in a micro-batch."""
    task = make_task(seed)
    torch.rand(drawn)
    batch = example(load_recipe("mae/digits", RECIPES["mae/digits"]), 4)
    batch.first_row = first_row
    task.seed_dropout(batch, step)
    return (task.encoder.dropout(torch.ones(64)) == 0).tolist()


def test_dropout_depends_on_seed_step_and_row_and_on_nothing_else() -> None:
    one = dropped()
    assert 4 < sum(one) < 40
    assert dropped(drawn=3) == one
    others = [dropped(seed=1), dropped(step=1), dropped(first_row=4), dropped(first_row=8)]
    assert all(other != one for other in others)
    assert len({tuple(other) for other in others}) == 4


@pytest.mark.parametrize("changes", [{}, {"train.micro_batch_size": 4, "encoder.activation_checkpointing": True}])
def test_a_resume_with_dropout_is_bit_equal(
    shards: Path, tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = DROPOUT | changes
    whole = run(shards, tmp_path / "whole", **changes)
    interrupted(shards, tmp_path / "cut", 5, monkeypatch, **changes)
    torch.rand(7)  # whatever was drawn before
    assert same(run(shards, tmp_path / "cut", resume=True, **changes), whole)
    assert not same(run(shards, tmp_path / "none", **changes | {"encoder.dropout": 0.0}), whole)


def test_micro_batches_and_steps_of_a_run_drop_different_units(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run: the units that are dropped in each of its micro-batches."""
    seen, step = [], task_class("mae").training_step

    def watched(self, batch, batch_idx=0):
        with torch.random.fork_rng(devices=[]):
            is_dropped = self.encoder.dropout(torch.ones(64)) == 0
        seen.append((self.global_step, batch.first_row, tuple(is_dropped.tolist())))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task_class("mae"), "training_step", watched)
    run(shards, tmp_path / "run", **DROPOUT, **{"train.micro_batch_size": 4, "train.steps": 3})
    assert [place[:2] for place in seen] == [(step, row) for step in range(3) for row in (0, 4)]
    assert len({place[2] for place in seen}) == 6
    assert all(place[2] == tuple(dropped(0, *place[:2])) for place in seen)


def test_recomputed_blocks_drop_the_same_units() -> None:
    gradients = []
    for checkpointing in (False, True):
        task = make_task(**{"encoder.activation_checkpointing": checkpointing, "encoder.depth": 2})
        batch = example(load_recipe("mae/digits", RECIPES["mae/digits"]), 8)
        batch.views = [torch.linspace(-1, 1, 512).reshape(8, 1, 8, 8)]
        task.seed_dropout(batch, 0)
        task.training_step(batch).backward()
        gradients.append([p.grad for p in task.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
