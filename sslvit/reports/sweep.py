"""`sslvit sweep`: pretrain with each combination of some settings, one run after another; a table and a figure."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslvit.data.python_data import is_dataset
from sslvit.figures import plot_ranges
from sslvit.files import printable
from sslvit.messages import for_python
from sslvit.reports.sweep_folder import FIGURE, claim_runs, state_of
from sslvit.reports.sweep_plan import SweepRun, plan_sweep
from sslvit.results import Result
from sslvit.settings.data import one_source
from sslvit.settings.sweep import format_value, plain_grid, swept_keys
from sslvit.train.hardware import compile_mode
from sslvit.train.run import pretrain
from sslvit.train.runs import SCORES, RunList, RunSummary, has_begun, list_runs

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class Sweep(Result):
    """The runs of a grid of settings.

    Args:
        found: The runs.
        failed: Name of each run that failed this time -> reason.
        figure: PNG of score or loss against each swept setting; None if no run has finished.
        values: Name of each run -> its values of the swept settings.
    """

    found: RunList
    failed: dict[str, str]
    figure: Path | None
    values: dict[str, dict[str, Any]]

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """The table of the runs."""
        return self.found.cells()

    def text(self) -> str:
        """The table of the runs, the failures, and the path of the figure."""
        failed = [f"failed: {name}: {printable(reason, 400)}" for name, reason in self.failed.items()]
        if failed:
            failed.append("the same command tries these again")
        return "\n".join([self.found.text(), *failed, *([str(self.figure)] if self.figure else [])])

    def to_dict(self) -> dict[str, Any]:
        """The runs as records, their swept values, the failures, and the path of the figure."""
        figure = None if self.figure is None else str(self.figure)
        return self.found.to_dict() | {"values": self.values, "failed": self.failed, "figure": figure}


@for_python
def sweep(
    config: str | Path,
    data: str | Path | Sequence[str | Path] | None = None,
    out: str | Path = "runs/sweep",
    grid: Mapping[str, Sequence[Any]] | None = None,
    init: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Sweep:
    """Pretrain with each combination of some settings of a recipe, one run after another.

    Finished runs are kept, and stopped runs are resumed. A failed run does not prevent the others from running.

    Args:
        config: YAML file, or the name of a recipe such as mae/digits.
        data: Folder of images or shards, or several .tar files; None for the recipe's data.shards.
        out: Folder for the run folders, which are named after the swept values.
        grid: Dotted key -> list of values, such as {"encoder.depth": [2, 4], "seed": [0, 1]}.
        init: Encoder whose weights initialize each run.
        changes: Settings that all runs share, as in `pretrain`; the grid takes precedence.

    Returns:
        The runs as a table, the scores, and a figure.

    Raises:
        FileNotFoundError: The recipe or the data does not exist.
        ValueError: A combination cannot run, which is checked before the first run starts, or the folder is in use.

    Example:
        made = sslvit.sweep("mae/digits", "shards/digits", "runs/depth", {"encoder.depth": [2, 4], "train.steps": [10]})
        print(made)
    """
    given = plain_grid(grid or {})
    if not swept_keys(given):
        raise ValueError('grid: no setting has several values. Give some, as in grid={"encoder.depth": [2, 4]}.')
    if is_dataset(data):
        raise ValueError("data: a sweep takes shards or a folder, which other processes can open. Pack the images.")
    shared = plain_grid({key: [value] for key, value in changes.items() if key not in given})
    planned = plan_sweep(config, one_source(data), out, shared | given, init)
    claim_runs(planned)
    failed: dict[str, str] = {}
    for number, run in enumerate(planned, 1):
        state = state_of(run)
        logger.info(f"run {number} of {len(planned)}: {run.name}" + ("" if state == "stopped" else f", {state}"))
        # the error does not count if another process has just started this run
        if state == "stopped" and (reason := train(run)) and state_of(run) != "running":
            failed[run.name] = reason
            logger.warning(f"{run.name} failed: {printable(reason, 400)}")
    return report_sweep(planned, swept_keys(given), failed)


def train(run: SweepRun) -> str | None:
    """Start or resume a run; returns the reason if it fails, which need not affect the other runs."""
    if compile_mode(run.settings.train) is not None:
        torch.compiler.reset()  # earlier runs count towards torch's recompile limit
    is_anew = run.folder.has_diverged_at_start
    if is_anew:
        logger.info(
            f"{run.name}: was not finite before its first checkpoint; it starts at step 0 without its incident/"
        )
    try:
        pretrain(run.settings, resume=run.folder.goes_on, overwrite=is_anew)
    except (ValueError, RuntimeError, OSError) as error:  # such as a non-finite loss or lack of memory
        return " ".join(str(error).split()) or type(error).__name__
    return None


# ---- results -------------------------------------------------------------------------------------------------


def report_sweep(planned: list[SweepRun], swept: Sequence[str], failed: dict[str, str]) -> Sweep:
    """List the runs, and plot those that have finished.

    Args:
        planned: The runs of a sweep.
        swept: Dotted keys of the settings that have several values.
        failed: Name of each run that failed this time -> reason.
    """
    found = list_runs(run.folder.path for run in planned if has_begun(run.folder))
    finished = {one.path: one for one in found if one.state == "finished"}
    label, numbers = choose_measure(list(finished.values()))
    number_of = dict(zip(finished, numbers, strict=True))
    panels: dict[str, dict[str, list[float]]] = {key: {} for key in swept}
    for key in swept:
        for run in planned:
            number = number_of.get(str(run.folder.path))
            panels[key].setdefault(format_value(run.changes[key]), []).extend([] if number is None else [number])
    file, title = planned[0].folder.path.parent / FIGURE, f"{len(finished)} runs: mean and range"
    figure = plot_ranges(file, panels, label, title) if finished else None
    values = {run.name: {key: run.changes[key] for key in swept} for run in planned}
    return Sweep(found, failed, figure, values)


def choose_measure(summaries: list[RunSummary]) -> tuple[str, list[float]]:
    """Choose the measure for comparing finished runs: a score that all of them have, or the last loss."""
    for name in SCORES.values():
        if summaries and all(name in one.scores for one in summaries):
            return f"{name} accuracy (%)", [one.scores[name] for one in summaries]
    return "last loss", [float("nan") if one.loss is None else one.loss for one in summaries]
