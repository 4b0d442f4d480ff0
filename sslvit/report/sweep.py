"""`sslvit sweep`: a recipe with each combination of some settings, one run after the other; a table and a figure."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sslvit.api import read_settings
from sslvit.data.open import open_data
from sslvit.evaluate.probe import open_labeled
from sslvit.figures import plot_ranges
from sslvit.files import brief, expand_path, printable, write_atomically
from sslvit.messages import for_python
from sslvit.report.sweep_script import pretrain_command, write_script
from sslvit.results import Result
from sslvit.run_plan import RunPlan
from sslvit.settings import ProbeSettings, RunSettings, SupervisedSettings
from sslvit.settings.data import one_source
from sslvit.settings.load import by_dotted_key
from sslvit.settings.sweep import combinations, in_words, swept_keys
from sslvit.train.compilation import compile_mode
from sslvit.train.folder import RunFolder
from sslvit.train.prepare import check_data, check_machine, resolve_defaults, resolve_processes
from sslvit.train.run import pretrain
from sslvit.train.runs import SCORES, RunList, RunSummary, summarize

logger = logging.getLogger(__name__)

MARK, FIGURE = "sweep.json", "sweep.png"


@dataclass
class SweepRun:
    """One run of a sweep.

    Args:
        folder: Its run folder.
        changes: Settings that differ from the recipe's, by dotted key.
        settings: All of its settings.
    """

    folder: RunFolder
    changes: dict[str, Any]
    settings: RunSettings

    @property
    def name(self) -> str:
        """Name of its folder, which says the swept values."""
        return self.folder.path.name


@dataclass(repr=False)
class Sweep(Result):
    """Runs of a grid of settings.

    Args:
        found: The runs.
        failed: Name of a run that failed just now -> why.
        figure: PNG of score or loss against each swept setting; None before the first run has finished.
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
        """The table of the runs, what failed, and where the figure is."""
        failed = [f"failed: {name}: {printable(reason, 400)}" for name, reason in self.failed.items()]
        if failed:
            failed.append("the same command tries these again")
        return "\n".join([self.found.text(), *failed, *([str(self.figure)] if self.figure else [])])

    def to_dict(self) -> dict[str, Any]:
        """The runs as records, their swept values, what failed, and the figure."""
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
    """Pretrain by a recipe with each combination of some settings, one run after the other.

    Runs that finished earlier are left as they are, and those that stopped go on. A run that fails does not keep the
    others from running.

    Args:
        config: YAML file, or the name of a recipe such as mae/digits.
        data: Folder of images or of shards, or several .tar files; None for the recipe's data.shards.
        out: Folder for the run folders, which are named by the swept values.
        grid: Dotted key -> list of values, such as {"encoder.depth": [2, 4], "seed": [0, 1]}.
        init: Encoder whose weights are the initialization of each run.
        changes: Settings that all runs share, as in `pretrain`; those of the grid come after them.

    Returns:
        The runs as a table, the scores, and a figure.

    Raises:
        FileNotFoundError: No such recipe, or no data there.
        ValueError: A combination that cannot run, said before the first one starts, or a folder that is in use.

    Example:
        made = sslvit.sweep("mae/digits", "shards/digits", "runs/depth", {"encoder.depth": [2, 4], "train.steps": [10]})
        print(made)
    """
    if not swept_keys(grid or {}):
        raise ValueError('grid: no setting has several values. Give some, as in grid={"encoder.depth": [2, 4]}.')
    grid = {key: [value] for key, value in changes.items() if key not in (grid or {})} | dict(grid or {})
    planned = plan_sweep(config, one_source(data), out, grid, init)
    check_folder(Path(expand_path(out)), planned)
    for run in planned:
        check_run(run)
    _write_mark(Path(expand_path(out)), planned)
    failed: dict[str, str] = {}
    for number, run in enumerate(planned, 1):
        state = state_of(run)
        logger.info(f"run {number} of {len(planned)}: {run.name}" + ("" if state == "stopped" else f", {state}"))
        if state == "stopped" and (reason := train(run)):
            failed[run.name] = reason
            logger.warning(f"{run.name} failed: {printable(reason, 400)}")
    return report_sweep(Path(expand_path(out)), planned, grid, failed)


def train(run: SweepRun) -> str | None:
    """Start or resume a run; gives the reason where it fails for one that need not hold for the others.

    Raises:
        ValueError: It cannot run; the message names it.
    """
    if compile_mode(run.settings.train) is not None:
        torch.compiler.reset()  # the programs of earlier runs count against torch's limit for a function
    try:
        pretrain(run.settings, resume=run.folder.goes_on)
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}") from error
    except (RuntimeError, OSError) as error:  # a loss that is not finite, memory that is full
        return " ".join(str(error).split()) or type(error).__name__
    return None


def plan_sweep(
    config: str | Path, data: str | None, out: str | Path, grid: Mapping[str, Sequence[Any]],
    init: str | os.PathLike[str] | None = None,
) -> list[SweepRun]:  # fmt: skip
    """The runs of a sweep, each with settings that are valid by themselves.

    Raises:
        ValueError: A combination is not; the message names it.
    """
    given = {"data.shards": data and expand_path(data), "init": init and expand_path(os.fspath(init))}
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("out", "init", "data.shards", "data.mixture"):
        if key in grid and (key == "out" or key in given or (data and key == "data.mixture")):
            raise ValueError(f"--{key}: {'--out names the folder of all runs' if key == 'out' else 'given twice'}.")
    planned = []
    for name, changes in combinations(grid).items():
        folder = RunFolder(Path(expand_path(out)) / name)
        try:
            settings = read_settings(config, given | {"out": str(folder.path)} | changes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        planned.append(SweepRun(folder, changes, settings))
    _check_length(planned)
    return planned


def _check_length(planned: list[SweepRun]) -> None:
    """Refuse recipes that a sweep cannot compare: with labels, or with a length that each run would choose itself."""
    for run in planned:
        if isinstance(run.settings.task, SupervisedSettings):
            raise ValueError("--config: a sweep pretrains, and this recipe trains with labels. See sslvit finetune.")
        if run.settings.train.epochs is None and run.settings.train.steps is None:
            raise ValueError(
                "train.epochs: null, so each run would choose a length of its own. Give one to all: --train.epochs 100"
            )


def _check(settings: RunSettings) -> None:
    settings = replace(settings, train=resolve_processes(settings.train))
    if settings.train.ranks > 1:
        raise ValueError(
            "train.devices: a sweep trains on one device. --list prints the commands of the runs, which start their "
            "own processes, and --slurm FILE writes a script of them."
        )
    check_machine(settings)
    index, plan = open_data(settings.data, settings.seed, settings.train.batch_multiple, settings.task.usual.batch)
    check_data(settings, index, plan)
    length = RunPlan.make(settings.train, plan.steps_per_epoch, plan.global_batch_size, settings.seed)
    resolve_defaults(settings, None, index, length)
    online = settings.online
    if online.train is not None and online.val is not None:
        open_labeled(ProbeSettings(online.train, online.val, neighbors=[], allow_same_data=True))


def check_run(run: SweepRun) -> None:
    """Refuse what a run would refuse before its first step; the message names it."""
    try:
        _check(run.settings)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{run.name}: {error}") from error


def state_of(run: SweepRun) -> str:
    """Finished, running or stopped; a run that has not begun is stopped at step 0."""
    return summarize(run.folder).state if run.folder.config.exists() else "stopped"


def check_folder(out: Path, planned: list[SweepRun]) -> None:
    """Refuse a folder that holds something else, and runs there with other settings than they would go on with.

    Raises:
        ValueError: It does; the message names the entry, or the settings.
    """
    if not out.exists():
        return
    before = _read_mark(out)
    names = {run.name for run in planned} | set(before) | {MARK, FIGURE}
    others = [] if (out / MARK).exists() else [entry.name for entry in out.iterdir() if entry.name not in names]
    if others:
        raise ValueError(f"{printable(out)}: in use, and not by this sweep ({brief(others[0])}). Choose another --out.")
    for run in planned:
        if run.name not in before or not run.folder.config.exists():
            continue
        now = recorded(run)
        changed = [f"{key} {brief(before[run.name].get(key))} -> {brief(now.get(key))}"
                   for key in {**before[run.name], **now} if before[run.name].get(key) != now.get(key)]  # fmt: skip
        if changed:
            raise ValueError(
                f"{printable(run.folder.path)}: began with other settings ({'; '.join(changed[:4])}). Restore them, or "
                "choose another --out."
            )


def recorded(run: SweepRun) -> dict[str, Any]:
    """The settings of a run as they were asked for, as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(by_dotted_key(asdict(run.settings))))
    return {key: value for key, value in found.items() if key != "out"}  # the folder may move


def _read_mark(out: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((out / MARK).read_text())["runs"] if (out / MARK).exists() else {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{printable(out / MARK)}: damaged. Delete it; the runs beside it stay.") from error
    return content if isinstance(content, dict) else {}


def _write_mark(out: Path, planned: list[SweepRun]) -> None:
    """Write down the settings of the runs, beside those of earlier ones."""
    out.mkdir(parents=True, exist_ok=True)
    runs = _read_mark(out) | {run.name: recorded(run) for run in planned}
    write_atomically(out / MARK, json.dumps({"runs": runs}, indent=1) + "\n")


# ---- what comes of it ----------------------------------------------------------------------------------------


def report_sweep(
    out: Path, planned: list[SweepRun], grid: Mapping[str, Sequence[Any]], failed: dict[str, str]
) -> Sweep:
    """The runs, and a figure of those that have finished."""
    swept = swept_keys(grid)
    summaries = {run.name: summarize(run.folder) for run in planned if run.folder.config.exists()}
    finished = [(run, summaries[run.name]) for run in planned
                if run.name in summaries and summaries[run.name].state == "finished"]  # fmt: skip
    label, numbers = measured([summary for _, summary in finished])
    panels = {
        key: {
            in_words(value): [number for (run, _), number in zip(finished, numbers, strict=True)
                              if run.changes[key] == value]
            for value in grid[key]
        }
        for key in swept
    }  # fmt: skip
    figure = plot_ranges(out / FIGURE, panels, label, f"{len(finished)} runs: mean and range") if finished else None
    values = {run.name: {key: run.changes[key] for key in swept} for run in planned}
    return Sweep(RunList(list(summaries.values())), failed, figure, values)


def measured(summaries: list[RunSummary]) -> tuple[str, list[float]]:
    """What finished runs are compared by: a score that all of them have, or their last loss."""
    for name in SCORES.values():
        if summaries and all(name in one.scores for one in summaries):
            return f"{name} accuracy (%)", [one.scores[name] for one in summaries]
    return "last loss", [float("nan") if one.loss is None else one.loss for one in summaries]


# ---- elsewhere -----------------------------------------------------------------------------------------------


def list_commands(planned: list[SweepRun], shared: Sequence[str]) -> list[str]:
    """A shell command for each run that has not finished.

    Args:
        planned: The runs.
        shared: Options of `sslvit pretrain` that are the same for all runs.
    """
    check_folder(planned[0].folder.path.parent, planned)
    return [pretrain_command(shared, run.folder, run.changes) for run in planned if state_of(run) != "finished"]


def script_sweep(file: str | Path, planned: list[SweepRun], shared: Sequence[str]) -> Path:
    """Write a script for sbatch that runs each combination as a job of an array.

    Args:
        file: The script.
        planned: The runs.
        shared: Options of `sslvit pretrain` that are the same for all runs.

    Raises:
        ValueError: The runs take different numbers of machines or devices, which one array cannot have.
    """
    out = planned[0].folder.path.parent
    check_folder(out, planned)
    sizes = {(run.settings.train.nodes or 1, run.settings.train.devices or 1) for run in planned}
    if len(sizes) > 1:
        raise ValueError("train.devices, train.nodes: the jobs of one array are alike. Sweep these with --list.")
    _write_mark(out, planned)
    uses_gpu = planned[0].settings.train.accelerator != "cpu"
    runs = {run.folder: run.changes for run in planned}
    return write_script(Path(file), shared, out, runs, *sizes.pop(), uses_gpu)
