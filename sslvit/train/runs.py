"""The runs below some folders: what each trains, how far it is, and what came of it. Nothing there is changed."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sslvit.evaluate.scores import spreadsheet_cell
from sslvit.files import expand_path, printable, write_atomically
from sslvit.locks import is_locked
from sslvit.messages import for_python
from sslvit.results import Result, text_table
from sslvit.train.folder import LOCK, RunFolder

logger = logging.getLogger(__name__)

# what is measured on labeled images: key in metrics.jsonl or scores.json -> title of its column
SCORES = {"probe/linear": "linear", "probe/knn": "kNN", "val/top1": "top-1"}
MAX_LISTED = 10  # damaged folders in a table


@dataclass
class RunSummary:
    """One run in a few values; None for what its files do not tell.

    Args:
        path: Run folder.
        state: finished, running (a process has the folder) or stopped.
        task: Name of the training task.
        data: Training data.
        width: Width of the encoder.
        depth: Number of its blocks.
        steps: Number of optimizer steps so far, those of the last line of metrics.jsonl.
        total_steps: Number of optimizer steps in the run.
        loss: Loss in that line.
        scores: Last score by each measure on labeled images in percent.
        health: Verdict of health.json.
        hours: Hours of training so far.
    """

    path: str
    state: str
    task: str | None
    data: str | None
    width: int | None
    depth: int | None
    steps: int
    total_steps: int | None
    loss: float | None
    scores: dict[str, float]
    health: str | None
    hours: float | None


@dataclass(repr=False)
class RunList(Result):
    """Runs beside each other.

    Args:
        found: The runs, in the order of their paths.
        damaged: Folder of a run that cannot be read -> what is wrong with it.
    """

    found: list[RunSummary]
    damaged: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[RunSummary]:
        return iter(self.found)

    @property
    def score_names(self) -> list[str]:
        """Titles of the scores that a run has."""
        return [name for name in SCORES.values() if any(name in run.scores for run in self.found)]

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """A row for each run, a column for each score that one of them has."""
        names = self.score_names
        titles = ("run", "task", "data", "encoder", "steps", "loss", *names, "health", "hours", "state")
        return titles, [
            (
                run.path, run.task or "–", run.data or "–", f"{_number(run.width)} x {_number(run.depth)}",
                f"{run.steps:,} of {_number(run.total_steps)}", _number(run.loss, ".4f"),
                *(_number(run.scores.get(name), ".1f") for name in names), run.health or "–",
                _number(run.hours, ".2f"), run.state,
            )
            for run in self.found
        ]  # fmt: skip

    def text(self) -> str:
        """The table, and below it what could not be read."""
        lines = [text_table(*self.cells())] if self.found else ["no runs there"]
        if self.found:
            lines.append("encoder: width x depth; scores in percent on labeled images" if self.score_names else
                         "encoder: width x depth")  # fmt: skip
        damaged = list(self.damaged.items())
        lines += [f"damaged: {printable(path)}: {printable(reason, 400)}" for path, reason in damaged[:MAX_LISTED]]
        lines += [f"and {len(damaged) - MAX_LISTED} more"] if len(damaged) > MAX_LISTED else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The runs as records, and the damaged folders."""
        return {"runs": [asdict(run) for run in self.found], "damaged": self.damaged}

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each run.

        Raises:
            WriteError: The disk is full or cannot be written to.
        """
        names, lines = self.score_names, io.StringIO()
        writer = csv.writer(lines, quoting=csv.QUOTE_NONNUMERIC)
        columns = [name for name in RunSummary.__dataclass_fields__ if name != "scores"]
        writer.writerow([*columns, *names])
        for run in self.found:
            values = [getattr(run, column) for column in columns] + [run.scores.get(name) for name in names]
            writer.writerow(["" if value is None else spreadsheet_cell(value) for value in values])
        write_atomically(path, lines.getvalue())


@for_python
def runs(folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RunList:
    """List the runs below folders, each with its task, length, loss, scores, health and state.

    Args:
        folders: Folder that is searched at any depth, or several; a run folder itself is one, too.

    Returns:
        The runs, which show themselves as a table.

    Raises:
        FileNotFoundError: No such folder.

    Example:
        found = sslvit.runs("runs")
        print(found)
    """
    summaries: dict[str, RunSummary] = {}
    damaged: dict[str, str] = {}
    named = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    for path in _run_folders([Path(expand_path(os.fspath(folder))) for folder in named]):
        try:
            summaries[str(path)] = summarize(RunFolder(path))
        except (ValueError, OSError, TypeError, AttributeError) as error:
            damaged[str(path)] = f"{error}"
    return RunList([summaries[path] for path in sorted(summaries, key=_by_numbers)], damaged)


def _run_folders(folders: Sequence[Path]) -> Iterator[Path]:
    """Every run folder below some folders, once; what lies inside a run is not looked at."""
    seen = set()
    for top in folders:
        if not top.is_dir():
            raise FileNotFoundError(f"{printable(top)}: no such folder. Give one with runs below it.")
        for name, inside, files in os.walk(top):
            path = Path(name)
            if "config.yaml" in files and RunFolder(path).is_run:
                inside.clear()
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield path


def summarize(folder: RunFolder) -> RunSummary:
    """What the files of a run tell.

    Raises:
        ValueError: Its config.yaml is damaged.
    """
    config, lines = folder.read_config(), folder.read_metrics()
    last = lines[-1] if lines else {}
    steps, total = int(last.get("step", 0)), total_steps(config, lines)
    found = folder.to_dict()
    scores = {title: line[key] for line in lines for key, title in SCORES.items() if key in line}
    if found["scores"] and isinstance(found["scores"].get("top1"), (int, float)):
        scores[SCORES["val/top1"]] = found["scores"]["top1"]
    is_finished = total is not None and steps >= total and found["encoder"] is not None
    task, encoder, data = (config[name] if isinstance(config.get(name), dict) else {} for name in
                           ("task", "encoder", "data"))  # fmt: skip
    return RunSummary(
        str(folder.path), "running" if is_locked(folder.path / LOCK) else "finished" if is_finished else "stopped",
        task.get("name"), data.get("shards") or _mixture(data.get("mixture")), encoder.get("width"),
        encoder.get("depth"), steps, total, last.get("train/loss"), scores,
        found["health"] and found["health"].get("verdict"),
        last["time/elapsed"] / 3600 if "time/elapsed" in last else None,
    )  # fmt: skip


def total_steps(config: dict[str, Any], lines: list[dict[str, float]]) -> int | None:
    """Number of optimizer steps of a whole run; None while neither its settings nor its metrics tell."""
    train = config.get("train") or {}
    if train.get("steps") is not None:
        return int(train["steps"])
    if not (lines and train.get("epochs") and lines[-1].get("epoch")):
        return None
    steps_per_epoch = round(lines[-1]["step"] / lines[-1]["epoch"])
    return max(1, round(train["epochs"] * steps_per_epoch))  # as RunPlan.make counts them


def _mixture(mixture: dict[str, float] | None) -> str | None:
    """A mixture in a cell."""
    return json.dumps(mixture) if mixture else None


def _by_numbers(path: str) -> list[tuple[bool, float, str]]:
    """Sorts depth=2 before depth=12."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", path)
    return [(number % 2 == 1, float(piece) if number % 2 else 0.0, piece) for number, piece in enumerate(pieces)]


def _number(value: float | None, form: str = ",") -> str:
    """A number in a cell; a dash for none."""
    return "–" if value is None else "not finite" if not math.isfinite(value) else format(value, form)
