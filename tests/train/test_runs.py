"""Runs are listed from their own files: how far each is, what came of it, and which folder is damaged."""

from __future__ import annotations

import csv
import json
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
