"""SIGTERM and SIGUSR1 at random moments, from the first line of the command on: exit code 75, and it resumes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from children import Child, one_line_error, ranks, sslvit
from material import TASKS, Workshop, differences
from trials import Part, Trial

from sslvit.stopping import TRY_AGAIN
from sslvit.train.folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FIRST_MOMENT = 0.03  # seconds in which a forked command gets to its first line, on a busy machine
TORCH = "libtorch_cpu"  # mapped when torch is imported


def parts(workshop: Workshop) -> list[Part]:
    promise = "a {} run told to stop leaves with 75 and goes on to the same bits"
    return [
        *(Part(task, promise.format(task), lambda trial, task=task: signal_run(trial, workshop, task), 20)
          for task in TASKS),
        Part("ranks", "one of two ranks is told to stop: both leave with 75 in time, and go on",
             lambda trial: signal_ranks(trial, workshop), 6),
        Part("imports", "told while it still imports, a command leaves with 75 too",
             lambda trial: signal_imports(trial, workshop), 6),
    ]  # fmt: skip


def signal_run(trial: Trial, workshop: Workshop, task: str) -> None:
    whole, seconds = workshop.whole_run(task)
    cut = RunFolder(trial.folder / "run")
    first = sslvit(trial.folder / "first.txt", *workshop.pretrain(task, cut.path))
    is_early = trial.rng.random() < 0.3
    if first.wait_until(trial.rng.uniform(FIRST_MOMENT, 0.15 if is_early else seconds)):
        for _ in range(trial.rng.randint(1, 2)):  # a second one changes nothing
            first.send(trial.rng.choice(SIGNALS))
    first.wait()
    if is_stopped(trial, first, cut):
        go_on_to_the_end(trial, workshop, task, cut)
    if not trial.problems:
        trial.expect(not (found := differences(whole, cut)), f"not the same after a signal: {', '.join(found)}")


def signal_ranks(trial: Trial, workshop: Workshop) -> None:
    cut = RunFolder(trial.folder / "run")
    both = {"train.devices": 2, "train.steps": 60, "train.timeout_seconds": 30}
    children = ranks(workshop.pretrain("mae", cut.path, **both), 2, trial.folder / "first")
    told = trial.rng.choice(children)
    if told.wait_until(trial.rng.uniform(FIRST_MOMENT, 3.0)):
        told.send(trial.rng.choice(SIGNALS))
    codes = [child.wait() for child in children]
    said = " | ".join(child.last_line() for child in children)
    if not trial.expect(codes in ([TRY_AGAIN] * 2, [0, 0]), f"exit codes {codes}, not 75 and 75: {said}"):
        return
    again = ranks(workshop.go_on("mae", cut.path, **both), 2, trial.folder / "again")
    codes = [child.wait() for child in again]
    trial.expect(codes == [0, 0], f"going on ended with {codes}: {again[0].text()[-400:]}")


def signal_imports(trial: Trial, workshop: Workshop) -> None:
    """A process from its beginning: the signal comes when it first can be heard, or while libraries are imported."""
    cut = RunFolder(trial.folder / "run")
    words = workshop.pretrain("mae", cut.path)
    environment = {"PYTHONPATH": str(REPOSITORY)}

    def work() -> None:
        os.execv(sys.executable, [sys.executable, "-m", "sslvit.cli", *words])

    child = Child(work, trial.folder / "first.txt", environment)
    while child.poll() is None and "sslvit.cli" not in read_of(child.pid, "cmdline"):
        time.sleep(0.001)  # until then it is the drill's own copy
    while child.poll() is None and not is_heard(child.pid) and TORCH not in read_of(child.pid, "maps"):
        time.sleep(0.001)
    if not trial.expect(child.code is None and is_heard(child.pid), "no signal is heard before torch is imported"):
        child.kill_all()
        return
    heard = time.monotonic() - child.started
    if child.wait_until(heard + trial.rng.choice([0.0, trial.rng.uniform(0, 6)])):
        child.send(trial.rng.choice(SIGNALS))
    child.wait()
    if is_stopped(trial, child, cut):
        go_on_to_the_end(trial, workshop, "mae", cut)


def is_stopped(trial: Trial, child: Child, cut: RunFolder) -> bool:
    """Whether it left before its end, as promised; a run that had ended already leaves with 0."""
    if child.code == 0 and (cut.encoder / "encoder.json").exists():
        return False
    if not trial.expect(child.code == TRY_AGAIN, f"exit code {child.code}, not 75: {child.last_line()[-300:]}"):
        return False
    problem = one_line_error(child)
    return trial.expect(not problem, problem)


def go_on_to_the_end(trial: Trial, workshop: Workshop, task: str, cut: RunFolder) -> None:
    again = sslvit(trial.folder / "again.txt", *workshop.go_on(task, cut.path, by_folder=trial.rng.random() < 0.3))
    code = again.wait()
    trial.expect(code == 0, f"going on ended with {code}: {again.text()[-400:]}")


def is_heard(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    lines = read_of(pid, "status").splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def read_of(pid: int, name: str) -> str:
    """What the kernel says of a process; nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
