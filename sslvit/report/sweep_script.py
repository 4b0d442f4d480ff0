"""The runs of a sweep as shell commands, and as an array of SLURM jobs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslvit.files import write_atomically
from sslvit.settings.sweep import in_words
from sslvit.train.folder import RunFolder

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


def pretrain_command(shared: Sequence[str], folder: RunFolder, changes: Mapping[str, Any]) -> str:
    """The command that starts a run, or resumes it where there is a checkpoint.

    Args:
        shared: Options that are the same for all runs.
        folder: The run's folder.
        changes: Settings that differ from the recipe's, by dotted key.
    """
    words = [*shared, *typed(changes), "--out", str(folder.path), *(["--resume"] if folder.goes_on else [])]
    return shlex.join(["sslvit", "pretrain", *words])


def typed(changes: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command."""
    return [f"--{key}={in_words(value)}" for key, value in changes.items()]


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
        f"    settings=({shlex.join([*shared, *typed(changes)])})\n    ;;"
        for number, (folder, changes) in enumerate(runs.items())
    ]
    text = SCRIPT.format(
        count=len(cases), file=shlex.quote(str(file)), out=shlex.quote(str(out)), last=len(cases) - 1, nodes=nodes,
        devices=devices, job=shlex.quote(out.name or "sweep"), cases="\n".join(cases),
        gpus=f"#SBATCH --gpus-per-node={devices}\n" if uses_gpu else "",
    )  # fmt: skip
    write_atomically(file, text)
    return file
