"""Tests and measurements on a GPU in nine minutes: correctness, speed, and where the time goes.

    python tools/device_day.py --out results --data folder
    python tools/device_day.py --out results --only cases,attention
    python tools/device_day.py --out results --cpu --seconds 60

Runs from a checkout. Each part is a process with its own time limit and appends its results to results.jsonl line by
line; a part that fails or takes too long does not stop the others. table.md is written last. The --data folder may
contain CIFAR-10 (cifar*.tar.gz, or a folder cifar*) and photographs (photo*.tar, or a folder photo*); missing images
are generated.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]
sys.path[:0] = PATHS

from device_day_parts.common import Day, append_record, last_line, read_records  # noqa: E402
from device_day_parts.table import write_table  # noqa: E402

TOTAL = 540  # seconds in total for which the limits are chosen
MIN_ON_CPU = 180  # seconds per part on a CPU, where startup takes longer than the measurements
TAIL = 15  # last lines of a failed part's output that are recorded
MAX_OUTPUT = 2**20  # bytes of each part's output to keep


# time limit in seconds of each part, which is a module of device_day_parts
PARTS = {
    "start": 25,  # reads libraries from the disk once, outside the limits of the other parts
    "machine": 10, "gpu_tests": 100, "fixtures": 25, "cases": 170, "attention": 20, "loading": 25, "cifar": 165,
}  # fmt: skip
DATA, DATA_SECONDS = "data", 300  # runs next to the parts: images are packed while the tests run
NEED_DATA = {"loading", "cifar"}


def main() -> int:
    options = read_options()
    if options.part:
        return run_one(options)
    chosen = list(PARTS) if options.only is None else ["start", *(name for name in PARTS if name in options.only)]
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    kept = [record for record in read_records(results) if record["part"] not in chosen]
    results.unlink(missing_ok=True)
    for record in kept:
        append_record(results, record)
    work = Path(tempfile.mkdtemp(prefix="device-day-"))
    begun = time.time()
    try:
        ended = run_all(options, chosen, work)
        write_output(options.out, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = write_table(options.out)
    print(f"\n{text}\n{time.time() - begun:.0f} s; {options.out / 'table.md'}, {results}")
    return 0 if all(ended) else 1


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; at most 8 files")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 and photographs")
    parser.add_argument("--cpu", action="store_true", help="the same parts at tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="what all limits together are scaled to (540)")
    parser.add_argument("--only", help=f"parts to run again, of {','.join(PARTS)}")
    for hidden in ("part", "item"):
        parser.add_argument(f"--{hidden}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        options.only = options.only.split(",")
        if unknown := [name for name in options.only if name not in PARTS]:
            parser.error(f"--only {','.join(unknown)}: parts are {', '.join(PARTS)}.")
    elif not options.part and (options.out / "results.jsonl").exists():
        parser.error(f"--out {options.out}: holds results already. Name another folder, or the parts that --only runs.")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder.")
    options.out = options.out.resolve()
    return options


def run_one(options: argparse.Namespace) -> int:
    """Run one part in this process."""
    day = Day(options.part, options.out, options.work, options.data, options.cpu, options.deadline, options.item)
    import_module(f"device_day_parts.{options.part}").run_part(day)
    return 0


def run_all(options: argparse.Namespace, chosen: list[str], work: Path) -> list[bool]:
    """Run the chosen parts; returns for each whether it succeeded."""
    ended, packing, due = [], None, time.time()
    try:
        for name in chosen:
            limit = PARTS[name] * options.seconds / TOTAL
            due += limit
            limit = max(limit, MIN_ON_CPU if options.cpu else due - time.time())  # plus time left by earlier parts
            ended.append(run_process(options, name, limit, work))
            if name == "start" and not ended[0]:
                break  # no other part could run
            if name == "machine" or (name == "start" and "machine" not in chosen):  # `machine` must run undisturbed
                packing = start_process(options, DATA, DATA_SECONDS, work) if NEED_DATA & set(chosen) else None
    finally:
        if packing is not None:
            stop(packing)
    return ended


def start_process(options: argparse.Namespace, name: str, limit: float, work: Path) -> subprocess.Popen:
    words = [f"--out={options.out}", f"--work={work}", f"--part={name}", f"--deadline={time.time() + limit}"]
    words += ["--cpu"] * options.cpu + [f"--data={options.data}"] * bool(options.data)
    paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(work / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }  # fmt: skip
    if options.cpu:  # compiling, and threads that wait for each other, would take longer than everything else
        env |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with (work / f"{name}.txt").open("wb") as output:
        words = [sys.executable, __file__, *words]
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def run_process(options: argparse.Namespace, name: str, limit: float, work: Path) -> bool:
    """Run a part within its time limit, and record how it ended."""
    begun = time.time()
    print(f"{name}, up to {limit:.0f} s", flush=True)
    process = start_process(options, name, limit, work)
    try:
        how = "ok" if process.wait(limit) == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        how = f"stopped after {limit:.0f} s"
    stop(process)  # and its child processes
    record = {"part": name, "ended": how, "seconds": time.time() - begun}
    if how != "ok":
        output = (work / f"{name}.txt").read_text(errors="replace").splitlines()
        record["output"] = [line[:300] for line in output[-TAIL:]]
        print("\n".join(record["output"]), flush=True)
    append_record(options.out / "results.jsonl", record)
    return how == "ok"


def stop(process: subprocess.Popen) -> None:
    """Kill a process and its child processes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_output(out: Path, work: Path) -> None:
    """Collect the output of all parts in one file."""
    with (out / "output.txt").open("wb") as file:
        for path in sorted(work.glob("*.txt"), key=lambda path: path.stat().st_mtime):
            file.write(f"==== {path.stem}\n".encode() + path.read_bytes()[-MAX_OUTPUT:] + b"\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as error:
        sys.exit(last_line(error))
