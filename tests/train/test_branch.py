"""A run's checkpoint as the beginning of another run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from run_fixtures import metrics, read_keys, run, run_ranks, same, weights

import sslvit
from sslvit.cli import main

WSD = {"optim.lr_schedule": "wsd", "train.keep_every": 3, "data.ledger": True}


def test_a_branch_cools_down_to_the_very_run_of_that_length(shards: Path, tmp_path: Path) -> None:
    """One long run whose learning rate is constant gives the run of any shorter length."""
    long = run(shards, tmp_path / "long", **WSD | {"train.steps": 20})
    before = {path: path.read_bytes() for path in long.path.rglob("*") if path.is_file()}
    branch = sslvit.branch(long, tmp_path / "short", step=6)
    short = sslvit.resume(branch, **{"train.steps": 8})
    whole = run(shards, tmp_path / "whole", **WSD | {"train.steps": 8})
    assert same(short, whole)
    assert read_keys(short) == read_keys(whole)
    assert {path: path.read_bytes() for path in long.path.rglob("*") if path.is_file()} == before
    assert [line["lr"] for line in metrics(short)[-2:]] == pytest.approx(
        [metrics(short)[5]["lr"], metrics(short)[5]["lr"] * (1 - (0.6 / 1.6) ** 0.5)], rel=1e-6
    )


def test_a_branch_knows_only_the_steps_before_it(shards: Path, tmp_path: Path, capsys) -> None:
    """Also if it gets no further step, so that nothing else cuts what is written of later ones."""
    long = run(shards, tmp_path / "long", **WSD)
    assert main(["branch", str(long.path), "--step", "3", "--out", str(tmp_path / "new")]) == 0
    loss = long.read_metrics()[2]["train/loss"]
    assert f"step 3, loss {loss:.4f}" in capsys.readouterr().out
    branch = sslvit.resume(tmp_path / "new", **{"train.steps": 3})
    assert [line["step"] for line in branch.read_metrics()] == [1, 2, 3]
    assert read_keys(branch) == {0: read_keys(long)[0]}  # an epoch has three steps
    assert not branch.ledger.exists()  # that of the long run counts later samples
    (summary,) = sslvit.runs(branch.path)
    assert (summary.steps, summary.total_steps, summary.loss) == (3, 3, loss)


def test_the_last_checkpoint_is_taken_without_a_step(shards: Path, tmp_path: Path, capsys) -> None:
    long = run(shards, tmp_path / "long", **{"train.steps": 4})
    main(["branch", str(long.path), "--out", str(tmp_path / "new")])
    assert f"resume it with sslvit resume {tmp_path / 'new'}" in capsys.readouterr().out
    longer = sslvit.resume(tmp_path / "new", **{"train.steps": 6})
    assert [line["step"] for line in longer.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert len(long.read_metrics()) == 4


def test_a_damaged_checkpoint_of_another_step_is_not_in_the_way(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = run(shards, tmp_path / "long", **WSD)
    long.checkpoint.with_name("step-00000003.ckpt").write_bytes(b"damaged")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sslvit.branch("~/long", "~/new", step=6).path == tmp_path / "new"


def test_what_cannot_be_branched_is_said_and_nothing_is_left(shards: Path, tmp_path: Path) -> None:
    long = run(shards, tmp_path / "long", **WSD)
    wrong = f"--step 5: {long.path} has no checkpoint of it, only of 3, 6, 7. Take one of these"
    with pytest.raises(ValueError, match=re.escape(wrong.replace("--step 5", "step=5"))):
        sslvit.branch(long, tmp_path / "new", step=5)
    with pytest.raises(ValueError, match="long: already exists. Choose another"):
        sslvit.branch(long, long)
    with pytest.raises(ValueError, match="not a run folder"):
        sslvit.branch(tmp_path, tmp_path / "new")
    content = bytearray(long.checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    long.checkpoint.unlink()  # its other name keeps the whole one
    long.checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="last.ckpt"):
        sslvit.branch(long, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "s"]
    sslvit.branch(long, tmp_path / "new", step=3)  # which is whole


def test_a_run_that_goes_on_meanwhile_gives_no_other_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = run(shards, tmp_path / "long", **WSD)
    replaced = tmp_path / "long" / "checkpoints" / "step-00000003.ckpt"
    copy = shutil.copyfile

    def late(source: Path, target: Path, **options: bool) -> None:
        if Path(source) == replaced:
            copy(long.checkpoint, replaced)
        copy(source, target, **options)

    monkeypatch.setattr("sslvit.train.branch.shutil.copyfile", late)
    with pytest.raises(ValueError, match="step=3: .*long went on and replaced it meanwhile"):
        sslvit.branch(long, tmp_path / "new", step=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_sharded_checkpoint_is_copied_with_its_shards(shards: Path, tmp_path: Path) -> None:
    sharded = {"train.devices": 2, "train.strategy": "fsdp", "data.lanes": 2}
    long = run_ranks(shards, tmp_path / "long", **sharded)
    new = sslvit.branch(long, tmp_path / "new")
    assert not list(new.path.rglob("*.part"))
    found = weights(new)
    assert all(torch.equal(found[key], value) for key, value in weights(long).items())
