"""The launch script starts a run, goes on with it, stages its data and passes signals on, with a stand-in for SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "slurm" / "pretrain.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """srun runs its command once; sslvit writes down its words, and ends with 75 when it is signaled."""
    (tmp_path / "bin").mkdir()
    commands = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
        "sslvit": f'echo "$WANDB_MODE $*" >> {tmp_path}/said\n'
        f'[ -e {tmp_path}/wait ] || exit 0\ntrap "exit 75" USR1\nfor i in $(seq 200); do sleep 0.05; done\n',
    }
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def words(tmp_path: Path, *more: str) -> list[str]:
    return ["bash", str(SCRIPT), "mae/digits", str(tmp_path / "shards"), str(tmp_path / "run"), *more]


def test_it_starts_and_goes_on(tmp_path: Path, slurm: dict[str, str]) -> None:
    subprocess.run(words(tmp_path, "--train.steps", "5"), check=True, env=slurm)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_text("")
    subprocess.run(words(tmp_path), check=True, env=slurm)
    first, second = (tmp_path / "said").read_text().splitlines()
    common = f"offline pretrain --config mae/digits --data {tmp_path}/shards --out {tmp_path}/run"
    assert first == f"{common} --train.steps 5"
    assert second == f"{common} --resume"


def test_data_is_staged(tmp_path: Path, slurm: dict[str, str]) -> None:
    subprocess.run(words(tmp_path), check=True, env=slurm | {"STAGE": str(tmp_path / "local disk")})
    assert (tmp_path / "local disk" / "shards" / "index.json").exists()
    assert f"--data {tmp_path}/local disk/shards" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_run_and_its_exit_code_comes_back(tmp_path: Path, slurm: dict[str, str], number) -> None:
    (tmp_path / "wait").write_text("")
    process = subprocess.Popen(words(tmp_path), env=slurm)
    while not (tmp_path / "said").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=20) == 75


def test_too_few_words_are_refused(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT), "mae/digits"], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
