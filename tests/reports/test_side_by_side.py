"""Runs at the same time: their own processes, their lines by name, and one that fails ends the others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import TINY
from shard_fixtures import labeled_shards

from sslvit.checkpoint import fingerprint, load_encoder
from sslvit.reports import side_by_side
from sslvit.reports.side_by_side import pretrain_side_by_side


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path / "shards") / "train"


def test_each_run_is_what_it_is_alone_and_its_lines_have_its_name(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = TINY | {"data.shards": str(shards), "train.steps": 2}
    runs = {f"seed {seed}": ("mae/digits", changes | {"out": str(tmp_path / str(seed)), "seed": seed})
            for seed in range(3)}  # fmt: skip
    pretrain_side_by_side(runs)
    said = capsys.readouterr().out
    for number in range(3):
        assert json.loads((tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
        assert f"seed {number}: step 2/2" in said
    alone = "mae/digits", changes | {"out": str(tmp_path / "alone"), "seed": 1}
    pretrain_side_by_side({"alone": alone})
    assert fingerprint(load_encoder(tmp_path / "alone")) == fingerprint(load_encoder(tmp_path / "1"))
    assert fingerprint(load_encoder(tmp_path / "alone")) != fingerprint(load_encoder(tmp_path / "0"))


def test_one_that_fails_ends_the_others(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "cpu_cores", lambda: 2)
    long = TINY | {"data.shards": str(shards), "train.steps": 1_000_000, "out": str(tmp_path / "long")}
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^wrong: its run failed \(1\): .*none: no such file"):
        pretrain_side_by_side(
            {"long": ("mae/digits", long), "wrong": ("none", {}), "later": ("mae/digits", long | {"out": "later"})}
        )
    assert time.monotonic() - start < 120
    assert not Path("later").exists()


def test_a_run_has_the_plugins_of_this_process_and_is_no_job_of_slurms(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Started(Exception):
        pass

    def note(words: list[str], **options: Any) -> None:
        started.append((words, options["env"]))
        raise Started

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(side_by_side, "named_modules", lambda: ["my_tasks", "more"])
    monkeypatch.setattr(side_by_side.subprocess, "Popen", note)
    with pytest.raises(Started):
        pretrain_side_by_side({"one": ("mae/digits", {"train.steps": 2})})
    ((words, environment),) = started
    assert words[words.index("--plugin") + 1] == "my_tasks,more"
    assert "--train.requeue=false" in words
    assert not [key for key in environment if key.startswith("SLURM_")]
    assert environment["OMP_NUM_THREADS"] == "1"
