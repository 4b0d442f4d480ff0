"""Runs are listed from their own files: how far each is, what came of it, and which folder is damaged."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from run_fixtures import run
from shard_fixtures import labeled_shards
from test_run_folder import stopped

import sslvit
from sslvit.cli import main
from sslvit.train.folder import RunFolder


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw none, which takes most of their time."""
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)


@pytest.fixture
def folder(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of two epochs that was scored, and one that stopped behind its checkpoint at step 3."""
    labeled = labeled_shards(tmp_path / "labeled")
    online = {"online.train": str(labeled / "train"), "online.val": str(labeled / "val")}
    run(shards, tmp_path / "runs" / "whole", **{"train.steps": None, "train.epochs": 2.0} | online)
    stopped(shards, tmp_path / "runs" / "deep" / "cut", 4, monkeypatch)
    return tmp_path / "runs"


def test_a_list_says_how_far_each_run_is_and_what_came_of_it(folder: Path, shards: Path) -> None:
    cut, whole = sslvit.runs(folder)
    assert (cut.path, cut.state, cut.steps, cut.total_steps) == (str(folder / "deep" / "cut"), "stopped", 4, 7)
    assert (whole.path, whole.state, whole.steps, whole.total_steps) == (str(folder / "whole"), "finished", 6, 6)
    last = RunFolder(folder / "whole").read_metrics()[-1]
    assert whole.loss == last["train/loss"]
    assert whole.scores == {"linear": last["probe/linear"], "kNN": last["probe/knn"]}
    assert (whole.task, whole.data, whole.width, whole.depth) == ("mae", str(shards), 16, 1)
    assert whole.hours == pytest.approx(last["time/elapsed"] / 3600)
    assert whole.health == json.loads((folder / "whole" / "health.json").read_text())["verdict"]
    assert cut.scores == {}


def test_a_loss_that_went_far_off_takes_few_digits_everywhere(folder: Path) -> None:
    metrics = folder / "whole" / "metrics.jsonl"
    *lines, last = metrics.read_text().splitlines()
    last = json.dumps(json.loads(last) | {"train/loss": 2.146e23})
    metrics.write_text("\n".join([*lines, last]) + "\n")
    page = sslvit.report(folder / "whole").path
    for text in (str(sslvit.runs(folder / "whole")), str(RunFolder(folder / "whole")), Path(page).read_text()):
        assert "2.1e+23" in text
        assert "214600" not in text


def test_a_run_that_is_to_go_further_is_not_finished(folder: Path) -> None:
    config = folder / "whole" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["train"]["epochs"] = 3.0
    config.write_text(yaml.dump(content))
    (whole,) = sslvit.runs(folder / "whole")
    assert (whole.state, whole.steps, whole.total_steps) == ("stopped", 6, 9)
    content["train"]["epochs"] = 2.0
    config.write_text(yaml.dump(content))
    shutil.rmtree(folder / "whole" / "encoder")  # the last thing that a run writes
    assert sslvit.runs(folder / "whole").found[0].state == "stopped"


def test_the_accuracy_is_that_of_the_last_scored_step(folder: Path) -> None:
    """scores.json is written at a run's end; a run that was made longer has scored later steps since."""
    whole = folder / "whole"
    for step, expected in ((4, 80.0), (6, 50.0)):
        (whole / "scores.json").write_text(json.dumps({"top1": 50.0, "step": step}))
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        lines[-1] |= {"step": 6, "val/top1": 80.0}
        (whole / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert sslvit.runs(whole).found[0].scores["top-1"] == expected


def test_a_run_is_running_while_a_process_has_its_folder(folder: Path) -> None:
    lock = folder / "whole" / ".lock"
    lock.write_text("")  # what kill -9 leaves behind
    assert [one.state for one in sslvit.runs(folder)] == ["stopped", "finished"]
    lock.unlink()
    with RunFolder(folder / "whole").held(waits=False):
        assert [one.state for one in sslvit.runs(folder)] == ["stopped", "running"]
        with pytest.raises(ValueError, match="another process"), RunFolder(folder / "whole").held(waits=False):
            pass  # looking has not opened it
    assert [one.state for one in sslvit.runs([folder / "deep", folder])] == ["stopped", "finished"]


def test_a_damaged_run_is_named_and_the_others_are_listed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "whole" / "config.yaml").write_text("task: [")
    other = folder / "not a run"
    other.mkdir()
    (other / "config.yaml").write_text("name: something else")
    assert main(["runs", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"damaged: {folder / 'whole'}: " in printed
    assert "not the settings of a run" in printed
    assert "not a run" not in printed
    assert "4 of 7" in printed
    (folder / "deep" / "cut" / "config.yaml").write_text("task: 1\nencoder: 2\ndata: 3\ntrain: 4")
    found = sslvit.runs(folder)
    assert len(found.damaged) + len(found) == 2


def test_the_command_prints_the_table_as_text_json_and_csv(folder: Path, capsys: pytest.CaptureFixture) -> None:
    table = folder.parent / "runs.csv"
    assert main(["runs", str(folder), "--csv", str(table)]) == 0
    found = sslvit.runs(folder)
    assert capsys.readouterr().out == f"{found}\n"
    assert "<td>finished</td>" in found._repr_html_()
    assert main(["runs", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.to_dict()
    lines = list(csv.DictReader(table.open()))
    assert [line["state"] for line in lines] == ["stopped", "finished"]
    assert (float(lines[1]["linear"]), lines[0]["linear"]) == (found.found[1].scores["linear"], "")
    assert main(["runs", str(folder), "--csv", str(table)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_folders_without_runs_and_missing_ones_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err


def made_up(path: Path, metrics: dict | str, **sections: dict) -> Path:
    """The files of a run, as far as a list looks at them."""
    path.mkdir(parents=True)
    config = {"task": {"name": "mae"}, "encoder": {"width": 16, "depth": 1}, "data": {}, "train": {"epochs": 2.0}}
    (path / "config.yaml").write_text(yaml.dump(config | sections))
    (path / "metrics.jsonl").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics) + "\n")
    return path


@pytest.mark.parametrize(
    ("metrics", "sections", "message"),
    [
        ({"train/loss": "nan"}, {}, "metrics.jsonl: train/loss: expected a finite number, not 'nan'"),
        ({"probe/linear": "x"}, {}, "metrics.jsonl: probe/linear: expected a finite number, not 'x'"),
        ({"train/loss": 10**400}, {}, "metrics.jsonl: train/loss: expected a finite number, not 10000"),
        ({"step": 10**400}, {}, "metrics.jsonl: step: expected a finite number"),
        ({"time/elapsed": [1]}, {}, "metrics.jsonl: time/elapsed: expected a finite number, not [1]"),
        ({}, {"encoder": {"width": "16"}}, "config.yaml: encoder.width: expected a finite number, not '16'"),
        ({}, {"encoder": {"width": [16]}}, "config.yaml: encoder.width: expected a finite number, not [16]"),
        ({"epoch": 1.0}, {"train": {"epochs": float("inf")}}, "config.yaml: train.epochs: expected a finite number"),
        ({}, {"train": {"steps": float("inf")}}, "config.yaml: train.steps: expected a finite number, not inf"),
        ({}, {"data": {"shards": [3]}}, "config.yaml: data.shards: expected text, not [3]"),
    ],
)
def test_a_damaged_value_is_named_and_the_other_runs_are_listed(
    tmp_path: Path, metrics: dict, sections: dict, message: str
) -> None:
    damaged = made_up(tmp_path / "damaged", {"step": 4} | metrics, **sections)
    made_up(tmp_path / "whole", {"step": 4, "epoch": 1.0, "train/loss": None})
    found = sslvit.runs(tmp_path)
    assert [(run.path, run.total_steps) for run in found] == [(str(tmp_path / "whole"), 8)]
    assert found.damaged[str(damaged)].startswith(f"{damaged}/{message}")
    assert "not finite" in str(found)


def test_a_run_whose_epoch_is_not_known_is_listed(tmp_path: Path) -> None:
    for number, epoch in enumerate((None, 0, 1e-320)):
        made_up(tmp_path / str(number), {"step": 4, "epoch": epoch})
    assert [run.total_steps for run in sslvit.runs(tmp_path)] == [None] * 3


def test_links_are_followed_and_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(tmp_path / "elsewhere" / "a", {"step": 4})
    made_up(tmp_path / "runs" / "b", {"step": 4})
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = sslvit.runs(tmp_path / "runs")
    assert [Path(run.path).name for run in found] == ["again", "linked"]
    closed = tmp_path / "runs" / "closed"
    assert found.damaged == {str(closed): f"{closed}: permission denied. Check its permissions."}


def test_metrics_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"step": 1, "probe/linear": 10.0}, {"step": 2, "probe/linear": 20.0, "probe/knn": 5.0}, {"step": 3}]
    made_up(tmp_path / "run", "".join(json.dumps(line) + "\n" for line in lines) + "damaged\n")
    (run,) = sslvit.runs(tmp_path)
    assert (run.steps, run.scores) == (3, {"linear": 20.0, "kNN": 5.0})
    assert [record.message for record in caplog.records if "damaged" in record.message] == [
        f"{tmp_path / 'run' / 'metrics.jsonl'}: line 4 damaged and passed over"
    ]
