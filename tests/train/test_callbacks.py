"""What happens around a step happens in one order, and a checkpoint can be made of one rank's memory alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from run_fixtures import RECIPES, run
from torch import distributed

from sslvit.data.module import ShardDataModule
from sslvit.data.open import open_data
from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.train import trainer as trainer_module
from sslvit.train.callbacks import make_callbacks, run_log
from sslvit.train.callbacks.ledger import Ledger
from sslvit.train.callbacks.run_log import RunLog
from sslvit.train.folder import RunFolder
from sslvit.train.timing import Clock

BEFORE = ["Clock", "Peers", "Ledger", "Incidents", "Health"]
AFTER = ["RunLog", "Page", "Checkpoints", "Preemption", "WaitForData"]
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")


@pytest.mark.parametrize(
    ("recipe", "keys", "scores"),
    [
        ("mae/digits", [], []),
        ("dino/digits", ["online.train", "online.val"], ["OnlineProbe"]),
        ("finetune/small_images", ["task.val"], ["Validation"]),
    ],
)
def test_callbacks_are_called_in_the_order_of_their_reasons(
    shards: Path, tmp_path: Path, recipe: str, keys: list[str], scores: list[str]
) -> None:
    """What may end the run, then what records, then the line of metrics.jsonl, then the checkpoint, then the stop."""
    changes = RECIPES.get(recipe, {"data.global_batch_size": 8, "encoder.image_size": 8, "encoder.patch": 4})
    changes = changes | {"data.shards": str(shards)} | dict.fromkeys(keys, str(shards))
    changes |= {"task.allow_same_data": True} if recipe.startswith("finetune") else {}
    settings = load_recipe(recipe, changes)
    index, plan = open_data(settings.data, 0)
    data = ShardDataModule(index, settings.data, settings.encoder, plan, RunPlan(7, 3, 8))
    callbacks = make_callbacks(settings, RunFolder(tmp_path / "run"), data, Clock())
    assert [type(callback).__name__ for callback in callbacks] == BEFORE + scores + AFTER


def test_the_time_left_is_told_by_the_work_of_growing_images(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = {"data.shards": str(shards), "data.resolutions": [4, 8], "data.resolution_fractions": [0.5, 0.5]}
    settings = load_recipe("mae/digits", RECIPES["mae/digits"] | grow)
    index, plan = open_data(settings.data, 0)
    data = ShardDataModule(index, settings.data, settings.encoder, plan, RunPlan(8, 3, 8))
    callbacks = make_callbacks(settings, RunFolder(tmp_path / "run"), data, Clock())
    (log,) = (callback for callback in callbacks if isinstance(callback, RunLog))
    assert log.work(8) > 4 * log.work(4) > 0  # four steps, then four of four times the patches
    monkeypatch.setattr(run_log, "shows_bars", lambda: True)
    RunFolder(tmp_path / "run").path.mkdir()
    RunFolder(tmp_path / "run").metrics.touch()
    log.on_train_start(SimpleNamespace(is_global_zero=True, global_step=0), SimpleNamespace())
    assert log.bar is not None
    assert log.bar.work is log.work
    log.bar.close()


def test_no_state_of_a_callback_asks_other_ranks(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning asks for it on the ranks that it likes: one that waited for the others would wait forever."""
    callbacks = []

    def kept(*given):
        callbacks.extend(make_callbacks(*given))
        return callbacks

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "make_callbacks", kept)
        run(shards, tmp_path / "run", **{"train.steps": 2, "online.train": str(shards), "online.val": str(shards)})

    def refuse(*_, **__) -> None:
        raise AssertionError("a collective")

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda *_: 2)
    for name in COLLECTIVES:
        monkeypatch.setattr(distributed, name, refuse)
    states = {type(callback).__name__: callback.state_dict() for callback in callbacks}
    assert {name for name, state in states.items() if state} == {"Incidents", "Health", "RunLog"}  # nothing unreadable
    (ledger,) = (callback for callback in callbacks if isinstance(callback, Ledger))
    with pytest.raises(AssertionError, match="a collective"):
        ledger.before_checkpoint(None)  # the place for it, on all ranks
