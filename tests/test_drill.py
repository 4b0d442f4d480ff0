"""The drill finds nothing in what is there, and finds each fault that is put there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = {"kill", "signals", "starts", "disk", "fuzz", "hostile", "network", "concurrency"}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]

# a fault, and the trials that have to find it
FAULTS = {
    "files grow in their place": ("kill:pack", """
import os, time
def grow(source, target, **_):
    content = open(source, "rb").read()
    with open(target, "wb", buffering=0) as file:
        for place in range(0, len(content), 1 + len(content) // 10):
            file.write(content[place : place + 1 + len(content) // 10])
            time.sleep(0.005)
    os.unlink(source)
os.replace = grow
"""),
    "signals are not heard": ("signals:igpt", """
import signal
signal.signal = lambda number, handler: None
"""),
    "a lock that holds nobody": ("starts:overwrite", """
import fcntl
fcntl.flock = lambda *_: None
"""),
    "a message without file and remedy": ("disk:index", """
import sslvit.files
sslvit.files.write_error = lambda path, error: sslvit.files.WriteError("It did not work.")
sslvit.files.explain_os_error = lambda error: "It did not work."
"""),
    "an error that nobody promised": ("fuzz:png", """
import sslvit.data.header as module
whole = module.read_header
def read_header(content, *more, **options):
    try:
        return whole(content, *more, **options)
    except ValueError as error:
        raise KeyError(error)
module.read_header = read_header
"""),
    "pickles that are read whole": ("hostile:pickle", """
import torch
whole = torch.load
torch.load = lambda *words, **options: whole(*words, **options | {"weights_only": False})
"""),
    "shards that are taken as they come": ("network:passing", """
import hashlib, sslvit.data.remote
sslvit.data.remote.ShardCache._check = lambda *_: None
"""),
    "a rank that reads what is another's": ("concurrency:ledger", """
from sslvit.data.plan import EpochPlan
whole = EpochPlan.batch
def batch(self, step, start=0, stop=None):
    return whole(self, step, 0, None if stop is None else stop - start)
EpochPlan.batch = batch
"""),
}  # fmt: skip


def drill(tmp_path: Path, *words: str, before: str = "") -> tuple[int, dict]:
    """Exit code and report of a drill, perhaps with a fault put in before it begins."""
    program = (
        f"import sys\n{before}\nsys.path.insert(0, 'tools/drill')\nimport drill\nsys.exit(drill.main(sys.argv[1:]))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--out", str(tmp_path)], cwd=ROOT, env=env, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert (tmp_path / "report.json").exists(), done.stderr[-3000:]
    return done.returncode, json.loads((tmp_path / "report.json").read_text())


def test_a_short_drill_of_every_kind_finds_nothing(tmp_path: Path) -> None:
    code, report = drill(tmp_path, "--seconds", "60", "--seed", "1")
    assert {row["kind"] for row in report["rows"] if row["tried"]} == KINDS
    assert not [failure for row in report["rows"] for failure in row["failures"]], (tmp_path / "report.md").read_text()
    assert code == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_the_drill_finds_a_fault_that_was_put_in(tmp_path: Path, fault: str) -> None:
    part, before = FAULTS[fault]
    code, report = drill(tmp_path, part, "--seconds", "20", "--seed", "1", before=before)
    failures = [failure for row in report["rows"] for failure in row["failures"]]
    assert code == 1
    assert failures
    kind = part.partition(":")[0]
    assert all(f"drill.py {kind} --seed 1 --only {failure['trial']}" in failure["command"] for failure in failures)
    assert (tmp_path / "report.md").read_text().startswith("| kind | promised | tried | failed |")


def test_one_trial_can_be_repeated_alone(tmp_path: Path) -> None:
    """As a failure names it: the same inputs, and no others."""
    _, before = FAULTS["an error that nobody promised"]
    _, whole = drill(tmp_path / "whole", "fuzz", "--seconds", "1", "--seed", "6", before=before)
    failure = next(failure for row in whole["rows"] for failure in row["failures"])
    words = failure["command"].split()[2:]
    _, again = drill(tmp_path / "again", *words, before=before)
    assert [failure["problem"] for row in again["rows"] for failure in row["failures"]] == [failure["problem"]]
    assert sum(row["tried"] for row in again["rows"]) == 1
