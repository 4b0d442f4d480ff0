"""Processes that torchrun or srun has started are one run, and its devices and nodes are theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_fixtures import command, run, run_ranks, same

from sslvit.api import resume
from sslvit.commands.options import Resumable
from sslvit.commands.training import report_run
from sslvit.settings import TrainSettings
from sslvit.train.folder import RunFolder
from sslvit.train.hardware import resolve_processes

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "pretrain"}


def resolved(**given: int | None) -> tuple[int | None, int | None]:
    train = resolve_processes(TrainSettings(**given))
    return train.devices, train.nodes


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_without_a_launcher_a_run_is_one_process_or_as_many_as_are_given(env: pytest.MonkeyPatch) -> None:
    assert resolved() == (1, 1)
    assert resolved(devices=4, nodes=2) == (4, 2)


@pytest.mark.parametrize(("launcher", "found"), [(TORCHRUN, (3, 2)), (SRUN, (4, 2)), (TORCHRUN | SRUN, (3, 2))])
def test_a_launcher_decides_how_many_processes_there_are(env: pytest.MonkeyPatch, launcher: dict, found: tuple) -> None:
    for name, value in launcher.items():
        env.setenv(name, value)
    assert resolved() == found
    assert resolved(devices=found[0]) == found


def test_a_number_that_contradicts_the_launcher_is_refused(env: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        env.setenv(name, value)
    with pytest.raises(ValueError, match=r"train.devices: 1, but torchrun started 3 processes .*--train.devices null"):
        resolved(devices=1)
    with pytest.raises(ValueError, match=r"train.nodes: 4, but torchrun started 2 machines.*, or start 4"):
        resolved(nodes=4)


def test_a_command_without_srun_in_a_job_of_many_tasks_does_not_wait_for_the_others(env: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        env.setenv(name, value)
    env.delenv("SLURM_STEP_ID")
    with pytest.raises(ValueError, match="SLURM reserved 8 tasks .* Put srun before it"):
        resolved()


def test_a_resumed_run_has_the_processes_of_the_launcher_of_now(shards: Path, tmp_path: Path, env) -> None:
    run(shards, tmp_path / "run", **{"train.steps": 2})
    for name, value in TORCHRUN.items():
        env.setenv(name, value)
    with pytest.raises(ValueError, match="must be a multiple of the number of ranks .6"):  # 6, and not config.yaml's 1
        resume(tmp_path / "run")


def torchrun(words: list[str], **more) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words[1:]]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(start, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.slow
def test_torchrun_trains_one_run_on_its_processes_and_the_first_speaks(shards: Path, tmp_path: Path) -> None:
    whole = run_ranks(shards, tmp_path / "whole", **{"train.devices": 2})
    process = torchrun(command(shards, tmp_path / "run"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert same(RunFolder(tmp_path / "run"), whole)
    assert RunFolder(tmp_path / "run").read_config()["train"]["devices"] == 2
    lines = out.splitlines()
    assert "2 x cpu" in lines[0]
    assert "drawing figures" in lines
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_the_result_of_a_run_on_several_processes_is_printed_once(
    shards: Path, tmp_path: Path, env: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: str
) -> None:
    folder = run(shards, tmp_path / "run", **{"train.steps": 1})
    capsys.readouterr()
    options = Resumable(json=True)
    report_run(options, folder)
    assert json.loads(capsys.readouterr().out)["path"] == str(folder.path)
    env.setenv(rank, "1")  # the other process, which has left the run's process group, too
    report_run(options, folder)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_at_torchruns_terminal_keeps_the_run(shards: Path, tmp_path: Path) -> None:
    """Each process hears it twice: from the terminal, and from torchrun."""
    folder = RunFolder(tmp_path / "run")
    process = torchrun(
        command(shards, folder.path, **{"train.steps": 3000}), start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    step = torch.load(folder.checkpoint, weights_only=True)["global_step"]
    assert f"sslvit: interrupted at step {step} of 3000; the checkpoint is whole: sslvit resume {folder.path}" in err
