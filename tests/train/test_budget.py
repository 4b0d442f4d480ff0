"""`train.budget`: as many steps as end in a given time on this machine."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_fixtures import TINY, run

import sslvit
from sslvit import progress
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.settings.load import load_recipe
from sslvit.settings.run import TrainSettings, read_duration
from sslvit.stopping import Preempted
from sslvit.train import timed_steps
from sslvit.train.callbacks.scoring import OnlineProbe, Validation
from sslvit.train.timed_steps import TimedSteps

SHORT = {key: value for key, value in TINY.items() if key != "train.steps"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("60min", 3600), ("8h", 28800), ("1h30min", 5400), ("2d 1h", 176400), ("1.5 H", 5400)],
)
def test_a_time_is_read_in_words(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "60", "min", "0s", "-5min", "1h 5", "60min8h", "1e3s", "9" * 400 + "h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.budget: .* is no time\. Give it as 90s, 60min, 8h or 1h30min\."):
        TrainSettings(budget=text)


def test_the_length_that_is_given_last_wins() -> None:
    def lengths(**changes: object) -> tuple:
        train = load_recipe("mae/digits", {f"train.{key}": value for key, value in changes.items()}).train
        return train.steps, train.budget

    assert lengths(steps=5, budget="1h") == (None, "1h")
    assert lengths(budget="1h", steps=5) == (5, None)
    assert lengths(budget="1h", epochs=5) == (None, None)


def test_the_budget_over_the_time_of_a_step_is_the_number_of_steps(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def timed(settings, run, steps: int, log_every: int = 1) -> TimedSteps:
        asked.append((run.global_batch_size, steps, log_every))
        return TimedSteps(steps, run.global_batch_size, 0.5, None, 0, "cpu")

    monkeypatch.setattr(timed_steps, "time_steps", timed)
    folder = run(shards, tmp_path / "run", **SHORT | {"train.budget": "4s", "train.log_every": 3})
    assert asked == [(8, 2, 1), (8, timed_steps.FEWEST, 3)]
    assert [line["step"] for line in folder.read_metrics()][-1] == 8
    said = capsys.readouterr().out
    assert f"train.steps 8 (0.5 s per step, the mean of {timed_steps.FEWEST})" in said
    assert "8 steps took " in said
    config = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert (config["train"]["steps"], config["train"]["budget"]) == (8, "4s")
    again = run(shards, tmp_path / "again", **SHORT | {"train.steps": 8, "train.log_every": 3})
    assert again.read_metrics()[-1]["train/loss"] == folder.read_metrics()[-1]["train/loss"]  # timing leaves no trace


@pytest.mark.parametrize(
    ("every", "seconds", "steps"), [(None, 10, 18), (4, 10, 12), (4, 11, 14), (40, 10, 18), (4, 0.1, 1)]
)
def test_a_budget_includes_the_scores(every: int | None, seconds: float, steps: int) -> None:
    """A step takes half a second, a score one; the last step has one, too."""
    assert TimedSteps(8, 8, 0.5, None, 0, "cpu", 1.0).steps_within(seconds, every) == steps
    if steps > 1:
        assert seconds - 1.5 < steps * 0.5 + math.ceil(steps / (every or steps)) * 1.0 <= seconds


@pytest.mark.parametrize(
    ("recipe", "kind", "changes", "every"),
    [
        ("mae/digits", OnlineProbe, {"online.train": "train", "online.val": "val", "online.every": 4}, 6),
        ("finetune/small_images", Validation, {"task.val": "val"}, None),
        ("finetune/small_images", Validation, {"task.val": "val", "task.validate_every": 1}, 3),
    ],
)
def test_one_score_is_computed_for_a_budget_and_not_counted_as_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, kind: type, changes: dict, every: int | None
) -> None:
    for seed, name in enumerate(("train", "val")):
        images = np.random.default_rng(seed).integers(0, 255, (40, 8, 8), np.uint8)
        pack(array_samples(images, np.arange(40) % 2), tmp_path / name, ["dark", "light"])
    scored, scores = [], kind.scores

    def slow(self, trainer, module):
        scored.append(self.step)
        time.sleep(1.0)
        return scores(self, trainer, module)

    monkeypatch.setattr(kind, "scores", slow)
    changes = {key: str(tmp_path / value) if isinstance(value, str) else value for key, value in changes.items()}
    short = {key: value for key, value in SHORT.items() if recipe.startswith("mae/") or not key.startswith("task.")}
    changes = short | changes | {"data.shards": str(tmp_path / "train"), "out": str(tmp_path / "run")}
    settings = load_recipe(recipe, changes | {"train.budget": "4s", "train.log_every": 3, "encoder.channels": 1})
    train, timed = timed_steps.fit_budget(settings, 40, 2, 5, 8)
    assert scored == [timed_steps.LEFT_OUT + timed_steps.FEWEST + 1]
    assert timed.seconds_per_step < 1.0 < timed.seconds_per_score + timed.seconds_per_step
    assert train.steps == timed.steps_within(4.0, every)
    assert timed.pace_text().endswith(f"; {timed.seconds_per_score:.3g} s per score")


def test_a_resume_keeps_the_length_and_takes_no_other_budget(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_steps, "time_steps", lambda *_: TimedSteps(8, 8, 1.0, None, 0, "cpu"))
    changes = SHORT | {"train.budget": "6s"}
    folder = run(shards, tmp_path / "run", **changes)
    monkeypatch.setattr(timed_steps, "time_steps", None)
    run(shards, tmp_path / "run", resume=True, **changes)
    with pytest.raises(ValueError, match=r"train\.budget 9s: the schedules of this run go over 6 steps\. Leave the"):
        run(shards, tmp_path / "run", resume=True, **changes | {"train.budget": "9s"})
    longer = sslvit.resume(folder.path, **{"train.steps": 8})
    assert longer.read_metrics()[-1]["step"] == 8


def test_steps_are_timed_without_the_first_and_the_last_and_leave_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([10.0, 20.0, 21.0, 22.5, 23.0, 93.0])
    monkeypatch.setattr(timed_steps, "perf_counter", lambda: next(moments))
    settings = load_recipe("mae/digits", TINY | {"data.shards": str(shards), "out": str(tmp_path / "run")})
    found = timed_steps.time_steps(settings, sslvit.RunPlan(1, 1, 8), 3)
    assert (found.steps, found.batch, found.device) == (3, 8, "cpu")
    assert found.seconds_per_step == 1
    assert found.images_per_second == 8
    assert 0 <= found.waiting <= 1
    assert not (tmp_path / "run").exists()


def test_a_signal_while_steps_are_timed_names_no_folder_that_is_gone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = iter([signal.SIGTERM])
    monkeypatch.setattr(timed_steps, "perf_counter", lambda: [os.kill(os.getpid(), one) for one in signals])
    with pytest.raises(Preempted, match="^stopped while steps were timed, before the first one of a run"):
        run(shards, tmp_path / "run", **SHORT | {"train.budget": "4s"})
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_timed_steps_say_how_far_they_are_and_nothing_else(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "MIN_INTERVAL_SECONDS", 0.01)
    settings = load_recipe("mae/digits", TINY | {"data.shards": str(shards), "out": str(tmp_path / "run")})
    logging.getLogger("sslvit").addHandler(caplog.handler)
    try:
        timed_steps.time_steps(settings, sslvit.RunPlan(1, 1, 8), 6)
    finally:
        logging.getLogger("sslvit").removeHandler(caplog.handler)
    first, *others = [record.getMessage() for record in caplog.records]
    assert first == "timing 6 steps of 8 images"
    assert any(re.match(r"timing steps: \d+ of 9 steps", text) for text in others)
    assert all(text.startswith(("timing steps: ", "decoding: ")) for text in others), others


def test_steps_that_are_not_finite_are_timed_too(shards: Path, tmp_path: Path) -> None:
    changes = TINY | {"data.shards": str(shards), "out": str(tmp_path / "run"), "train.skip_limit": 1}
    settings = load_recipe("mae/digits", changes | {"optim.base_lr": 1e30, "task.target": "raw"})
    assert timed_steps.time_steps(settings, sslvit.RunPlan(1, 1, 8), 6).seconds_per_step > 0


def test_a_plan_times_the_steps_too_and_needs_images_for_it(shards: Path) -> None:
    plan = sslvit.plan("mae/digits", shards, **SHORT | {"train.budget": "2s"})
    steps = plan.forecast.run.total_steps
    assert steps == round(2 / plan.measured.seconds_per_step)
    assert plan.paces[0].seconds == pytest.approx(2, abs=plan.measured.seconds_per_step / 2)  # whole steps
    assert f"train.steps {steps:,}: 2s at " in plan.text()
    assert json.loads(json.dumps(plan.to_dict()))["measured"]["steps"] >= timed_steps.FEWEST
    with pytest.raises(ValueError, match=r"train\.budget: steps are timed on images and on this machine"):
        sslvit.plan("mae/digits", images=100, **SHORT | {"train.budget": "2s"})
    with pytest.raises(ValueError, match=r"train\.budget: steps are timed in one process, and this run has 2\."):
        sslvit.plan("mae/digits", shards, **SHORT | {"train.budget": "2s", "train.devices": 2})
