"""The folder of a sweep: the state of its runs, and sweep.json with the requested settings of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from sslvit.files import brief, printable, write_atomically
from sslvit.locks import lock_file
from sslvit.reports.sweep_plan import SweepRun, check_runs
from sslvit.settings import RunSettings
from sslvit.settings.describe import default_of
from sslvit.settings.load import by_dotted_key
from sslvit.train.runs import has_begun, summarize

logger = logging.getLogger(__name__)

MARK, FIGURE, LOCK = "sweep.json", "sweep.png", ".sweep.lock"


def state_of(run: SweepRun) -> str:
    """State of a run: finished, running or stopped; a run that has not begun counts as stopped."""
    return summarize(run.folder).state if has_begun(run.folder) else "stopped"


def claim_runs(planned: list[SweepRun], is_elsewhere: bool = False) -> list[SweepRun]:
    """Check all runs, claim the folder for this sweep, and return the unfinished runs.

    Args:
        planned: The runs.
        is_elsewhere: As in `check_runs`.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: A run cannot start, its files cannot be read, or the folder is in use.
    """
    out = planned[0].folder.path.parent
    check_folder(out, planned)
    resolved = check_runs(planned, is_elsewhere)
    unfinished = [run for run in planned if state_of(run) != "finished"]
    claim_folder(out, planned, resolved)
    return unfinished


def claim_folder(out: Path, planned: list[SweepRun], resolved: Mapping[str, RunSettings]) -> None:
    """Add the settings of the runs to sweep.json.

    Args:
        out: Folder of the sweep.
        planned: Its runs.
        resolved: Name of each run -> its settings with every null resolved.

    Raises:
        ValueError: The folder contains something else, or runs with different settings; the message names them.
    """
    with lock_file(out / LOCK):
        check_folder(out, planned)
        before = _read_mark(out)
        for run in planned:
            if run.name in before and run.folder.config.exists():
                _warn_of_changes(run)
            elif run.folder.config.exists():
                _check_config(run, resolved[run.name])
        runs = before | {run.name: record_settings(run.settings) for run in planned}
        write_atomically(out / MARK, json.dumps({"runs": runs}, indent=1) + "\n")


def check_folder(out: Path, planned: list[SweepRun]) -> None:
    """Refuse a folder that contains something else, or runs there that were requested with different settings.

    Raises:
        ValueError: The message names the entry, or the settings.
    """
    if not out.exists():
        return
    before = _read_mark(out)
    names = {run.name for run in planned} | {MARK, FIGURE, LOCK}
    others = [] if (out / MARK).exists() else [entry.name for entry in out.iterdir() if entry.name not in names]
    if others:
        raise ValueError(f"{printable(out)}: in use, and not by this sweep ({brief(others[0])}). Choose another --out.")
    for run in planned:
        if run.name in before and has_begun(run.folder):
            _refuse_changes(run, before[run.name])


def _check_config(run: SweepRun, resolved: RunSettings) -> None:
    """Refuse a run that is not in sweep.json and whose config.yaml differs from the settings it would get here."""
    asked, here = record_settings(run.settings), record_settings(resolved)
    there = by_dotted_key(run.folder.read_config())
    before = {
        key: asked[key] if key in asked and (asked[key] is None or value == here[key]) else value
        for key, value in there.items()
    }
    _refuse_changes(run, before)


def _warn_of_changes(run: SweepRun) -> None:
    """Warn of a run that was resumed outside the sweep with other values of the sweep's settings."""
    asked, there = record_settings(run.settings), by_dotted_key(run.folder.read_config())
    changed = [f"{key} {brief(asked[key])} -> {brief(there.get(key))}"
               for key in run.changes if asked.get(key) not in (None, there.get(key))]  # fmt: skip
    if changed:
        logger.warning(
            f"{printable(run.folder.path)}: was resumed with other settings ({'; '.join(changed[:4])}), so its score "
            "is not comparable with the others'"
        )


def _refuse_changes(run: SweepRun, before: dict[str, Any]) -> None:
    """Refuse a run that began with different settings; a setting missing in `before` counts as its default."""
    now, before = record_settings(run.settings), by_dotted_key(_default_values(run.settings)) | before
    changed = [f"{key} {brief(before.get(key))} -> {brief(now.get(key))}"
               for key in before | now if key != "out" and before.get(key) != now.get(key)]  # fmt: skip
    if changed:
        raise ValueError(
            f"{printable(run.folder.path)}: began with other settings ({'; '.join(changed[:4])}). Restore them, or "
            "choose another --out."
        )


def record_settings(settings: RunSettings) -> dict[str, Any]:
    """Settings by dotted key, as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(by_dotted_key(asdict(settings))))
    return {key: value for key, value in found.items() if key != "out"}  # the folder may move


def _default_values(settings: Any) -> dict[str, Any]:
    """Default values of nested settings."""
    values = {field: getattr(settings, field.name) for field in fields(settings)}
    return {field.name: _default_values(value) if is_dataclass(value) else default_of(field)
            for field, value in values.items()}  # fmt: skip


def _read_mark(out: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((out / MARK).read_text())["runs"] if (out / MARK).exists() else {}
        if not (isinstance(content, dict) and all(isinstance(one, dict) for one in content.values())):
            raise TypeError("expected settings by the name of a run")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{printable(out / MARK)}: damaged. Delete it; the runs beside it stay.") from error
    return content
