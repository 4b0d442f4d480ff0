"""Several runs: list them, or make them from a grid of settings."""

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

Names = list[str]  # under another name, as an option is called list


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


@dataclass(kw_only=True)
class BranchOptions(Reported):
    """Copy a run as it was at a checkpoint into a new folder, to resume it with another length or other settings.

    Example: sslvit branch runs/mae --step 6400 --out runs/mae-8000
    """

    run: Annotated[str, Arg("RUN", position=1)]
    """Run folder, which is left as it is."""
    out: Annotated[str, Arg("FOLDER")]
    """Folder of the new run."""
    step: int | None = None
    """Step of the checkpoint; null for the last one. train.keep_every keeps more of them."""


def run_branch(options: BranchOptions) -> None:
    """Copy it, and print how to go on."""
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
    """HTML file; null for report.html in the run's folder, or in this one for several runs. An earlier page there is
    replaced."""


def run_report(options: ReportOptions) -> None:
    """Write the page, and print where it is."""
    from sslvit.train.report import report as write

    page = write(options.runs, options.output)
    report(options, str(page), page.to_dict())


@dataclass(kw_only=True)
class SweepOptions(Reported, Recipe):
    """Pretrain by a recipe with each combination of some settings, one run after the other.

    Settings are given as --KEY VALUE, and several values with commas: --encoder.depth 2,4. A value that is a list
    stands in brackets, --optim.betas [0.9,0.95],[0.9,0.999], and text with a comma in quotes. Runs that finished
    earlier are left as they are, and those that stopped go on. --online.train SHARDS --online.val SHARDS scores each.

    Example: sslvit sweep mae/digits --data shards/digits --out runs/depth --encoder.depth 2,4 --train.steps 10
    """

    read_setting = staticmethod(read_values)

    config: Annotated[str, Arg("CONFIG", position=1)]
    """YAML file, or the name of a recipe, such as mae/digits."""
    data: Annotated[Names | None, Arg("SHARDS")] = None
    """Folder of images or shards, or several .tar files; null for the recipe's data.shards."""
    out: Annotated[str, Arg("FOLDER")] = "runs/sweep"
    """Folder for the run folders, which are named by the swept values."""
    init: Annotated[str | None, Arg("ENCODER")] = None
    """Encoder whose weights are the initialization of each run; null for the recipe's."""
    list: bool = False
    """Print a shell command for each run that has not finished, and run none."""
    slurm: Annotated[str | None, File] = None
    """Write a script for sbatch that runs each combination as a job of an array, and run none."""


def run_sweep(options: SweepOptions) -> int:
    """Train the runs, or say how; returns the exit code."""
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
