"""The runs of a sweep as shell commands, and as an array of SLURM jobs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslvit.files import printable, write_atomically
from sslvit.reports.sweep_folder import check_folder, claim_folder, state_of
from sslvit.reports.sweep_plan import SweepRun, check_runs
from sslvit.settings.sweep import format_value
from sslvit.train.folder import RunFolder

MAX_COMMENT = 1000  # characters of a path
# signals and resumption are those of tools/slurm/pretrain.sbatch
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
    """A shell command for each run that has not finished.

    Args:
        planned: The runs.
        shared: Options of `sslvit pretrain` that are the same for all runs.

    Raises:
        FileNotFoundError: No data there.
        ValueError: A run cannot start, or the folder is in use.
    """
    runs = _claim_elsewhere(planned)
    return [pretrain_command(shared, run.folder, run.changes) for run in runs]


def script_sweep(file: str | Path, planned: list[SweepRun], shared: Sequence[str]) -> Path:
    """Write a script for sbatch that runs each combination that has not finished as a job of an array.

    Args:
        file: The script.
        planned: The runs.
        shared: Options of `sslvit pretrain` that are the same for all runs.

    Raises:
        FileNotFoundError: No data there.
        ValueError: A run cannot start, the folder is in use, all runs have finished, or they take different machines,
            devices or accelerators, which one array cannot have.
    """
    out = planned[0].folder.path.parent
    trains = [run.settings.train for run in planned]
    sizes = {(train.nodes or 1, train.devices or 1, train.accelerator != "cpu") for train in trains}
    if len(sizes) > 1:
        raise ValueError(
            "train.devices, train.nodes, train.accelerator: the jobs of one array are alike. Sweep these with --list."
        )
    runs = _claim_elsewhere(planned)
    if not runs:
        raise ValueError(f"{printable(out)}: all its runs have finished, so there is no job for --slurm. Leave it out.")
    return write_script(Path(file), shared, out, {run.folder: run.changes for run in runs}, *sizes.pop())


def _claim_elsewhere(planned: list[SweepRun]) -> list[SweepRun]:
    """The runs that have not finished, when all are checked and the folder is this sweep's."""
    out = planned[0].folder.path.parent
    check_folder(out, planned)
    resolved = check_runs(planned, is_elsewhere=True)
    runs = [run for run in planned if state_of(run) != "finished"]
    claim_folder(out, planned, resolved)
    return runs


def pretrain_command(shared: Sequence[str], folder: RunFolder, changes: Mapping[str, Any]) -> str:
    """The command that starts a run, or resumes it where there is a checkpoint.

    Args:
        shared: Options that are the same for all runs.
        folder: The run's folder.
        changes: Settings that differ from the recipe's, by dotted key.
    """
    words = [*shared, *format_options(changes), "--out", str(folder.path), *(["--resume"] if folder.goes_on else [])]
    return shlex.join(["sslvit", "pretrain", *words])


def format_options(changes: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command."""
    return [f"--{key}={format_value(value)}" for key, value in changes.items()]


def quote_in_comment(text: object) -> str:
    """Text as one word of a shell on one line, so that it does not leave a comment."""
    return shlex.quote(printable(text, MAX_COMMENT))


def write_script(
    file: Path, shared: Sequence[str], out: Path, runs: Mapping[RunFolder, Mapping[str, Any]], nodes: int, devices: int,
    uses_gpu: bool,
) -> Path:  # fmt: skip
    """Write an sbatch script that runs commands as an array of jobs.

    Args:
        file: The script.
        shared: Options that are the same for all runs.
        out: Folder of the run folders.
        runs: Run folder -> settings that differ from the recipe's.
        nodes: Number of machines of a run.
        devices: Number of processes on each of them.
        uses_gpu: Whether each process has a GPU.
    """
    cases = [
        f"{number})\n    out={shlex.quote(str(folder.path))}\n"
        f"    settings=({shlex.join([*shared, *format_options(changes)])})\n    ;;"
        for number, (folder, changes) in enumerate(runs.items())
    ]
    text = SCRIPT.format(
        count=len(cases), file=quote_in_comment(file), out=quote_in_comment(out), last=len(cases) - 1, nodes=nodes,
        devices=devices, job=quote_in_comment(out.name or "sweep"), cases="\n".join(cases),
        gpus=f"#SBATCH --gpus-per-node={devices}\n" if uses_gpu else "",
    )  # fmt: skip
    write_atomically(file, text)
    return file
