"""A run that is told to stop leaves a whole checkpoint, says so by its exit code, and goes on as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_fixtures import TINY, run, same

from sslvit.cli import main
from sslvit.stopping import Preempted, requeue, stopping_at_once
from sslvit.tasks import task_class
from sslvit.train import checkpoint_io
from sslvit.train import run as run_module
from sslvit.train.callbacks.peers import ENDING, Peers
from sslvit.train.folder import RunFolder


def signaled(monkeypatch: pytest.MonkeyPatch, numbers: list[int], at: int) -> None:
    """Signals that reach the process in the middle of a step."""
    task = task_class("mae")
    step = task.training_step

    def told(self, batch, batch_idx=0):
        if self.global_step == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", told)


@pytest.mark.parametrize(
    ("numbers", "changes"),
    [
        ([signal.SIGTERM], {}),
        ([signal.SIGUSR1], {"train.micro_batch_size": 2}),
        ([signal.SIGUSR1, signal.SIGTERM], {}),
    ],
)
def test_a_signal_ends_the_step_and_writes_it_down(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int], changes: dict
) -> None:
    whole = run(shards, tmp_path / "whole", **changes)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        signaled(patch, numbers, at=4)
        name = signal.Signals(numbers[-1]).name
        with pytest.raises(Preempted, match=f"stopped at step 5 of 7: received {name}; .*sslvit resume "):
            run(shards, tmp_path / "cut", **changes)
    folder = RunFolder(tmp_path / "cut")
    assert torch.load(folder.checkpoint, weights_only=True)["global_step"] == 5
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert same(run(shards, tmp_path / "cut", resume=True, **changes), whole)


def test_a_signal_in_a_step_with_a_checkpoint_writes_it_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], checkpoint_io.write_checkpoint
    monkeypatch.setattr(
        checkpoint_io,
        "write_checkpoint",
        lambda content, path: written.append(content["global_step"]) or write(content, path),
    )
    signaled(monkeypatch, [signal.SIGTERM], at=5)
    with pytest.raises(Preempted, match="stopped at step 6 of 7"):
        run(shards, tmp_path / "run", **{"train.checkpoint_every": 3, "train.checkpoint_in_background": True})
    assert written == [3, 6]
    assert torch.load(RunFolder(tmp_path / "run").checkpoint, weights_only=True)["global_step"] == 6


def test_ctrl_c_ends_the_step_and_writes_it_down(shards: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    whole, before = run(shards, tmp_path / "whole"), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        signaled(patch, [signal.SIGINT], at=4)
        resume_hint = rf"interrupted at step 5 of 7; the checkpoint is whole: sslvit resume {tmp_path}/cut$"
        with pytest.raises(KeyboardInterrupt, match=resume_hint):
            run(shards, tmp_path / "cut")
    assert capfd.readouterr().err.startswith("interrupted: this step is finished and a checkpoint written")
    assert torch.load(RunFolder(tmp_path / "cut").checkpoint, weights_only=True)["global_step"] == 5
    assert signal.getsignal(signal.SIGINT) is before
    assert same(run(shards, tmp_path / "cut", resume=True), whole)


def test_ctrl_c_is_one_line_and_asks_no_scheduler(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "requeue", lambda: pytest.fail("a scheduler was asked"))
    monkeypatch.setattr("sslvit.cli.requeue", lambda: pytest.fail("a scheduler was asked"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_run_data", lambda *_: tell(signal.SIGINT))
        assert main(words_of(shards, tmp_path / "run")) == 130
    assert capfd.readouterr().err == (
        "sslvit: interrupted before the first step, so there is nothing to save yet: give the same command again\n"
    )
    signaled(monkeypatch, [signal.SIGINT], at=2)
    assert main(words_of(shards, tmp_path / "run")) == 130
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("sslvit: interrupted at step 3 of 7; the checkpoint is whole: sslvit resume ")
    monkeypatch.undo()
    assert main(["resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("shards pack", "interrupted; shards that are finished are kept: the same command goes on with the others"),
        ("probe", "interrupted; features of complete passes are in the cache: the same command goes on from them"),
        ("resume", "interrupted before the first step; its checkpoint is as it was: give the same command again"),
        ("shards info", "interrupted; nothing is written: give the same command again"),
    ],
)
def test_ctrl_c_in_any_command_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, capfd, command: str, said: str):
    stopped = SimpleNamespace(quiet=False, plugin=None)
    monkeypatch.setattr("sslvit.cli.read_command", lambda _: (lambda options: tell(signal.SIGINT), stopped))
    assert main(command.split()) == 130
    assert capfd.readouterr().err == f"sslvit: {said}\n"


def test_a_process_in_the_background_does_not_hear_ctrl_c(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """A shell starts it so; what is typed at the terminal is for others."""
    signaled(monkeypatch, [signal.SIGINT], at=2)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(words_of(shards, tmp_path / "run")) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_in_the_last_step_lets_the_run_end(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signaled(monkeypatch, [signal.SIGTERM], at=6)
    assert (run(shards, tmp_path / "run").encoder / "encoder.json").exists()


def words_of(shards: Path, out: Path, **changes) -> list[str]:
    words = ["pretrain", "--config", "mae/digits", "--data", str(shards), "--out", str(out)]
    return words + [f"--{key}={json.dumps(value)}" for key, value in (TINY | changes).items()]


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_further_signals_change_nothing_while_a_stopped_run_ends(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Neither before the first step, nor after the checkpoint, nor while the scheduler is asked."""

    def open_data(*_) -> None:
        try:
            tell()
        finally:
            tell()
            tell(signal.SIGUSR1)

    asked = []
    monkeypatch.setattr(run_module, "requeue", lambda: asked.append(tell()))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_run_data", open_data)
        assert main(words_of(shards, tmp_path / "run")) == 75
    assert "received SIGTERM before the first step" in capsys.readouterr().err
    signaled(monkeypatch, [signal.SIGUSR1], at=2)
    assert main(words_of(shards, tmp_path / "run")) == 75
    assert "stopped at step 3 of 7: received SIGUSR1" in capsys.readouterr().err
    assert asked == [None, None]


@pytest.mark.parametrize("fails", [True, False])
def test_a_signal_that_a_library_swallows_is_not_lost(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fails: bool
) -> None:
    def swallow(*_) -> None:
        try:
            tell()
        except BaseException:
            if fails:
                raise AttributeError("half imported") from None

    monkeypatch.setattr(run_module, "check_data", swallow)
    assert main(words_of(shards, tmp_path / "run")) == 75
    said = "received SIGTERM before the first step" if fails else "stopped at step 1 of 7: received SIGTERM"
    assert said in capsys.readouterr().err
    monkeypatch.undo()
    assert main(words_of(shards, tmp_path / "run") + ["--resume"] * (not fails)) == 0  # and nothing is remembered


def test_a_forked_process_dies_of_a_signal_as_always(tmp_path: Path) -> None:
    with stopping_at_once("in the parent"):
        child = os.fork()
        if not child:
            try:
                signal.pause()
            finally:
                os._exit(0)
        while not is_asleep(child):
            time.sleep(0.001)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def is_asleep(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_ranks_that_would_take_other_steps_do_not_train_together(tmp_path: Path, monkeypatch) -> None:
    rank = Peers(RunFolder(tmp_path), (3,), 9, 1.0)
    rank.step, others = 6, [torch.tensor([6, -6, 8, -8, 0, 0]), torch.tensor([3, -3, 8, -8, 0, 0])]

    def all_reduce(values: torch.Tensor, *_, **__) -> None:
        values.copy_(torch.stack([values, *others]).amax(0))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(RuntimeError, match="last.ckpt: ranks would go on from steps 3 to 6.* check the disk"):
        rank.check_alike(8)
    others[1] = torch.tensor([6, -6, 4, -4, 0, 0])
    with pytest.raises(RuntimeError, match="auto chose 8 images on one rank and 4 on another.* Set it to 4"):
        rank.check_alike(8)
    others[1] = torch.tensor([6, -6, 8, -8, 5, -5])
    with pytest.raises(RuntimeError, match="the ranks have other data: each must be given the same images"):
        rank.check_alike(8)
    others[1] = others[0]
    rank.check_alike(8)


TYPED = """
import os, signal, sys, time
from sslvit.cli import main
from sslvit.tasks.mae import MAE
signal.signal(signal.SIGINT, signal.default_int_handler)

def step(self, batch, batch_idx=0):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100)

MAE.training_step = step
sys.exit(main())
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(shards: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TYPED, *words_of(shards, tmp_path / "run")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.splitlines() == [ENDING.decode().strip()]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_terminals_ctrl_c_ends_ranks_and_loaders_without_a_traceback(
    shards: Path, tmp_path: Path, devices: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    changes = {"train.steps": 3000, "data.workers": 2, "data.memory_limit_mb": 0, "train.devices": devices}
    process = subprocess.Popen(
        [sys.executable, "-m", "sslvit.cli", *words_of(shards, folder.path, **changes)], start_new_session=True,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for_lines(process, folder, 5)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    step = torch.load(folder.checkpoint, weights_only=True)["global_step"]
    assert process.returncode == 130, said
    assert said.splitlines() == [
        ENDING.decode().strip(),
        f"sslvit: interrupted at step {step} of 3000; the checkpoint is whole: sslvit resume {folder.path}",
    ]


def wait_for_lines(process: subprocess.Popen, folder: RunFolder, count: int) -> None:
    """Until a run has logged so many steps."""
    deadline = time.monotonic() + 120
    while len(folder.read_metrics()) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_job_leaves_its_loaders_to_the_run(
    shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As SLURM sends it: a run needs its batches until its checkpoint is written."""
    folder = RunFolder(tmp_path / "run")
    changes = {"train.steps": 3000, "data.workers": 2, "data.memory_limit_mb": 0}
    process = subprocess.Popen(
        [sys.executable, "-m", "sslvit.cli", *words_of(shards, folder.path, **changes)],
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_lines(process, folder, 5)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, f"received {number.name}" in said) == (75, True), said


def test_the_exit_code_says_try_again(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    signaled(monkeypatch, [signal.SIGTERM], at=2)
    words = ["pretrain", "--config", "mae/digits", "--data", str(shards), "--out", str(tmp_path / "run")]
    assert main([*words, *(word for key, value in TINY.items() for word in (f"--{key}", str(value)))]) == 75
    assert "stopped at step 3 of 7: received SIGTERM" in capsys.readouterr().err


def test_slurm_is_asked_to_run_the_job_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    requeue()
    assert not (tmp_path / "asked").exists()  # not a job of SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "pretrain")
    signaled(monkeypatch, [signal.SIGUSR1], at=2)
    with pytest.raises(Preempted):
        run(shards, tmp_path / "run")
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "SLURM job 4711 is in the queue again" in capsys.readouterr().err
    with pytest.raises(Preempted):
        run(shards, tmp_path / "other", **{"train.requeue": False})
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    command.write_text("#!/bin/sh\nexit 3\n")
    requeue()
    assert "SLURM job 4711 was not taken: exit code 3. Submit it again." in capsys.readouterr().err
    command.write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    requeue()
    assert "was not taken: no such job. Submit it again." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["parent", "child", "all"])
def test_ranks_stop_together_whichever_was_told(shards: Path, tmp_path: Path, whom: str) -> None:
    steps = {"train.steps": 400, "train.checkpoint_every": 1000, "train.devices": 2}
    words = ["pretrain", "--config", "mae/digits", "--data", str(shards), "--out", str(tmp_path / "run")]
    words += [word for key, value in (TINY | steps).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "sslvit.cli", *words]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path / "run")
    wait_for_lines(process, folder, 5)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    told = {
        "parent": [process.pid],
        "child": [int(children.split()[0])],
        "all": [process.pid, int(children.split()[0])],
    }
    for pid in told[whom]:
        os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    state = torch.load(folder.checkpoint, weights_only=True)
    assert 5 <= state["global_step"] < 400
    assert not list(folder.checkpoint.parent.glob("*.part"))
