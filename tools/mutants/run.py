"""Put plausible silent faults into a copy of the code, one at a time, and check that a test fails.

    python tools/mutants/run.py                        # all rooms, some hours on two cores
    python tools/mutants/run.py --rooms data_io tasks  # faults of some rooms (the files of tools/mutants/faults/)
    python tools/mutants/run.py --only "kNN" -o runs/mutants.json
    python tools/mutants/run.py --sample 60 --seed 1   # a random part of them

The tests that the faults name are run once without a fault first, and must pass. The exit status is 1 if a fault
survived without a stated reason, if its text does not occur in the code exactly once, or if its tests fail anyway.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ROOMS = sorted(file.stem for file in (HERE / "faults").glob("*.py") if file.stem != "__init__")
LONGEST_SECONDS = 600  # of one fault's tests; a fault that makes them hang is caught
IMPORTED_ONCE = ("torch", "torchvision", "pytorch_lightning", "scipy.stats", "hypothesis", "jaxtyping", "beartype")
PASSED, FAILED, NO_TESTS, HUNG = 0, 1, 5, -signal.SIGKILL

sys.path.insert(0, str(HERE))
from faults import Fault  # noqa: E402


def faults_of(rooms: list[str], only: str) -> list[tuple[str, Fault]]:
    """(room, fault) of the given rooms whose name contains some words."""
    found = [(room, fault) for room in rooms for fault in importlib.import_module(f"faults.{room}").FAULTS]
    return [(room, fault) for room, fault in found if only.lower() in fault.name.lower()]


def copy_tree(to: Path) -> None:
    """The files that git knows or would take, without compiled ones, so that a changed source is always read."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    subprocess.run(["git", "init", "-q"], cwd=to, check=True)  # for the tests that ask git


def run_tests(tree: Path, tests: tuple[str, ...], log: Path) -> int:
    """pytest's exit status, in a process that has the libraries already."""
    child = os.fork()
    if child:
        return _wait(child, LONGEST_SECONDS)
    os.setsid()
    with log.open("wb") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(tree)]
    import pytest

    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    if Path(sys.modules["sslvit"].__file__).parent.parent != tree:
        status = NO_TESTS  # another copy was tested
    sys.stdout.flush()
    os._exit(int(status))


def _wait(child: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


def undefined_names(code: str) -> set[str]:
    """Names that a file uses and does not have (shapes of jaxtyping are among them), and that it cannot be parsed."""
    ruff = ["ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "-"]
    found = json.loads(subprocess.run(ruff, input=code, capture_output=True, text=True).stdout)
    return {one["message"] for one in found}


def try_fault(tree: Path, fault: Fault, log: Path) -> str:
    """What became of it: caught, survived, or what is wrong with it."""
    source = tree / fault.file
    whole = source.read_text() if source.is_file() else ""
    if whole.count(fault.text) != 1:
        return f"stale: its text stands in {fault.file} {whole.count(fault.text)} times"
    if fault.text == fault.replacement:
        return "stale: it changes nothing"
    faulty = whole.replace(fault.text, fault.replacement)
    if new := undefined_names(faulty) - undefined_names(whole):
        return f"broken: any test would fail, as of {', '.join(sorted(new))}"
    source.write_text(faulty)
    try:
        status = run_tests(tree, fault.tests, log)
    finally:
        source.write_text(whole)
    if status == PASSED:
        return "survived"
    return "caught" if status in (FAILED, HUNG) else f"broken: pytest ended with {status} ({log})"


def work(number: int, tasks, results, folder: Path) -> None:
    """Try faults until there are no more."""
    tree = folder / f"tree{number}"
    tree.mkdir()
    copy_tree(tree)
    while (task := tasks.get()) is not None:
        place, fault = task
        begun = time.monotonic()
        if isinstance(fault, str):  # a file of tests, without a fault
            status = run_tests(tree, (fault,), folder / f"{place}.log")
            fate = "passes" if status == PASSED else f"broken: pytest ended with {status} ({folder / f'{place}.log'})"
        else:
            fate = try_fault(tree, fault, folder / f"{place}.log")
        results.put((place, fate, time.monotonic() - begun))


def run_all(tasks: list, jobs: int, folder: Path, say) -> list[str]:
    """The fate of each, in the order of the tasks."""
    context = multiprocessing.get_context("fork")
    waiting, results = context.Queue(), context.Queue()
    for task in [*enumerate(tasks), *[None] * jobs]:
        waiting.put(task)
    folder = Path(tempfile.mkdtemp(dir=folder))
    workers = [context.Process(target=work, args=(n, waiting, results, folder)) for n in range(jobs)]
    for worker in workers:
        worker.start()
    fates = [""] * len(tasks)
    for _ in tasks:
        place, fate, seconds = results.get()
        fates[place] = fate
        say(tasks[place], fate, seconds)
    for worker in workers:
        worker.join()
    return fates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS)
    parser.add_argument("--only", default="", help="words in the faults' names")
    parser.add_argument("--sample", type=int, metavar="N", help="try N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="faults that are tried at the same time")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("-o", "--out", type=Path, help="JSON file of the outcome")
    options = parser.parse_args()
    found = faults_of(options.rooms, options.only)
    if not found:
        parser.error(f"--only {options.only}: no fault of that name.")
    if options.sample is not None:
        found = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in IMPORTED_ONCE:
        importlib.import_module(library)
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))

    def say(task, fate: str, seconds: float) -> None:
        name = task if isinstance(task, str) else task.name
        print(f"{fate:<10} {seconds:5.0f} s  {name}", flush=True)

    broken = []
    if not options.no_baseline:
        files = sorted({test for _, fault in found for test in fault.tests})
        broken = [fate for fate in run_all(files, options.jobs, folder, say) if fate != "passes"]
    fates = run_all([fault for _, fault in found], options.jobs, folder, say)
    if not broken:
        shutil.rmtree(folder, ignore_errors=True)

    rooms = {}
    for (room, fault), fate in zip(found, fates, strict=True):
        rooms.setdefault(room, []).append((fault, fate))
    print(f"\n{'room':<12} faults  caught  survived with a reason  survived  stale or broken")
    wrong = len(broken)
    for room, of in rooms.items():
        caught = sum(fate == "caught" for _, fate in of)
        excused = sum(fate == "survived" and bool(fault.survives) for fault, fate in of)
        survived = sum(fate == "survived" for _, fate in of) - excused
        others = len(of) - caught - excused - survived
        wrong += survived + others
        print(f"{room:<12} {len(of):6}  {caught:6}  {excused:22}  {survived:8}  {others:15}")
    for fault, fate in (entry for of in rooms.values() for entry in of):
        if fate != "caught":
            print(f"  {fate}: {fault.name} ({fault.file}){': ' + fault.survives if fault.survives else ''}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        entries = [
            {"room": room, "fault": fault.name, "file": fault.file, "fate": fate}
            for (room, fault), fate in zip(found, fates, strict=True)
        ]
        options.out.write_text(json.dumps(entries, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
