"""A run folder is one process's at a time, a run that has nothing to lose starts again, and damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import zipfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from run_fixtures import TINY, metrics, run, same, weights

import sslvit
from sslvit.cli import main
from sslvit.settings import TrainSettings
from sslvit.settings.load import load_recipe
from sslvit.sharded_checkpoint import check_checkpoint, read_checkpoint, write_checkpoint
from sslvit.stopping import Preempted
from sslvit.tasks import task_class
from sslvit.train import run as run_module
from sslvit.train.checkpoint_io import AtomicCheckpointIO
from sslvit.train.folder import RunFolder, read_lines
from sslvit.weight_files import read_torch_file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped(shards: Path, out: Path, at: int, monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    """A run that ends in the middle of a step."""
    task = task_class("mae")
    step = task.training_step

    def stop(self, batch, batch_idx=0):
        if self.global_step == at:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(task, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(shards, out, **changes)


# ---- one process at a time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_another_process_trains_in_is_left_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict
) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 3})
    before = contents(folder.path)
    monkeypatch.setattr("sslvit.train.folder.WAIT_SECONDS", 0.3)
    with folder.held(waits=False):
        with pytest.raises(ValueError, match="another process is at work there. Wait until it has ended"):
            run(shards, tmp_path / "run", **flags)
        assert contents(folder.path) == before | {".lock": b""}
    assert contents(folder.path) == before


def test_a_run_holds_its_folder_to_the_end_of_its_pictures(shards: Path, tmp_path: Path, monkeypatch) -> None:
    tried = []

    def draw(folder, *_) -> None:
        with pytest.raises(ValueError, match="another process"), RunFolder(folder.path).held(waits=False):
            pass
        tried.append(True)

    monkeypatch.setattr(run_module, "plot_pictures", draw)
    folder = run(shards, tmp_path / "run", **{"train.steps": 2})
    assert tried == [True]
    assert not (folder.path / ".lock").exists()


# ---- nothing to lose ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, resume: bool
) -> None:
    whole = run(shards, tmp_path / "whole")
    stopped(shards, tmp_path / "run", 2, monkeypatch)
    folder = RunFolder(tmp_path / "run")
    assert len(folder.read_metrics()) == 2
    assert not folder.goes_on
    capsys.readouterr()
    assert same(run(shards, tmp_path / "run", resume=resume), whole)
    assert capsys.readouterr().out.count("a run that ended before its first checkpoint; it starts at step 0") == 1


@pytest.mark.parametrize(
    "left", [[], ["config.yaml.77.part"], ["config.yaml"], ["config.yaml", "checkpoints/last.part"]]
)
def test_a_kill_while_the_folder_is_made_blocks_nothing(shards: Path, tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run").mkdir(exist_ok=True)
    assert run(shards, tmp_path / "run", **{"train.steps": 2}).goes_on


@pytest.mark.parametrize(
    "own",
    [
        "notes.txt", "encoder/encoder.json", "incident/incident.json", "figures/loss.png", "checkpoints/best.pt",
        "checkpoints/best.ckpt", "scores.json",
    ],
)  # fmt: skip
def test_what_is_more_than_a_beginning_is_not_taken_for_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    stopped(shards, tmp_path / "run", 2, monkeypatch)
    (tmp_path / "run" / own).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / own).write_text("mine")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="already exists. It has no checkpoint to go on from: pass --overwrite"):
        run(shards, tmp_path / "run")
    with pytest.raises(ValueError, match="has no checkpoint .checkpoints/last.ckpt.. Copy it back, or start anew"):
        run(shards, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "names",
    [["config.yaml"], ["figures/a.png"], ["wandb/run"], ["checkpoints/model.pt"], ["metrics.jsonl"], ["health.json"]],
)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "already exists. It has no checkpoint to go on from"),
        ({"resume": True}, "has no checkpoint .checkpoints/last.ckpt"),
        ({"overwrite": True}, "not a run folder .no config.yaml of a run., so it is left alone"),
    ],
)
def test_files_with_the_names_of_a_runs_are_not_taken_for_one(
    shards: Path, tmp_path: Path, names: list[str], flags: dict, said: str
) -> None:
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("defaults: [model, data]\n")
    before = contents(tmp_path / "mine")
    with pytest.raises(ValueError, match=said):
        run(shards, tmp_path / "mine", **flags)
    assert contents(tmp_path / "mine") == before


def test_a_run_whose_checkpoints_were_deleted_is_no_beginning(shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "_finish", lambda *_: None)
    folder = run(shards, tmp_path / "run")
    folder.checkpoint.unlink()
    with pytest.raises(ValueError, match="already exists"):
        run(shards, tmp_path / "run")
    assert len(folder.read_metrics()) == 7
    folder.checkpoint.parent.rmdir()
    assert len(run(shards, tmp_path / "run", overwrite=True, **{"train.steps": 2}).read_metrics()) == 2


def test_a_first_checkpoint_that_could_not_be_written_leaves_nothing_to_lose(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RuntimeError, match="step 3 could not be written .No space left on device.. There is none"):
            run(shards, tmp_path / "run")
    assert len(RunFolder(tmp_path / "run").read_metrics()) == 3
    assert run(shards, tmp_path / "run").goes_on


def test_what_a_killed_process_was_writing_is_removed_when_its_run_goes_on(shards: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 2})
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = ["config.yaml", "health.json", "figures/loss.png", "encoder/encoder.json"]
    for name in names:
        (folder.path / f"{name}.{dead.pid}.part").write_text("half")
    own = [folder.path / "figures" / name for name in ("film.part", f"views.png.{os.getppid()}.part")]
    for path in own:
        path.write_text("somebody's, or of a process that runs")
    run(shards, folder.path, resume=True, **{"train.steps": 3})
    assert sorted(folder.path.rglob("*.part")) == sorted(own)


def test_overwriting_leaves_files_that_no_run_made(shards: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", **{"train.keep_last": 2})
    own = folder.checkpoint.with_name("best.ckpt")
    own.write_bytes(folder.checkpoint.read_bytes())
    run(shards, tmp_path / "run", overwrite=True, **{"train.steps": 2})
    assert sorted(path.name for path in folder.checkpoint.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    folder.config.write_text("")  # as a full disk once left it
    assert run(shards, tmp_path / "run", overwrite=True, **{"train.steps": 1}).goes_on


def test_a_kept_checkpoint_is_enough_to_go_on_from(shards: Path, tmp_path: Path, capsys) -> None:
    folder = run(shards, tmp_path / "run", **{"train.keep_every": 3})
    folder.checkpoint.unlink()
    whole = metrics(folder)
    assert metrics(run(shards, tmp_path / "run", resume=True, **{"train.keep_every": 3})) == whole
    assert "going on from the checkpoint before it: " in capsys.readouterr().out


def test_the_encoder_of_a_run_that_goes_on_stays_until_a_checkpoint_is_newer(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 3})
    before = contents(folder.encoder)
    seen = []
    task = task_class("mae")
    step = task.training_step

    def look(self, batch, batch_idx=0):
        seen.append((self.global_step, folder.encoder.exists() and contents(folder.encoder) == before))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", look)
    run(shards, tmp_path / "run", resume=True, **{"train.steps": 7})
    assert seen == [(3, True), (4, True), (5, True), (6, False)]  # a checkpoint of step 6
    assert contents(folder.encoder) != before


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_a_start_on_a_full_disk_leaves_the_run_as_it_was(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict
) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 3})
    before = contents(folder.path)

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("sslvit.train.folder.yaml.dump", full)
        with pytest.raises(OSError, match="config.yaml: could not be written .No space left on device.. Make room"):
            run(shards, tmp_path / "run", **flags, **{"train.steps": 6})
    assert contents(folder.path) == before
    assert len(run(shards, tmp_path / "run", **flags, **{"train.steps": 6}).read_metrics()) == 6


def problem_of(path: Path) -> str:
    """What is said of a checkpoint, empty for nothing."""
    try:
        check_checkpoint(path)
    except ValueError as error:
        return str(error)
    return ""


def flip_a_bit(path: Path) -> None:
    """In the middle of a weight."""
    content = bytearray(path.read_bytes())
    weight = read_torch_file(path)["state_dict"]["model.encoder.blocks.0.attn.qkv.weight"].numpy().tobytes()
    content[content.index(weight) + 100] ^= 1
    path.write_bytes(content)


# ---- damage ------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"global_step": 1, "state_dict": {f"w{i}": torch.randn(9) for i in range(20)}}, path)
    whole, source = path.read_bytes(), np.random.default_rng(0)
    check_checkpoint(path)
    ends = range(8 * (len(whole) - 50), 8 * len(whole))  # the checksum itself, and the record before it
    for place in [*source.integers(0, 8 * len(whole), 300), *ends]:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        problem = problem_of(path)
        assert "last.ckpt" in problem, f"bit {place}"
        assert len(problem.splitlines()) == 1
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert problem_of(path), f"cut to {size}"
    path.write_bytes(whole + b"\0")
    assert problem_of(path)


def test_a_checkpoint_with_its_checksum_is_an_ordinary_file_of_torch(tmp_path: Path) -> None:
    path, value = tmp_path / "last.ckpt", torch.arange(5000.0)
    write_checkpoint({"global_step": 1, "x": value}, path)
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, weights_only=True, **options)["x"], value)
    assert zipfile.ZipFile(path).testzip() is None
    torch.save({"x": value}, tmp_path / "other.ckpt")  # without one
    assert torch.equal(read_torch_file(tmp_path / "other.ckpt")["x"], value)
    content = bytearray((tmp_path / "other.ckpt").read_bytes())
    content[content.index(value[9:12].numpy().tobytes())] ^= 1
    (tmp_path / "other.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="other.ckpt: damaged"):
        read_torch_file(tmp_path / "other.ckpt")


def test_a_flipped_bit_in_a_shard_is_noticed(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    manifest = {"global_step": 3, "state_dict": {"w": {"shard": "/w", "shape": [4]}}}
    for rank in (1, 0):
        rows = {"/w": torch.arange(4.0).chunk(2)[rank]}
        AtomicCheckpointIO(TrainSettings()).save_shard(manifest, rows, last, "00000003-a", rank, 2)
    assert not problem_of(last)
    shard = tmp_path / "shards" / "00000003-a" / "rank-00001.pt"
    content = bytearray(shard.read_bytes())
    content[content.index(torch.tensor([2.0, 3.0]).numpy().tobytes())] ^= 1
    shard.write_bytes(content)
    assert "rank-00001.pt: damaged" in problem_of(last)
    with pytest.raises(ValueError, match="rank-00001.pt: damaged"):
        read_checkpoint(last)


def test_a_resume_takes_the_newest_checkpoint_that_is_whole(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    keep = {"train.keep_last": 2}
    whole = run(shards, tmp_path / "whole", **keep)
    stopped(shards, tmp_path / "cut", 6, monkeypatch, **keep, **{"train.checkpoint_every": 2})
    flip_a_bit(RunFolder(tmp_path / "cut").checkpoint)  # and step-00000006.ckpt with it, which is the same file
    capsys.readouterr()
    again = run(shards, tmp_path / "cut", resume=True, **keep)
    said = capsys.readouterr().out
    assert "last.ckpt: damaged: its bytes are not those that were written" in said
    assert "going on from the checkpoint before it: " in said
    assert "step-00000004.ckpt" in said
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
    assert metrics(again) == metrics(whole)


def test_without_a_whole_checkpoint_a_resume_says_what_is_left_to_do(shards: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 2})
    flip_a_bit(folder.checkpoint)
    with pytest.raises(ValueError, match=r"last.ckpt: damaged.* No other checkpoint is kept there \(train.keep_last"):
        run(shards, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="last.ckpt: damaged"):
        sslvit.load_encoder(folder.checkpoint)
    assert (folder.encoder / "encoder.json").exists()


def test_checkpoints_that_are_deleted_meanwhile_are_said_and_written_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import shutil

    task = task_class("mae")
    step = task.training_step

    def delete(self, batch, batch_idx=0):
        if self.global_step == 4:
            shutil.rmtree(tmp_path / "run" / "checkpoints")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", delete)
    folder = run(shards, tmp_path / "run")
    assert folder.checkpoint.exists()
    assert "last.ckpt: the checkpoint before was deleted meanwhile; a new one is written" in capsys.readouterr().out


def test_damaged_lines_of_a_runs_files_are_passed_over_and_said(shards: Path, tmp_path: Path, capsys) -> None:
    options = {"data.ledger": True, "train.checkpoint_every": 2}
    folder = run(shards, tmp_path / "run", **options, **{"train.steps": 4})
    for path in (folder.metrics, folder.samples / "rank-00000.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[1] = b'{"step": \xff\n'
        lines.insert(0, b"[1]\n")
        path.write_bytes(b"".join(lines) + b'{"step": 9, "ha')
    longer = run(shards, tmp_path / "run", resume=True, **options, **{"train.steps": 6})
    said = capsys.readouterr().out
    assert "metrics.jsonl: line 1 and 1 more damaged and passed over" in said
    assert "rank-00000.jsonl: line 1 and 1 more damaged and passed over" in said
    assert [line["step"] for line in longer.read_metrics()] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no settings"), ("[1]", "holds no settings"), ("a: [", "not the settings of a run .while parsing"),
        ("\x00", "not the settings of a run .unacceptable"), ("a: " + "[" * 5000, "not the settings of a run .maximum"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_named(tmp_path: Path, text: str, said: str) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(ValueError, match=f"config.yaml: {said}") as error:
        folder.read_config()
    assert "\n" not in str(error.value)


def test_lines_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": "x"}\n{"step": 2}\n{"step": 3}')
    assert [line["step"] for _, line in read_lines(tmp_path / "a.jsonl")] == [1, 2]


# ---- going on by itself ------------------------------------------------------------------------------------------


def test_a_run_goes_on_by_its_folder_alone(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole = run(shards, tmp_path / "whole", **{"train.steps": 9})
    stopped(shards, tmp_path / "cut", 5, monkeypatch, **{"train.steps": 7})
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert main(["resume", str(tmp_path / "moved"), "--train.steps", "9"]) == 0
    assert "resuming with changes: train.steps 7 -> 9; out" in capsys.readouterr().out
    moved = RunFolder(tmp_path / "moved")
    assert [line["step"] for line in moved.read_metrics()] == list(range(1, 10))
    assert weights(moved).keys() == weights(whole).keys()
    assert sslvit.resume(tmp_path / "moved").path == moved.path  # nothing left to do, and nothing lost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "seed was 0 and cannot become 5, since masks"),
        ({"optim.betas": [0.5, 0.9]}, "optim.betas was .* cannot become .*averages in the checkpoint"),
        ({"encoder.depth": 2}, "another architecture"),
        (
            {"data.global_batch_size": 4},
            "data.global_batch_size was 8 and cannot become 4, since the order of the data",
        ),
        ({"task.decoder_heads": 4}, "task.decoder_heads was 2 and cannot become 4, since it cuts the decoder's"),
        (
            {"task.target": "normalized"},
            "task.target was raw and cannot become normalized, since the decoder",
        ),
        ({"encoder.mean": [0.5]}, "encoder.mean was .* cannot become .* since the weights were trained on images"),
        ({"seed": 1, "optim.betas": [0.5, 0.9]}, "seed was 0 .*; optim.betas was .* Restore them"),
        ({"train.epochs": 9, "train.steps": 3}, "train.epochs 9.* would change nothing, since train.steps .3. decides"),
        ({"out": "elsewhere"}, "out=: a run that goes on keeps its folder"),
        ({"init": "other"}, "init=: a run that goes on keeps its folder and its start"),
        ({"train.stepps": 9}, "train.stepps: no such setting. Did you mean train.steps"),
    ],
)
def test_what_a_run_cannot_become_is_refused_and_nothing_is_changed(
    shards: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 3})
    before = contents(folder.path)
    with pytest.raises(ValueError, match=message):
        sslvit.resume(folder.path, **changes if "train.steps" in changes else {"train.steps": 6} | changes)
    assert contents(folder.path) == before


def test_a_finished_run_does_not_record_what_no_step_has_felt(shards: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 3})
    before = contents(folder.path)
    for changes in ({"optim.base_lr": 0.5}, {"task.mask_ratio": 0.8}, {"data.view.flip": 0.3}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} .* would change nothing, since all 3 steps are"):
            sslvit.resume(folder, **changes)
    assert contents(folder.path) == before
    assert sslvit.resume(folder, **{"train.log_every": 5}).read_config()["train"]["log_every"] == 5
    assert sslvit.resume(folder, **{"optim.base_lr": 0.5, "train.steps": 4}).read_config()["optim"]["base_lr"] == 0.5


def test_a_run_keeps_the_encoder_that_it_started_from(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also one that is killed before its first checkpoint, and starts again."""
    first = str(run(shards, tmp_path / "first", **{"train.steps": 2}).path)
    whole = run(shards, tmp_path / "whole", init=first)
    stopped(shards, tmp_path / "cut", 2, monkeypatch, init=first)
    assert same(sslvit.resume(tmp_path / "cut"), whole)
    again = RunFolder(tmp_path / "cut")
    assert again.read_config()["init"] == first
    run(shards, again.path, resume=True, **{"train.steps": 8})  # the recipe names no start
    assert again.read_config()["init"] == first
    with pytest.raises(
        ValueError, match="this run started from .*first, and goes on from its checkpoint, not from .*whole"
    ):
        run(shards, again.path, resume=True, init=str(whole.path), **{"train.steps": 9})


def test_a_fine_tuning_goes_on_by_its_folder_alone(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    start = str(run(shards, tmp_path / "start", **{"train.steps": 2}).path)
    words = ["finetune", start, "--train", str(shards), "--val", str(shards), "--out", str(tmp_path / "tuned"),
             "--task.allow_same_data", "true"]  # fmt: skip
    words += [word for key, value in TINY.items() if not key.startswith(("encoder", "task", "data.view"))
              for word in (f"--{key}", json.dumps(value))]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(task_class("supervised"), "on_train_end", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(run_module, "_finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        main(words)
    (tmp_path / "start").rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "tuned"), "--train.steps", "9"]) == 0
    assert "top-1 accuracy" in capsys.readouterr().out
    scores = json.loads(RunFolder(tmp_path / "tuned").scores.read_text())
    assert (scores["step"], scores["init"]) == (9, start)


def test_only_a_run_folder_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder .no config.yaml.. Give what was given as out=."):
        sslvit.resume(tmp_path)


# ---- told to stop before the first step --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", ["open_run_data", "make_trainer"])
def test_a_signal_before_the_first_step_ends_with_try_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: signal.Signals, place: str
) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "pretrain")
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    words = ["pretrain", "--config", "mae/digits", "--data", str(shards), "--out", str(tmp_path / "run")]
    words += [word for key, value in TINY.items() for word in (f"--{key}", json.dumps(value))]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, place, lambda *_: os.kill(os.getpid(), number))
        assert main(words) == 75
    said = capsys.readouterr().err
    assert f"sslvit: received {number.name} before the first step, so there is nothing to save yet" in said
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert main(words) == 0  # the same command again


def test_a_signal_while_modules_are_imported_is_heard(tmp_path: Path, monkeypatch, capsys) -> None:
    def stop(options) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("sslvit.cli.read_command", lambda arguments: (stop, SimpleNamespace(quiet=False, plugin=None)))
    assert main(["shards", "info", str(tmp_path)]) == 75
    assert "sslvit: received SIGTERM: give the same command again" in capsys.readouterr().err


def test_a_signal_while_figures_are_drawn_says_that_all_is_kept(shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "plot_pictures", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(
        Preempted, match="received SIGTERM after the last step, which is kept: sslvit resume .*run draws the figures"
    ):
        run(shards, tmp_path / "run", **{"train.steps": 2})
    assert RunFolder(tmp_path / "run").goes_on


def test_ctrl_c_while_figures_are_drawn_says_how_to_draw_them(shards: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "plot_pictures", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        said = "interrupted after the last step, which is kept: sslvit resume .*run draws the figures"
        with pytest.raises(KeyboardInterrupt, match=said):
            run(shards, tmp_path / "run", **{"train.steps": 2})
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert (RunFolder(tmp_path / "run").figures / "loss.png").exists()


# ---- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger/rank-00000.jsonl", "health.json", "ledger.json"])
def test_a_full_disk_names_the_file_that_it_did_not_take(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str
) -> None:
    full, opened, write_bytes = tmp_path / "run" / name, open, Path.write_bytes

    def refuse(path) -> None:
        if str(path).startswith(str(full)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of the system, it names no file

    def open_or_refuse(path, *given, **named):
        refuse(path)
        return opened(path, *given, **named)

    def write_or_refuse(path, content) -> int:
        refuse(path)
        return write_bytes(path, content)

    monkeypatch.setattr("sslvit.train.folder.open", open_or_refuse, raising=False)
    monkeypatch.setattr(Path, "write_bytes", write_or_refuse)
    words = ["pretrain", "--config", "mae/digits", "--data", str(shards), "--out", str(tmp_path / "run")]
    words += [word for key, value in TINY.items() for word in (f"--{key}", json.dumps(value))]
    assert main([*words, "--data.ledger", "true", "--train.steps", "2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"sslvit: error: {full}: could not be written (No space left on device). Make room")
    assert said.count("\n") == 1


def test_the_settings_name_each_process_that_ran(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/sslvit", "pretrain", "--config", "mae/digits"])
    folder = run(shards, tmp_path / "run")
    (made,) = yaml.safe_load(folder.config.read_text())["made_by"]
    assert made["command"] == "sslvit pretrain --config mae/digits"
    assert made["host"] == platform.node()
    assert made["versions"].keys() >= {"sslvit", "python", "torch", "pytorch-lightning"}
    assert made["commits"].keys() == {"sslvit", "working_directory"}
    assert abs(datetime.fromisoformat(made["date"]) - datetime.now().astimezone()).total_seconds() < 600
    assert "made_by" not in folder.read_config()
    again = load_recipe(folder.config, {"out": str(tmp_path / "again")})  # a run's settings are a recipe
    assert again.train.steps == 7
    sslvit.resume(folder, **{"train.steps": 9})
    kept = yaml.safe_load(folder.config.read_text())["made_by"]
    assert len(kept) == 2
    assert kept[0] == made
    described = json.loads((folder.encoder / "encoder.json").read_text())["provenance"]
    assert "made_by" not in described["settings"]  # a host's name is nothing for those who get the encoder
