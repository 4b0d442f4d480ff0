"""Several runs: list them, or make them from a grid of settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sslvit.commands.files import report
from sslvit.commands.options import File, Reported
from sslvit.files import check_new
from sslvit.settings.choices import Arg


@dataclass(kw_only=True)
class RunsOptions(Reported):
    """List runs: task, data, encoder, steps, loss, scores, health, hours and state.

    Example: sslvit runs runs --csv runs.csv
    """

    folders: Annotated[list[str], Arg("FOLDER", position=1)]
    """Folders that are searched at any depth."""
    csv: Annotated[str | None, File] = None
    """File for the same as lines of values."""


def run_runs(options: RunsOptions) -> None:
    """List runs, and print the table."""
    check_new(options.csv)
    from sslvit.train.runs import runs

    found = runs(options.folders)
    if options.csv is not None:
        found.to_csv(options.csv)
    report(options, found.text(), found.to_dict())
