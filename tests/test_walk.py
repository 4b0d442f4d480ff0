"""The walk of one image in docs/architecture.md, checked against what a run really calls."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TRACE = """
import json, os, sys, threading
import sslvit.tasks.base
from sslvit.cli import main

package, entered = os.path.dirname(sslvit.__file__) + os.sep, {}

def note(frame, event, value):
    code = frame.f_code
    is_own = code.co_filename.startswith(package) and not code.co_name.startswith("<")
    if event == "call" and is_own and code.co_flags & 1:  # a function, and no body of a class or module
        entered.setdefault(code.co_filename.removeprefix(package))

compute = sslvit.tasks.base.Task.training_step

def first_step(*arguments):
    compute(*arguments)
    sys.setprofile(None)
    threading.setprofile(None)
    print(json.dumps(list(entered)), flush=True)
    os._exit(0)

sslvit.tasks.base.Task.training_step = first_step
threading.setprofile(note)
sys.setprofile(note)
main(sys.argv[1:])
"""


def files_entered(folder: Path) -> set[str]:
    """Files of the package in which a function runs between a command's first word and the first loss of its run."""
    for number in range(64):
        (folder / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 4 * number).save(folder / "images" / str(number % 2) / f"{number}.png")
    typed = ["shards", "pack", str(folder / "images"), str(folder / "shards")]
    subprocess.run([sys.executable, "-m", "sslvit", *typed], check=True, capture_output=True)
    typed = ["pretrain", "--config", "mae/digits", "--data", str(folder / "shards"), "--out", str(folder / "run")]
    typed += ["--train.steps", "1", "--data.workers", "0", "--train.accelerator", "cpu"]
    done = subprocess.run([sys.executable, "-c", TRACE, *typed], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_documented_walk_of_an_image_names_the_files_that_a_run_enters(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    walk = page.partition("## The walk of one image\n")[2].partition("\n## ")[0]
    named, entered = set(re.findall(r"`((?!tests/)[\w/]+\.py)`", walk)), files_entered(tmp_path)
    assert entered - named == set()
    assert named - entered == set()
    assert f"These are {len(entered)} files" in walk
