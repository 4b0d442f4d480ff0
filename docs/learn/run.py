"""Run the lessons: every Python block and every shell command of a page, in order.

    python docs/learn/run.py             all lessons (make learn)
    python docs/learn/run.py 04 13       some of them
    python docs/learn/run.py 04 --full   also recompute stored numbers, which takes a laptop long

Blocks of a page share their variables. Each page starts in an empty folder; figures are written to docs/learn/figures.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
sys.path.insert(0, str(HERE))


def lessons(chosen: list[str]) -> list[Path]:
    """Pages whose names begin with one of the given texts; all pages if none is given.

    Raises:
        SystemExit: There is no such page.
    """
    pages = sorted(HERE.glob("[0-9][0-9]_*.md"))
    if unknown := [name for name in chosen if not any(page.name.startswith(name) for page in pages)]:
        raise SystemExit(f"no lesson {unknown[0]}. They are: {', '.join(page.stem for page in pages)}")
    return [page for page in pages if not chosen or page.name.startswith(tuple(chosen))]


def run(page: Path, folder: Path) -> None:
    """Run the code and commands of a page in a folder.

    Raises:
        SystemExit: A command failed.
    """
    os.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        language, body = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        if language == "python":
            exec(compile("\n" * line + body, str(page), "exec"), names)
        elif language == "sh":
            for command in body.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                if words and subprocess.run([sys.executable, "-m", *words]).returncode:
                    raise SystemExit(f"{page.name}, line {line}: {command} failed")


def main() -> None:
    """Run the lessons named on the command line, and print how long each took."""
    parser = argparse.ArgumentParser(description="Run the lessons of docs/learn.")
    parser.add_argument("lessons", nargs="*", help="beginnings of their names, such as 04; none for all")
    parser.add_argument("--full", action="store_true", help="also compute the numbers that the lessons bring along")
    options = parser.parse_args()
    if options.full:
        os.environ["LEARN_FULL"] = "1"
    for page in lessons(options.lessons):
        print(f"== {page.stem}", flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sslvit-learn-") as folder:
            run(page, Path(folder))
            os.chdir(HERE)
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
