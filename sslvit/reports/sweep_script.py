"""The runs of a sweep as shell commands or as a SLURM job array."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslvit.files import printable, write_atomically
from sslvit.reports.sweep_folder import claim_runs
from sslvit.reports.sweep_plan import SweepRun
from sslvit.settings.sweep import format_value

MAX_COMMENT = 1000  # most characters of a path in a comment
# signals and resuming work as in tools/slurm/pretrain.sbatch
SCRIPT = """#!/bin/bash
# {count} runs of a sweep, each a job of an array; written by `sslvit sweep --slurm`.
#   sbatch {file}     starts them, or resumes those that stopped
#   sslvit runs {out}     lists them
# Options of sbatch on the command line win over those here.
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={devices}
{gpus}#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
case "${{SLURM_ARRAY_TASK_ID:-}}" in
{cases}
*)
    echo "start this script as an array: sbatch $0" >&2
    exit 2
    ;;
esac

# compute nodes often reach nothing outside; `wandb sync` sends what was written later
export WANDB_MODE="${{WANDB_MODE:-offline}}" HF_HUB_OFFLINE="${{HF_HUB_OFFLINE:-1}}"
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"

resume=()
if [ -e "$out/checkpoints/last.ckpt" ]; then
    resume=(--resume)
elif [ -d "$out/incident" ] && [ ! -e "$out/encoder" ] && ! ls "$out"/checkpoints/*.ckpt >/dev/null 2>&1; then
    resume=(--overwrite) # it was not finite before its first checkpoint
fi

# signals go to the job's steps; the shell waits for them, and sslvit asks for the job to be run again itself
srun --kill-on-bad-exit=1 sslvit pretrain --out "$out" "${{settings[@]}}" ${{resume[@]+"${{resume[@]}}"}} &
step=$!
trap 'kill -USR1 "$step" 2>/dev/null' USR1 TERM
wait "$step"
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before the step has ended
    wait "$step"
done
wait "$step" # gives the exit code again
exit $?
"""


def list_commands(planned: list[SweepRun], shared: Sequence[str]) -> list[str]:
    """Make a shell command for each unfinished run, which resumes the run if it has a checkpoint.

    Args:
        planned: The runs.
        shared: Options of `sslvit pretrain` that are the same for all runs.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: A run cannot start, or the folder is in use.
    """
    runs = claim_runs(planned, is_elsewhere=True)
    commands = []
    for run in runs:
        words = [*shared, *format_options(run.changes), "--out", str(run.folder.path)]
        if run.folder.has_diverged_at_start:
            words.append("--overwrite")
        elif run.folder.goes_on:
            words.append("--resume")
        commands.append(shlex.join(["sslvit", "pretrain", *words]))
    return commands


def script_sweep(file: str | Path, planned: list[SweepRun], shared: Sequence[str]) -> Path:
    """Write an sbatch script that runs each unfinished combination as a job of an array.

    Args:
        file: The script.
        planned: The runs.
        shared: Options of `sslvit pretrain` that are the same for all runs.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: A run cannot start, the folder is in use, all runs have finished, or the runs need different numbers
            of nodes or devices or different accelerators, which one array cannot have.
    """
    file, out = Path(file), planned[0].folder.path.parent
    trains = [run.settings.train for run in planned]
    sizes = {(train.nodes or 1, train.devices or 1, train.accelerator != "cpu") for train in trains}
    if len(sizes) > 1:
        raise ValueError(
            "train.devices, train.nodes, train.accelerator: the jobs of one array are alike. Sweep these with --list."
        )
    runs = claim_runs(planned, is_elsewhere=True)
    if not runs:
        raise ValueError(f"{printable(out)}: all its runs have finished, so there is no job for --slurm. Leave it out.")
    cases = [
        f"{number})\n    out={shlex.quote(str(run.folder.path))}\n"
        f"    settings=({shlex.join([*shared, *format_options(run.changes)])})\n    ;;"
        for number, run in enumerate(runs)
    ]
    nodes, devices, uses_gpu = sizes.pop()
    text = SCRIPT.format(
        count=len(cases), file=quote_in_comment(file), out=quote_in_comment(out), last=len(cases) - 1, nodes=nodes,
        devices=devices, job=quote_in_comment(out.name or "sweep"), cases="\n".join(cases),
        gpus=f"#SBATCH --gpus-per-node={devices}\n" if uses_gpu else "",
    )  # fmt: skip
    write_atomically(file, text)
    return file


def format_options(changes: Mapping[str, Any]) -> list[str]:
    """Format settings as command-line options."""
    return [f"--{key}={format_value(value)}" for key, value in changes.items()]


def quote_in_comment(text: object) -> str:
    """Quote text as one shell word on one line, so that it cannot end a comment."""
    return shlex.quote(printable(text, MAX_COMMENT))
