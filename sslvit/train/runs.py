"""The runs below some folders, with their tasks, progress and results. Nothing there is changed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sslvit.evaluate.scores import csv_text
from sslvit.files import expand_path, explain_os_error, printable, quoted, write_atomically
from sslvit.locks import is_locked
from sslvit.messages import for_python
from sslvit.results import Result, decimals, text_table
from sslvit.train.folder import LOCK, RunFolder, read_json, read_lines

# scores on labeled images: key in metrics.jsonl or scores.json -> title of its column
SCORES = {"probe/linear": "linear", "probe/knn": "kNN", "val/top1": "top-1"}
MAX_LISTED = 10  # damaged folders in a table


@dataclass
class RunSummary:
    """One run in a few values; None for values that its files do not contain.

    Args:
        path: Run folder.
        state: finished, running (a process has locked the folder) or stopped.
        task: Name of the training task.
        data: Training data.
        backbone: Name of the network, if it is not a vision transformer.
        width: Width of the encoder; None with a backbone.
        depth: Number of its blocks; None with a backbone.
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
    backbone: str | None
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
    """Runs side by side.

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
        """Titles of the scores that any of the runs has."""
        return [name for name in SCORES.values() if any(name in run.scores for run in self.found)]

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """A row for each run, a column for each score that one of them has."""
        names = self.score_names
        titles = ("run", "task", "data", "encoder", "steps", "loss", *names, "health", "hours", "state")
        return titles, [
            (
                run.path, run.task or "–", run.data or "–",
                run.backbone or f"{_format(run.width)} x {_format(run.depth)}",
                f"{run.steps:,} of {_format(run.total_steps)}", _loss(run.loss),
                *(_format(run.scores.get(name), ".1f") for name in names), run.health or "–",
                _format(run.hours, ".2f"), run.state,
            )
            for run in self.found
        ]  # fmt: skip

    def text(self) -> str:
        """The table, and below it the runs that could not be read."""
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
        names, columns = self.score_names, [name for name in RunSummary.__dataclass_fields__ if name != "scores"]
        lines = ([*(getattr(run, column) for column in columns), *map(run.scores.get, names)] for run in self.found)
        write_atomically(path, csv_text([*columns, *names], lines))


@for_python
def runs(folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RunList:
    """List the runs below folders, each with its task, length, loss, scores, health and state.

    Args:
        folders: Folder to search at any depth, or several; a run folder itself counts, too.

    Returns:
        The runs, which print as a table.

    Raises:
        FileNotFoundError: No such folder.

    Example:
        found = sslvit.runs("runs")
        print(found)
    """
    named = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    unreadable: dict[str, str] = {}
    found = list_runs(find_runs([Path(expand_path(folder)) for folder in named], unreadable))
    return RunList(sorted(found, key=lambda run: _split_numbers(run.path)), found.damaged | unreadable)


def list_runs(paths: Iterable[Path]) -> RunList:
    """Summaries of some run folders, in their order; a damaged one does not keep the others from being listed."""
    summaries: list[RunSummary] = []
    damaged: dict[str, str] = {}
    for path in paths:
        try:
            summaries.append(summarize(RunFolder(path)))
        except (ValueError, OSError) as error:
            damaged[str(path)] = f"{error}"
    return RunList(summaries, damaged)


def find_runs(folders: Sequence[Path], unreadable: dict[str, str]) -> Iterator[Path]:
    """Every run folder below some folders, once, also behind links; run folders themselves are not searched.

    Args:
        folders: Folders to search.
        unreadable: Receives each folder that cannot be read -> why.

    Raises:
        FileNotFoundError: No such folder.
    """

    def note(error: OSError) -> None:
        unreadable[str(error.filename)] = explain_os_error(error) or str(error)

    seen: set[Path] = set()
    for top in folders:
        if not top.is_dir():
            raise FileNotFoundError(f"{printable(top)}: no such folder. Give one with runs below it.")
        for name, inside, files in os.walk(top, followlinks=True, onerror=note):
            path = Path(name)
            if path.resolve() in seen:  # through another link, perhaps in a cycle
                inside.clear()
                continue
            seen.add(path.resolve())
            inside.sort()
            try:
                is_run = ("config.yaml" in files and RunFolder(path).is_run) or (
                    LOCK in files and is_locked(path / LOCK)
                )
            except OSError as error:
                note(error)
                continue
            if is_run:
                inside.clear()
                yield path


def has_begun(folder: RunFolder) -> bool:
    """Whether there are settings of a run, or a process that is still opening the run's data."""
    return folder.config.exists() or is_locked(folder.path / LOCK)


def summarize(folder: RunFolder) -> RunSummary:
    """Summarize a run from its files.

    Raises:
        OSError: A file cannot be read.
        ValueError: Its config.yaml is damaged, or a value in its files has a wrong type; the message names it.
    """
    config = folder.read_config() if folder.config.exists() else {}
    mixture = value_in(config, "data.mixture")
    last: dict[str, Any] = {}
    scores: dict[str, float] = {}
    scored_step: float | None = None
    for _, last in read_lines(folder.metrics) if folder.metrics.exists() else ():
        for key in SCORES.keys() & last.keys():
            scores[SCORES[key]] = _metric(last, key, folder.metrics)
            scored_step = _number_in(last, "step", folder.metrics)
    steps, total = int(_number_in(last, "step", folder.metrics) or 0), _total_steps(config, last, folder)
    reported, health = read_json(folder.scores) or {}, read_json(folder.health) or {}
    top1, reported_step = (_number_in(reported, key, folder.scores) for key in ("top1", "step"))
    if top1 is not None and (reported_step or 0) >= (scored_step or 0):  # else the run has gone on since
        scores[SCORES["val/top1"]] = top1
    is_finished = total is not None and steps >= total and (folder.encoder / "encoder.json").exists()
    backbone = _text_in(config, "encoder.backbone", folder.config)
    width, depth = (
        None if backbone else _number_in(config, key, folder.config) for key in ("encoder.width", "encoder.depth")
    )
    seconds = _metric(last, "time/elapsed", folder.metrics) if "time/elapsed" in last else None
    return RunSummary(
        str(folder.path), "running" if is_locked(folder.path / LOCK) else "finished" if is_finished else "stopped",
        _text_in(config, "task.name", folder.config),
        _text_in(config, "data.shards", folder.config) or (json.dumps(mixture, default=str) if mixture else None),
        backbone, width if width is None else int(width), depth if depth is None else int(depth), steps, total,
        _metric(last, "train/loss", folder.metrics) if "train/loss" in last else None, scores,
        _text_in(health, "verdict", folder.health), None if seconds is None else seconds / 3600,
    )  # fmt: skip


def _total_steps(config: Mapping[str, Any], last: Mapping[str, Any], folder: RunFolder) -> int | None:
    """Number of optimizer steps of a whole run; None if its settings and metrics do not tell."""
    steps, epochs = (_number_in(config, key, folder.config) for key in ("train.steps", "train.epochs"))
    if steps is not None:
        return int(steps)
    epoch = _number_in(last, "epoch", folder.metrics)
    if not (epochs and epoch):
        return None
    try:
        return max(1, round(epochs * round(last["step"] / epoch)))  # as RunPlan.make counts them
    except OverflowError:
        return None


def _metric(line: Mapping[str, Any], key: str, file: Path) -> float:
    """A number in a line of metrics.jsonl; null stands for one that was not finite."""
    value = _number_in(line, key, file)
    return math.nan if value is None else value


def value_in(values: Any, key: str) -> Any:
    """The value under a dotted key; None if there is no such key, or no section above it."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _number_in(values: Mapping[str, Any], key: str, file: Path) -> float | None:
    """The finite number under a key; None for null or a missing key.

    Args:
        values: Content of the file.
        key: The dotted key.
        file: The file, for the message.

    Raises:
        ValueError: The value is something else.
    """
    value = value_in(values, key)
    if value is None:
        return None
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        is_number = False
    if not is_number:
        raise ValueError(f"{printable(file)}: {key}: expected a finite number, not {quoted(value)}.")
    return float(value)


def _text_in(values: Mapping[str, Any], key: str, file: Path) -> str | None:
    """The text under a key; arguments and errors as for `_number_in`."""
    value = value_in(values, key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{printable(file)}: {key}: expected text, not {quoted(value)}.")
    return value


def _split_numbers(path: str) -> list[tuple[bool, float, str]]:
    """A sort key by which depth=2 comes before depth=12."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", path)
    return [(number % 2 == 1, float(piece) if number % 2 else 0.0, piece) for number, piece in enumerate(pieces)]


def _loss(value: float | None) -> str:
    """A loss in a cell."""
    return _format(value) if value is None or not math.isfinite(value) else decimals(value)


def _format(value: float | None, form: str = ",") -> str:
    """A number in a cell; a dash for none."""
    return "–" if value is None else "not finite" if not math.isfinite(value) else format(value, form)
