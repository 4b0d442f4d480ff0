"""Commands for runs: list, branch, report and sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sslvit.commands.files import report
from sslvit.commands.options import File, Output, Recipe, Reported
from sslvit.commands.training import check_recipe
from sslvit.files import check_new
from sslvit.settings.choices import Arg
from sslvit.settings.data import one_source
from sslvit.settings.sweep import combinations, read_values

Names = list[str]  # an alias, since a field named list hides the type


@dataclass(kw_only=True)
class RunsOptions(Reported):
    """List runs: task, data, encoder, steps, loss, scores, health, hours and state.

    Example: sslvit runs runs --csv runs.csv
    """

    folders: Annotated[list[str], Arg("FOLDER", position=1)]
    """Folders to search for runs at any depth."""
    csv: Annotated[str | None, File] = None
    """CSV file for the table."""


def run_runs(options: RunsOptions) -> None:
    """List runs, and print the table."""
    check_new(options.csv)
    from sslvit.train.runs import runs

    found = runs(options.folders)
    if options.csv is not None:
        found.to_csv(options.csv)
    report(options, found.text(), found.to_dict())


@dataclass(kw_only=True)
class BranchOptions(Reported):
    """Copy a run at one of its checkpoints to a new folder, to resume it with another length or other settings.

    Example: sslvit branch runs/mae --step 6400 --out runs/mae-8000
    """

    run: Annotated[str, Arg("RUN", position=1)]
    """Run folder, which is not changed."""
    out: Annotated[str, Arg("FOLDER")]
    """Folder of the new run."""
    step: int | None = None
    """Step of the checkpoint; null for the last one. Set train.keep_every to keep earlier checkpoints."""


def run_branch(options: BranchOptions) -> None:
    """Copy a run, and print the command that resumes the copy."""
    from sslvit.train.branch import branch

    new = branch(options.run, options.out, options.step)
    report(options, f"{new}: resume it with {new.resume_command}", new.to_dict())


@dataclass(kw_only=True)
class ReportOptions(Reported):
    """Show runs on one page: settings, curves, time, data, pictures and scores.

    Example: sslvit report runs/mae runs/dino -o compared.html
    """

    runs: Annotated[list[str], Arg("RUN", position=1)]
    """Run folders; the curves of several are plotted together."""
    output: Annotated[str | None, Output] = None
    """HTML file; null for report.html in the run's folder, or in the current folder for several runs. An earlier page
    is replaced."""


def run_report(options: ReportOptions) -> None:
    """Write the page, and print its path."""
    from sslvit.train.report import report as write

    page = write(options.runs, options.output)
    report(options, str(page), page.to_dict())


@dataclass(kw_only=True)
class SweepOptions(Reported, Recipe):
    """Pretrain with each combination of some settings of a recipe, one run after another.

    Settings are given as --KEY VALUE, and several values are separated by commas: --encoder.depth 2,4. Lists are
    written in brackets, --optim.betas [0.9,0.95],[0.9,0.999], and text that contains a comma in quotes. Finished runs
    are kept, and stopped runs are resumed. --online.train SHARDS --online.val SHARDS scores each run.

    Example: sslvit sweep mae/digits --data shards/digits --out runs/depth --encoder.depth 2,4 --train.steps 10
    """

    read_setting = staticmethod(read_values)

    config: Annotated[str, Arg("CONFIG", position=1)]
    """YAML file, or the name of a recipe, such as mae/digits."""
    data: Annotated[Names | None, Arg("SHARDS")] = None
    """Folder of images or shards, or several .tar files; null for the recipe's data.shards."""
    out: Annotated[str, Arg("FOLDER")] = "runs/sweep"
    """Folder for the run folders, which are named after the swept values."""
    init: Annotated[str | None, Arg("ENCODER")] = None
    """Encoder whose weights initialize each run; null for the recipe's."""
    list: bool = False
    """Print a shell command for each unfinished run instead of training."""
    slurm: Annotated[str | None, File] = None
    """Write an sbatch script that runs each unfinished combination as a job of an array, instead of training."""


def run_sweep(options: SweepOptions) -> int:
    """Train the runs, or write the commands for them; returns the exit code."""
    check_new(options.slurm)
    if options.list and options.slurm:
        raise ValueError("--list and --slurm exclude each other: commands on the screen, or a script?")
    given = {"data.shards": one_source(options.data), "init": options.init}
    given = {key: value for key, value in given.items() if value}
    for name, changes in combinations(options.changes).items():
        try:
            check_recipe(options.config, given | changes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    from sslvit.reports.sweep import plan_sweep, sweep
    from sslvit.reports.sweep_script import list_commands, script_sweep

    words = (options.config, one_source(options.data), options.out, options.changes, options.init)
    named = {"--config": options.config, "--data": words[1], "--init": options.init, "--plugin": options.plugin}
    shared = [word for option, value in named.items() if value for word in (option, value)]
    if options.list:
        commands = list_commands(plan_sweep(*words), shared)
        report(options, "\n".join(commands) or "# all runs have finished", commands)
        return 0
    if options.slurm is not None:
        file = str(script_sweep(options.slurm, plan_sweep(*words), shared))
        report(options, file, {"script": file})
        return 0
    made = sweep(*words)
    report(options, f"\n{made}", made.to_dict())
    return 1 if made.failed else 0
