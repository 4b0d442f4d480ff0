"""The drill: everything that can stop, damage or attack a job, tried again and again, with a report.

    python tools/drill/drill.py                                  every kind, ten minutes
    python tools/drill/drill.py kill fuzz --seconds 60 --seed 7  some kinds, another seed
    python tools/drill/drill.py fuzz:tar fuzz:jpeg               some parts of a kind
    python tools/drill/drill.py fuzz --seed 7 --only tar-12.44   one trial again, as a failure names it

    kill         kill -9 at random moments: runs of each task, packing, and the short commands
    signals      SIGTERM and SIGUSR1 at random moments, from the first line of the command on
    starts       two processes on one folder at once
    disk         a disk that fills up in the middle
    fuzz         damaged files of every kind that is read
    hostile      files that try to run code, write elsewhere, fill the memory or forge the screen
    network      a server that disconnects, stalls, lies and redirects
    concurrency  one to four ranks with up to three workers each

It prints what is guaranteed, how often that was tried and how often it failed, writes the same as report.json and
report.md, and ends with exit code 1 if anything failed. Linux only; a small disk is a tmpfs for root, otherwise a limit
on the length of files.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARES = {  # of the time; what a kind leaves goes to those after it
    "kill": 25, "signals": 12, "starts": 10, "disk": 15, "fuzz": 20, "hostile": 6, "network": 6, "concurrency": 6,
}  # fmt: skip
MEMORY = 2 << 30
MODULES = {"signals": "stops"}  # where a kind's module has another name


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that is forked must have no threads
    for folder in (HERE.parents[1] / "tests", HERE.parents[1], HERE):
        sys.path.insert(0, str(folder))
    from material import Workshop
    from trials import run_parts

    rows, start = [], time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="drill-", dir=memory_folder()) as scratch,
        closing(Workshop(Path(scratch) / "workshop")) as workshop,
    ):
        shares = [SHARES[word.partition(":")[0]] for word in options.kinds]
        for number, word in enumerate(options.kinds):
            kind, _, name = word.partition(":")
            left = options.seconds - (time.monotonic() - start)
            share = shares[number] / sum(shares[number:])
            parts = importlib.import_module(MODULES.get(kind, kind)).parts(workshop)
            parts = [part for part in parts if name in ("", part.name)]
            found = run_parts(kind, parts, left * share, options.seed, Path(scratch), options.only)
            rows += found
            print(as_text(found), flush=True)
    seconds = time.monotonic() - start
    failed = sum(len(row.failures) for row in rows)
    tried = sum(row.tried for row in rows)
    print(f"{tried:,} trials in {seconds:.0f} s, {failed:,} failed (seed {options.seed})")
    if options.out:
        write_report(Path(options.out), rows, seconds, options.seed)
    return 1 if failed else 0


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("kinds", nargs="*", metavar="KIND[:PART]", help=f"{', '.join(SHARES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="for all of it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default: %(default)s)")
    parser.add_argument("--only", metavar="TRIAL", help="one trial of one kind, as in mae-3 or tar-12.44")
    parser.add_argument("--out", metavar="FOLDER", help="for report.json and report.md")
    options = parser.parse_args(arguments)
    options.kinds = options.kinds or list(SHARES)
    unknown = [word for word in options.kinds if word.partition(":")[0] not in SHARES]
    if unknown:
        parser.error(f"{unknown[0]}: not one of {', '.join(SHARES)}")
    if options.only and len(options.kinds) != 1:
        parser.error("--only takes one kind")
    return options


def memory_folder() -> str | None:
    """A place in memory for the trials' files, where there is one of some size: hundreds of thousands are written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > MEMORY else None


def as_text(rows: list) -> str:
    """A line per part, and under it the first failures with the command that repeats each."""
    lines = []
    for row in rows:
        lines.append(f"{row.kind:<12}{row.part:<20}{row.tried:>9,} tried {len(row.failures):>6,} failed  {row.promise}")
        lines += [f"    {failure['problem']}\n    again: {failure['command']}" for failure in row.failures[:3]]
    return "\n".join(lines)


def write_report(folder: Path, rows: list, seconds: float, seed: int) -> None:
    """report.json with everything, report.md with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"seconds": round(seconds, 1), "seed": seed, "rows": [asdict(row) for row in rows]}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["| kind | promised | tried | failed |", "|---|---|---:|---:|"]
    lines += [f"| {row.kind} | {row.promise} | {row.tried:,} | {len(row.failures):,} |" for row in rows]
    failures = [failure for row in rows for failure in row.failures]
    lines += ["", *(f"- {' '.join(f['problem'].split())}  \n  `{f['command']}`" for f in failures)]
    (folder / "report.md").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
