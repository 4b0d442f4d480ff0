"""A sweep runs every combination once, goes on where it stopped, and refuses before its first step."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fixtures import TINY, is_timing
from shard_fixtures import labeled_shards

import sslvit
from sslvit import figures
from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.models import ViTEncoder
from sslvit.reports import sweep as sweeping
from sslvit.reports import sweep_folder, sweep_plan
from sslvit.reports.sweep_plan import check_runs, plan_sweep
from sslvit.settings.load import load_recipe
from sslvit.settings.sweep import combinations, format_value, read_values
from sslvit.tasks import task_class
from sslvit.train.folder import RunFolder

TASK = task_class("mae")
SHORT = TINY | {"train.steps": 2, "train.checkpoint_every": 2}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw none, which takes most of their time."""
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path / "shards")


def swept(shards: Path, out: Path, grid: dict[str, list[Any]], **changes: Any) -> Any:
    return sslvit.sweep("mae/digits", shards / "train", out, grid, **SHORT | changes)


def words(shards: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    given = [f"--{key}={format_value(value)}" for key, value in (SHORT | changes).items()]
    return ["sweep", "mae/digits", "--data", str(shards / "train"), "--out", str(out), *given, *more]


# ---- values, combinations, names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("2", [2]), ("2,4", [2, 4]), ("0.1, 1e-3", [0.1, "1e-3"]), ("[0.9,0.95]", [[0.9, 0.95]]),
        ("[0.9,0.95],[0.9,0.999]", [[0.9, 0.95], [0.9, 0.999]]), ("32,[32,64]", [32, [32, 64]]), ("null,3", [None, 3]),
        ("'a,b',c", ["a,b", "c"]), ("{a: 1, b: 2},{a: 3}", [{"a": 1, "b": 2}, {"a": 3}]), ("", [None]),
        ("true,false", [True, False]), ("s/{00..09}.tar", ["s/{00..09}.tar"]), ("a b,c", ["a b", "c"]),
        ("2024-01-01,2024-01-02", ["2024-01-01", "2024-01-02"]), ("!!set {a}", ["!!set {a}"]),
        ("!!binary aGk=", ["!!binary aGk="]),
    ],
)  # fmt: skip
def test_values_are_typed_as_a_yaml_list_without_its_brackets(typed: str, values: list[Any]) -> None:
    assert read_values(typed) == values


@pytest.mark.parametrize(
    "value",
    [2, 0.001, None, True, "cpu", "true", "1", "a,b", [0.9, 0.95], {"a": 1}, "a: b", "1e-3", "2024-01-01", "😀: x"],
)
def test_a_value_is_printed_as_it_is_typed(value: Any) -> None:
    (again,) = read_values(
        format_value(value) if isinstance(value, (list, dict)) else json.dumps(value, ensure_ascii=False)
    )
    assert again == value
    from sslvit.settings.typed import read_value

    assert read_value(format_value(value)) == value


def test_runs_are_named_by_what_differs() -> None:
    found = combinations({"train.steps": [5], "encoder.depth": [2, 4], "optim.betas": [[0.9, 0.95], [0.9, 0.99]]})
    assert list(found) == ["depth=2,betas=0.9-0.95", "depth=2,betas=0.9-0.99", "depth=4,betas=0.9-0.95",
                           "depth=4,betas=0.9-0.99"]  # fmt: skip
    assert found["depth=4,betas=0.9-0.95"] == {"train.steps": 5, "encoder.depth": 4, "optim.betas": [0.9, 0.95]}
    both = combinations({"encoder.depth": [1, 2], "task.depth": [1, 2]})
    assert "encoder.depth=1,task.depth=2" in both  # the last part alone would not tell them apart
    for name in combinations({"data.shards": ["a/b c", "../$x;`y`\n"], "seed": [0, 1]}):
        assert shlex.quote(name) == name
        assert "/" not in name
    signed = combinations({"task.a": [-1, 1], "task.b": [[-1, 0.5], [1.0, 1e30]]})
    assert list(signed) == ["a=-1,b=-1-0.5", "a=-1,b=1-1e+30", "a=1,b=-1-0.5", "a=1,b=1-1e+30"]


def test_values_from_python_are_taken_as_yaml_has_them() -> None:
    found = combinations({"data.shards": [Path("a"), Path("b")], "seed": (np.int64(3), np.float32(0.5)),
                          "optim.betas": [(0.9, 0.95)]})  # fmt: skip
    assert list(found) == ["shards=a,seed=3", "shards=a,seed=0.5", "shards=b,seed=3", "shards=b,seed=0.5"]
    assert json.dumps(found["shards=b,seed=3"]) == '{"data.shards": "b", "seed": 3, "optim.betas": [0.9, 0.95]}'


def test_a_run_is_named_by_the_value_of_its_setting_however_that_is_typed(tmp_path: Path) -> None:
    planned = plan_sweep("mae/digits", None, tmp_path, {"optim.base_lr": ["1e-3", 0.002], "train.epochs": [3, 4.0]})
    assert [run.name for run in planned] == ["base_lr=0.001,epochs=3", "base_lr=0.001,epochs=4",
                                             "base_lr=0.002,epochs=3", "base_lr=0.002,epochs=4"]  # fmt: skip
    with pytest.raises(ValueError, match=r"base_lr=1e-3 and base_lr=0\.001 are the same run"):
        plan_sweep("mae/digits", None, tmp_path, {"optim.base_lr": ["1e-3", 0.001]})


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"encoder.depth": [2]}, "no setting has several values"),
        ({"encoder.depth": [2, 2]}, "encoder.depth: 2 stands there twice"),
        ({"seed": [0, 0]}, "seed: 0 stands there twice"),
        ({"seed": 3}, "seed: expected a list of values, not 3"),
        ({"seed": [0, object()]}, "seed: expected numbers, text"),
        ({"encoder.depth": [], "seed": [0, 1]}, "expected a list of values"),
        ({"encoder.depth": "24", "seed": [0, 1]}, "expected a list of values, not '24'"),
        ({"data.shards": ["a/b", "a-b"]}, "two runs would be called shards=a-b"),
        ({"data.shards": ["a" * 150, "b"], "task.name": ["c" * 150, "d"]}, "too long"),
    ],
)
def test_grids_that_make_no_runs_are_refused(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combinations(grid)


# ---- running -------------------------------------------------------------------------------------------------


def test_every_combination_is_trained_as_pretrain_would(shards: Path, tmp_path: Path) -> None:
    made = swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2], "seed": [0, 3]})
    assert [Path(run.path).name for run in made.found] == ["depth=1,seed=0", "depth=1,seed=3", "depth=2,seed=0",
                                                          "depth=2,seed=3"]  # fmt: skip
    assert {run.state for run in made.found} == {"finished"}
    assert made.failed == {}
    assert made.to_dict()["values"]["depth=2,seed=3"] == {"encoder.depth": 2, "seed": 3}
    alone = sslvit.pretrain(
        "mae/digits", shards / "train", tmp_path / "alone", **SHORT | {"encoder.depth": 2, "seed": 3}
    )
    one, other = (
        [{k: v for k, v in line.items() if not is_timing(k)} for line in folder.read_metrics()]
        for folder in (alone, RunFolder(tmp_path / "sweep" / "depth=2,seed=3"))
    )
    assert one == other
    assert made.figure == tmp_path / "sweep" / "sweep.png"
    assert made.figure.stat().st_size > 1000
    assert str(made.figure) in str(made)
    assert "<td>finished</td>" in made._repr_html_()


def test_a_sweep_goes_on_where_it_stopped(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = TASK.training_step, []

    def stop(self: Any, batch: Any, batch_idx: int = 0) -> Any:
        seen.append((self.trained_encoder.settings.depth, self.global_step))
        if seen[-1] == (2, 3) and seen.count((2, 3)) == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TASK, "training_step", stop)
    grid, more = {"encoder.depth": [1, 2, 3]}, {"train.steps": 4}
    with pytest.raises(KeyboardInterrupt):
        swept(shards, tmp_path / "sweep", grid, **more)
    assert [run.state for run in sslvit.runs(tmp_path / "sweep")] == ["finished", "stopped"]
    before = len(seen)
    made = swept(shards, tmp_path / "sweep", grid, **more)
    assert [run.state for run in made.found] == ["finished"] * 3
    assert seen[before:] == [(2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]  # none of the first, the second's rest


def test_a_run_resumed_by_hand_with_other_settings_is_named(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = {"optim.base_lr": [1e-3, 2e-3], "train.steps": [2]}
    made = swept(shards, tmp_path / "sweep", grid)
    swept(shards, tmp_path / "sweep", grid)
    assert "was resumed with other settings" not in caplog.text
    second = list(made.found)[1].path
    sslvit.resume(second, **{"train.steps": 4, "optim.base_lr": 4e-3})
    swept(shards, tmp_path / "sweep", grid)
    (said,) = [record.getMessage() for record in caplog.records if "resumed with other" in record.getMessage()]
    assert said.startswith(second)
    assert "(optim.base_lr 0.002 -> 0.004; train.steps 2 -> 4)" in said


def test_a_run_that_another_process_has_is_running_and_the_others_run(shards: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "sweep" / "depth=1").held(waits=False):  # before it has written its settings
        made = swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2]})
        assert [run.state for run in sslvit.runs(tmp_path / "sweep")] == ["running", "finished"]
    assert [run.state for run in made.found] == ["running", "finished"]
    assert made.failed == {}


def test_a_run_that_was_never_finite_starts_anew_and_the_others_run(shards: Path, tmp_path: Path) -> None:
    grid = {"optim.base_lr": [1e30, 1e-3]}
    more = {"train.steps": 6, "train.checkpoint_every": 6, "train.skip_limit": 2, "optim.clip_grad": None}
    first, second = tmp_path / "sweep" / "base_lr=1e+30", tmp_path / "sweep" / "base_lr=0.001"
    for _ in range(2):
        made = swept(shards, tmp_path / "sweep", grid, **more)
        assert list(made.failed) == [first.name]
        assert "steps in a row were not finite" in made.failed[first.name]
        assert [run.state for run in made.found] == ["stopped", "finished"]
        shutil.rmtree(second)
    (first / "notes.txt").write_text("")
    assert not RunFolder(first).has_diverged_at_start  # somebody else's file would go


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_run_that_fails_is_named_and_the_others_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, kind: type
) -> None:
    real = sweeping.pretrain

    def fail(settings: Any, **more: Any) -> RunFolder:
        if settings.encoder.depth == 1:
            raise kind("CUDA out of memory")
        return real(settings, **more)

    monkeypatch.setattr(sweeping, "pretrain", fail)
    assert main([*words(shards, tmp_path / "sweep", "--json"), "--encoder.depth=1,2"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"depth=1": "CUDA out of memory"}
    assert [Path(run["path"]).name for run in found["runs"]] == ["depth=2"]
    monkeypatch.setattr(sweeping, "pretrain", real)
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2"]) == 0
    printed = capsys.readouterr().out
    assert "run 2 of 2: depth=2, finished" in printed
    assert "failed" not in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encoder.depth=1,0"], "depth=0: encoder.depth: 0 must be positive"),
        (
            ["--encoder.depth=1,2", "--encoder.dept=3"],
            "depth=1: encoder.dept: no such setting. Did you mean encoder.depth",
        ),
        (["--data.global_batch_size=8,64"], "global_batch_size=64: "),
        (["--data.view.kind=crop,multi_crop"], "kind=multi_crop: data.view.kind: multi_crop is not for mae"),
        (["--encoder.depth=1,2", "--online.train=nowhere", "--online.val=nowhere"], "depth=1: nowhere"),
        (["--encoder.depth=1,2", "--train.devices=2"], "--list prints the commands"),
        (["--encoder.depth=1,2", "--data.shards=x"], "--data.shards: given twice"),
        (["--encoder.depth=1"], "no setting has several values"),
        (["--encoder.depth=2,,4"], "--encoder.depth: '2,,4' is no list of values. Put text"),
        (["--encoder.depth=1,2", "--optim.base_lr=1e-3,0.001"], "are the same run"),
        (["--encoder.depth=1,2", "--init=nowhere"], "depth=1: nowhere: "),
        (["--encoder.depth=1,2", "--list", "--slurm=x.sbatch"], "exclude each other"),
    ],
)
def test_whatever_cannot_run_is_refused_before_the_first_step(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    given = {key: value for key, value in SHORT.items() if not any(word.startswith(f"--{key}=") for word in more)}
    base = ["sweep", "mae/digits", "--data", str(shards / "train"), "--out", str(tmp_path / "sweep")]
    assert main([*base, *(f"--{key}={format_value(value)}" for key, value in given.items()), *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_length_that_each_run_would_choose_itself_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each run would choose a length of its own"):
        swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2]}, **{"train.steps": None, "train.epochs": None})
    with pytest.raises(ValueError, match="this recipe trains with labels"):
        sslvit.sweep("finetune/small_images", shards / "train", tmp_path / "sweep", {"seed": [0, 1]})
    with pytest.raises(ValueError, match="data: a sweep takes shards or a folder"):
        sslvit.sweep("mae/digits", np.zeros((8, 8, 8, 3), np.uint8), tmp_path / "sweep", {"seed": [0, 1]})


def test_a_budget_is_a_length_for_all_runs(shards: Path, tmp_path: Path) -> None:
    changes = SHORT | {"train.steps": None, "train.epochs": None, "train.budget": "10s"}
    grid = {key: [value] for key, value in changes.items()} | {"encoder.depth": [1, 2]}
    assert list(check_runs(plan_sweep("mae/digits", str(shards / "train"), tmp_path, grid))) == ["depth=1", "depth=2"]


def test_an_encoder_that_a_later_run_cannot_start_from_is_refused_first(shards: Path, tmp_path: Path) -> None:
    init = save_encoder(ViTEncoder(load_recipe("mae/digits", SHORT).encoder), tmp_path / "encoder", {})
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_plan, "load_encoder", lambda name: opened.append(name) or load_encoder(name))
        with pytest.raises(ValueError, match=r"width=32: .*another architecture \(there and here width: 16 and 32"):
            swept(shards, tmp_path / "sweep", {"encoder.width": [16, 32]}, init=init)
    assert opened == [str(init)]
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_something_else_and_other_settings_are_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    grid = {"encoder.depth": [1, 2]}
    with pytest.raises(ValueError, match=r"in use, and not by this sweep \(thesis\.tex\)"):
        swept(shards, tmp_path / "mine", grid)
    swept(shards, tmp_path / "sweep", grid)
    with pytest.raises(ValueError, match=r"depth=1: began with other settings \(optim\.weight_decay 0\.05 -> 0\.1\)"):
        swept(shards, tmp_path / "sweep", grid, **{"optim.weight_decay": 0.1})
    mark = tmp_path / "sweep" / "sweep.json"
    content = json.loads(mark.read_text())
    for settings in content["runs"].values():
        del settings["train.budget"], settings["train.timeout_seconds"]
    mark.write_text(json.dumps(content))  # as of a version that did not have them
    with pytest.raises(ValueError, match=r"began with other settings \(train\.timeout_seconds 900 -> 800\.0\)"):
        swept(shards, tmp_path / "sweep", grid, **{"train.timeout_seconds": 800})
    made = swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2, 3]})  # more values are welcome
    assert [run.state for run in made.found] == ["finished"] * 3
    mark.unlink()
    with pytest.raises(ValueError, match=r"depth=1: began with other settings \(optim\.weight_decay 0\.05 -> 0\.1\)"):
        swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2, 3]}, **{"optim.weight_decay": 0.1})
    assert not mark.exists()
    swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2, 3]})
    assert mark.exists()


@pytest.mark.parametrize("content", ["null", "3", '{"runs": []}', '{"runs": {"x": 3}}', "{"])
def test_a_damaged_list_of_runs_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json: damaged\. Delete it"):
        sweep_folder.check_folder(tmp_path, [])


def test_a_later_run_that_cannot_be_read_is_said_before_the_first_starts(shards: Path, tmp_path: Path) -> None:
    later = RunFolder(tmp_path / "sweep" / "depth=2")
    later.path.mkdir(parents=True)
    later.config.write_text("task: {}\nencoder: {}\ndata: {}\ntrain: {}\n")
    later.metrics.write_text('{"step": 1, "train/loss": "x"}\n')
    with pytest.raises(ValueError, match="train/loss: expected a finite number, not 'x'"):
        swept(shards, tmp_path / "sweep", {"encoder.depth": [1, 2]})
    assert not (tmp_path / "sweep" / "depth=1").exists()


def test_two_sweeps_in_one_folder_keep_each_others_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sweep_folder.write_atomically
    monkeypatch.setattr(sweep_folder, "write_atomically", lambda *given: time.sleep(0.2) or real(*given))
    plans = [plan_sweep("mae/digits", None, tmp_path, {"seed": seeds}) for seeds in ([0, 1], [2, 3])]
    threads = [threading.Thread(target=sweep_folder.claim_folder, args=(tmp_path, plan, {})) for plan in plans]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert list(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == ["seed=0", "seed=1", "seed=2", "seed=3"]


# ---- what comes of it ----------------------------------------------------------------------------------------


def panels_of(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> tuple[dict, str]:
    seen = []
    monkeypatch.setattr(
        sweeping, "plot_ranges", lambda path, panels, label, title: seen.append((panels, label)) or path
    )
    make()
    return seen[-1]


def test_the_figure_shows_each_value_over_all_others(shards: Path, tmp_path: Path, monkeypatch) -> None:
    grid = {"encoder.depth": [1, 2], "seed": [0, 3]}
    panels, label = panels_of(monkeypatch, lambda: swept(shards, tmp_path / "sweep", grid))
    losses = {Path(run.path).name: run.loss for run in sslvit.runs(tmp_path / "sweep")}
    assert label == "last loss"
    assert panels["encoder.depth"]["2"] == [losses["depth=2,seed=0"], losses["depth=2,seed=3"]]
    assert panels["seed"]["3"] == [losses["depth=1,seed=3"], losses["depth=2,seed=3"]]
    assert len(set(losses.values())) == 4


def test_labeled_images_score_every_run_and_the_figure(shards: Path, tmp_path: Path, monkeypatch) -> None:
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val")}
    out = tmp_path / "sweep"
    panels, label = panels_of(monkeypatch, lambda: swept(shards, out, {"encoder.depth": [1, 2]}, **online))
    assert label == "linear accuracy (%)"
    found = sslvit.runs(out)
    assert [set(run.scores) for run in found] == [{"linear", "kNN"}] * 2
    assert panels == {"encoder.depth": {"1": [found.found[0].scores["linear"]], "2": [found.found[1].scores["linear"]]}}


def test_the_figure_plots_means_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure) or path)
    figures.plot_ranges(
        tmp_path / "x.png", {"depth": {"2": [1.0, 3.0], "4": [], "8": [5.0]}, "seed": {"0": [2.0]}}, "y"
    )
    first, second = kept[0].axes
    assert first.lines[0].get_xydata().tolist() == [[0, 2], [2, 5]]
    assert [bar.get_segments()[0].tolist() for bar in first.collections[::2]] == [[[0, 1], [0, 3]], [[2, 5], [2, 5]]]
    assert [label.get_text() for label in first.get_xticklabels()] == ["2", "4", "8"]
    assert (first.get_xlabel(), first.get_ylabel(), second.get_xlabel()) == ("depth", "y", "seed")
    assert np.allclose(first.get_ylim(), second.get_ylim())


# ---- elsewhere -----------------------------------------------------------------------------------------------


def test_listed_commands_are_the_runs_of_the_sweep(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2", "--list"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [entry.name for entry in (tmp_path / "sweep").iterdir()] == ["sweep.json"]
    assert len(commands) == 2
    for command in commands:
        first, *rest = shlex.split(command)
        assert first == "sslvit"
        assert main(rest) == 0
    capsys.readouterr()
    (ended,) = (tmp_path / "sweep").glob("*depth=2*")  # as a run that was not finite before its first checkpoint
    for name in ("checkpoints", "encoder"):
        shutil.rmtree(ended / name)
    (ended / "incident").mkdir()
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2", "--list"]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert command.endswith(" --overwrite")
    assert main(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2"]) == 0  # takes them as its own
    assert capsys.readouterr().out.count(", finished") == 2
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2", "--list"]) == 0
    assert capsys.readouterr().out == "# all runs have finished\n"
    script = str(tmp_path / "x.sbatch")
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2", "--slurm", script]) == 1
    assert "all its runs have finished" in capsys.readouterr().err
    assert main([*words(shards, tmp_path / "sweep"), "--encoder.depth=1,2,3", "--slurm", script]) == 0
    assert "#SBATCH --array=0-0\n" in Path(script).read_text()
    capsys.readouterr()
    (tmp_path / "harmless.py").write_text("")
    plugin = ["--plugin", str(tmp_path / "harmless.py")]
    assert main([*words(shards, tmp_path / "other"), "--encoder.depth=1,2", "--list", *plugin]) == 0
    assert all(shlex.join(plugin) in command for command in capsys.readouterr().out.splitlines())


def test_a_script_for_slurm_runs_one_combination_for_each_job(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ["--optim.betas=[0.9,0.95],[0.9,0.999]", "--encoder.depth=1,2"]
    assert main([*words(shards, Path("a sweep"), **{"train.nodes": 2}), *grid, "--slurm", "job.sbatch"]) == 0
    script = (tmp_path / "job.sbatch").read_text()
    for line in ("--array=0-3", "--nodes=2", "--ntasks-per-node=1", "--signal=USR1@180", "--requeue"):
        assert f"\n#SBATCH {line}\n" in script
    assert "--gpus-per-node" not in script  # train.accelerator is cpu
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", 'shift\nexec "$@"'), ("sslvit", 'printf "%s\\n" "$@" > said')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def said(number: str) -> list[str]:
        subprocess.run(["bash", "job.sbatch"], env=env | {"SLURM_ARRAY_TASK_ID": number}, check=True)
        return (tmp_path / "said").read_text().splitlines()

    asked = said("2")
    assert asked[:3] == ["pretrain", "--out", "a sweep/betas=0.9-0.999,depth=1"]
    assert {"--optim.betas=[0.9, 0.999]", "--encoder.depth=1", "--train.steps=2"} <= set(asked)
    assert "--resume" not in asked
    (tmp_path / asked[2] / "checkpoints").mkdir(parents=True)
    (tmp_path / asked[2] / "checkpoints" / "last.ckpt").write_text("")
    assert said("2")[-1] == "--resume"
    (tmp_path / asked[2] / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / asked[2] / "incident").mkdir()
    assert said("2")[-1] == "--overwrite"
    (tmp_path / asked[2] / "checkpoints" / "step-00000002.ckpt").write_text("")
    assert "--overwrite" not in said("2")
    assert subprocess.run(["bash", "job.sbatch"], env=env, capture_output=True, check=False).returncode == 2
    capsys.readouterr()
    for more in ("--train.devices=1,2", "--train.accelerator=cpu,gpu"):
        assert main([*words(shards, Path("b")), more, "--slurm", "b.sbatch"]) == 1
        assert "the jobs of one array are alike" in capsys.readouterr().err
    for way in (["--slurm", "b.sbatch"], ["--list"]):
        assert main([*words(Path("nowhere"), Path("b")), "--encoder.depth=1,2", *way]) == 1
        assert "depth=1: nowhere" in capsys.readouterr().err
    assert not Path("b").exists()


def test_a_name_with_a_line_break_stays_in_its_comment(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words(shards, Path("a\nfalse")), "--encoder.depth=1,2", "--slurm", "b\nfalse.sbatch"]) == 0
    head = Path("b\nfalse.sbatch").read_text().partition("\nset -u\n")[0]
    assert [line for line in head.splitlines() if not line.startswith("#")] == []
