"""The runs of a sweep: their settings and names, and the checks before the first run starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sslvit.checkpoint import load_encoder
from sslvit.compatibility import check_same
from sslvit.data.open import open_run_data
from sslvit.evaluate.labeled import open_labeled
from sslvit.files import brief, expand_path
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, ProbeSettings, RunSettings, SupervisedSettings
from sslvit.settings.load import by_dotted_key
from sslvit.settings.sweep import combinations, name_run, swept_keys
from sslvit.tasks.start import adaptable
from sslvit.train.folder import RunFolder
from sslvit.train.hardware import resolve_processes
from sslvit.train.prepare import check_data, check_machine, read_settings, resolve_defaults
from sslvit.train.resume import keep_resolved


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
        """Name of the run folder, which contains the swept values."""
        return self.folder.path.name


def plan_sweep(
    config: str | Path, data: str | None, out: str | Path, grid: Mapping[str, Sequence[Any]],
    init: str | os.PathLike[str] | None = None,
) -> list[SweepRun]:  # fmt: skip
    """Plan the runs of a sweep and validate the settings of each.

    Raises:
        ValueError: A combination is invalid, or two are the same run; the message names them.
    """
    given = {"data.shards": data and expand_path(data), "init": init and expand_path(init)}
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("out", "init", "data.shards", "data.mixture"):
        if key in grid and (key == "out" or key in given or (data and key == "data.mixture")):
            raise ValueError(f"--{key}: {'--out names the folder of all runs' if key == 'out' else 'given twice'}.")
    planned: dict[str, SweepRun] = {}
    typed: dict[str, str] = {}  # settings of a run -> its name with the values as typed
    for words, changes in combinations(grid).items():
        try:
            settings = read_settings(config, given | changes)
        except ValueError as error:
            raise ValueError(f"{words}: {error}") from error
        built = by_dotted_key(asdict(settings))
        if (same := typed.setdefault(repr(built), words)) != words:
            raise ValueError(f"sweep: {brief(same)} and {brief(words)} are the same run. Leave one out.")
        values = {key: changes[key] for key in swept_keys(grid)}
        numbers = {key: built[key] for key in values if isinstance(built.get(key), (int, float, list))}
        name = name_run(values | numbers)  # 0.001 even if 1e-3 was typed
        if name in planned:
            raise ValueError(f"sweep: two runs would be called {brief(name)}. Sweep their values one after the other.")
        folder = RunFolder(Path(expand_path(out)) / name)
        planned[name] = SweepRun(folder, changes, replace(settings, out=str(folder.path)))
    _check_length(list(planned.values()))
    return list(planned.values())


def _check_length(planned: list[SweepRun]) -> None:
    """Refuse recipes that a sweep cannot compare: supervised ones, and ones without a fixed length."""
    for run in planned:
        train = run.settings.train
        if isinstance(run.settings.task, SupervisedSettings):
            raise ValueError("--config: a sweep pretrains, and this recipe trains with labels. See sslvit finetune.")
        if train.epochs is None and train.steps is None and train.budget is None:
            raise ValueError(
                "train.epochs: null, so each run would choose a length of its own. Give one to all: --train.epochs 100"
            )


def check_runs(planned: list[SweepRun], is_elsewhere: bool = False) -> dict[str, RunSettings]:
    """Run the checks that each run would do before its first step.

    Args:
        planned: The runs.
        is_elsewhere: Whether they start as separate commands or jobs, perhaps with several processes or on a GPU.

    Returns:
        Name of each run -> its settings with every null resolved, except for the length of a run with a time budget.

    Raises:
        FileNotFoundError: The data or the initial encoder does not exist; the message names the run.
        ValueError: A run cannot start; the message names it.
    """
    starts: dict[str, EncoderSettings] = {}
    resolved = {}
    for run in planned:
        try:
            resolved[run.name] = _check(run, is_elsewhere)
            _check_start(run, starts)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{run.name}: {error}") from error
    return resolved


def _check(run: SweepRun, is_elsewhere: bool) -> RunSettings:
    settings = keep_resolved(run.settings, run.folder) if run.folder.config.exists() else run.settings
    train = settings.train
    if is_elsewhere:
        train = replace(train, devices=train.devices or 1, nodes=train.nodes or 1, accelerator="auto")
    else:
        train = resolve_processes(train)
        if train.ranks > 1:
            raise ValueError(
                "train.devices: a sweep trains on one device. --list prints the commands of the runs, which start "
                "their own processes, and --slurm FILE writes a script of them."
            )
    settings = replace(settings, train=train)
    check_machine(settings)
    index, plan = open_run_data(settings)
    check_data(settings, index, plan)
    if train.epochs is None and train.steps is None:
        train = replace(train, epochs=1.0)  # with a budget, the length is only known after timing steps
    length = RunPlan.make(train, plan.steps_per_epoch, plan.global_batch_size, settings.seed)
    online = settings.online
    if online.train is not None and online.val is not None:
        open_labeled(ProbeSettings(online.train, online.val, neighbors=[], allow_same_data=True))
    return resolve_defaults(settings, None, index, length)


def _check_start(run: SweepRun, starts: dict[str, EncoderSettings]) -> None:
    """Refuse an initial encoder that does not match the run, unless the run is resumed.

    Args:
        run: The run.
        starts: Cache: initial encoder -> its settings.
    """
    init = run.settings.init
    if not init or run.folder.goes_on:
        return
    if init not in starts:
        starts[init] = load_encoder(init).settings
    check_same(starts[init], run.settings.encoder, init, adaptable(starts[init]))
