"""The lessons of docs/learn: each has its question, its figures and what to see, and runs as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGES = sorted(LEARN.glob("[0-9][0-9]_*.md"))
FIGURE = re.compile(r"!\[([^\]]+)\]\((figures/[^)]+\.png)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_lesson_has_a_question_a_figure_of_its_own_and_what_to_see(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {int(page.name[:2])}. ")
    assert "**Question.**" in text
    assert "**What to see.**" in text
    figures = [path for _, path in FIGURE.findall(text)]
    assert figures
    assert all((LEARN / path).is_file() and Path(path).name.startswith(page.name[:2]) for path in figures)
    made = set(re.findall(r'FIGURES / "([^"]+)"|figures/([^\s)]+\.png)', text))
    assert {path for _, path in FIGURE.findall(text)} <= {f"figures/{one or other}" for one, other in made}


def test_every_figure_and_number_is_used_and_every_lesson_is_listed() -> None:
    texts = "\n".join(page.read_text() for page in PAGES)
    assert {path.name for path in (LEARN / "figures").iterdir()} == {
        Path(path).name for _, path in FIGURE.findall(texts)
    }
    assert {path.stem for path in (LEARN / "numbers").iterdir()} == set(re.findall(r'measured\("([^"]+)"', texts))
    assert [page.stem for page in PAGES] == re.findall(r"^([0-9][0-9]_\w+)$", (LEARN / "index.md").read_text(), re.M)
    assert [int(page.name[:2]) for page in PAGES] == list(range(1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_lesson_runs_as_it_is_written_and_draws_its_figures(page: Path, tmp_path: Path) -> None:
    """Its assertions are what it claims; numbers that take long are those that it brings along."""
    copy = tmp_path / "learn"
    shutil.copytree(LEARN, copy)
    shutil.rmtree(copy / "figures")
    (copy / "figures").mkdir()
    before = {path.name: path.read_bytes() for path in (copy / "numbers").iterdir()}
    env = {key: value for key, value in os.environ.items() if key != "LEARN_FULL"} | {
        "PYTHONPATH": str(LEARN.parents[1])
    }
    done = subprocess.run(
        [sys.executable, str(copy / "run.py"), page.name[:2]], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for _, path in FIGURE.findall(page.read_text()):
        assert (copy / path).stat().st_size > 1000
    assert {path.name: path.read_bytes() for path in (copy / "numbers").iterdir()} == before
