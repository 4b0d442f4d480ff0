"""`sslvit branch`: copy a run's checkpoint into a new run folder, which is resumed independently."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from sslvit.files import expand_path, printable, write_error
from sslvit.messages import for_python
from sslvit.sharded_checkpoint import SHARDS, check_checkpoint, shard_files
from sslvit.train.folder import RunFolder, named_step
from sslvit.weight_files import read_torch_file

logger = logging.getLogger(__name__)


@for_python
def branch(run: str | os.PathLike[str], out: str | os.PathLike[str], step: int | None = None) -> RunFolder:
    """Copy a run as it was at a checkpoint into a new folder, to resume it there with another length or other settings.

    The run itself is not changed and may still be training. With optim.lr_schedule wsd, one long run yields several
    lengths: each branch cools down from a checkpoint of the constant part (train.keep_every keeps them).

    Args:
        run: Run folder.
        out: Folder of the new run.
        step: Step of the checkpoint; None for the last one.

    Returns:
        The new run folder.

    Raises:
        ValueError: Not a run folder, no checkpoint of that step, a damaged one, or a folder that is in use.

    Example:
        run = sslvit.branch("runs/mae", "runs/mae-8000", step=6400)
        sslvit.resume(run, **{"train.steps": 8000})
    """
    source, new = RunFolder(expand_path(run)), RunFolder(expand_path(out))
    if not source.config.is_file():
        raise ValueError(f"{printable(source.path)}: not a run folder (no config.yaml). Give what was given as --out.")
    if os.path.lexists(new.path) and not (new.path.is_dir() and not any(new.path.iterdir())):
        raise ValueError(f"{printable(new.path)}: already exists. Choose another --out.")
    checkpoint = find_checkpoint(source, step)
    temporary = new.path.with_name(f".{new.path.name}.{os.getpid()}.part")
    try:
        copy = RunFolder(temporary)
        _copy(source, checkpoint, copy)
        check_checkpoint(copy.checkpoint)
        copied = _step_of(copy.checkpoint)
        copy.start_branch(source, copied)
        if step is not None and copied != step:
            raise ValueError(
                f"--step {step}: {printable(source.path)} went on and replaced it meanwhile. Take a later one."
            )
        if copy.metrics.is_file():
            copy.cut_metrics(copied)
        copy.cut_samples_read(copied)
        os.replace(temporary, new.path)
    except OSError as error:
        raise write_error(new.path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return new


def find_checkpoint(run: RunFolder, step: int | None) -> Path:
    """A run's checkpoint at a step, or its last one for None.

    Raises:
        ValueError: There is none; the message lists the steps that have one.
    """
    steps = {named_step(path): path for path in run.checkpoints if path != run.checkpoint}
    if run.checkpoint.is_file():
        try:
            steps[_step_of(run.checkpoint)] = run.checkpoint
        except ValueError as error:
            if step is None or not steps:
                raise
            logger.warning(f"{error}")
    if not steps:
        raise ValueError(f"{printable(run.path)}: has no checkpoint yet (checkpoints/{run.checkpoint.name}).")
    if step is None:
        return run.checkpoint if run.checkpoint.is_file() else steps[max(steps)]
    if step not in steps:
        there = ", ".join(f"{number:,}" for number in sorted(steps))
        raise ValueError(
            f"--step {step}: {printable(run.path)} has no checkpoint of it, only of {there}. Take one of these; "
            "train.keep_every keeps more of them."
        )
    return steps[step]


def _step_of(checkpoint: Path) -> int:
    return int(read_torch_file(checkpoint, mmap=True, map_location="meta")["global_step"])


def _copy(source: RunFolder, checkpoint: Path, new: RunFolder) -> None:
    """Copy checkpoint and records, also those of later steps; the checkpoint holds what ledger.json tells."""
    new.checkpoint.parent.mkdir(parents=True)
    if source.metrics.is_file():
        shutil.copyfile(source.metrics, new.metrics)
    if source.samples.is_dir():
        shutil.copytree(source.samples, new.samples)
    shutil.copyfile(checkpoint, new.checkpoint)
    manifest = read_torch_file(checkpoint, mmap=True, map_location="meta")
    if isinstance(manifest.get(SHARDS), dict):
        for shard in shard_files(manifest, checkpoint):
            there = new.checkpoint.parent / shard.relative_to(checkpoint.parent)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shard, there)
