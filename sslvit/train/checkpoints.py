"""Checkpoints of a run: each whole or absent, written at step boundaries, a few of them kept."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from torch import Tensor

from sslvit.settings import TrainSettings
from sslvit.train.callbacks import StepCallback
from sslvit.train.folder import RunFolder

LAST = "last.ckpt"
NAMED = f"step-{'[0-9]' * 8}.ckpt"  # and not what a user calls step-best.ckpt


class WholeCheckpoint(CheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without running anything in it.

    It is written beside its place, synced and renamed, so a killed writer or a full disk leaves the one before.

    Args:
        settings: which checkpoints are kept, and whether a thread writes them while training goes on; a copy in memory
            is made first.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.writer: threading.Thread | None = None
        self.failure: OSError | RuntimeError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if not self.settings.checkpoint_in_background:
            self.write(checkpoint, Path(path))
            return
        self.finish()
        self.writer = threading.Thread(target=self._try_to_write, args=(copied(checkpoint), Path(path)))
        self.writer.start()

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        write_whole(checkpoint, path)
        if path.name == LAST:  # not the state in incident/
            keep_some(path, checkpoint["global_step"], self.settings.keep_last, self.settings.keep_every)

    def _try_to_write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            self.write(checkpoint, path)
        except (OSError, RuntimeError) as error:
            self.failure = error

    def finish(self) -> None:
        """Wait for the thread; raises what went wrong in it."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def teardown(self) -> None:
        self.finish()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def write_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Beside its place, synced, renamed.

    Raises:
        RuntimeError: the disk is full or cannot be written to; the checkpoint before is as it was.
    """
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too survives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        before = "The checkpoint before it is whole" if path.exists() else "There is none before it"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise RuntimeError(
            f"{path}: the checkpoint of step {checkpoint.get('global_step')} could not be written ({reason}). "
            f"{before}; make room, then --resume."
        ) from error


def keep_some(last: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Give the newest checkpoint a name by its step where it is one to keep, and let go of those that are not.

    Args:
        last: the newest; a kept one is the same file under two names.
        step: of it.
        keep_last: so many of the newest stay, this one included.
        keep_every: those whose step it divides stay for good.
    """
    own = last.with_name(f"step-{step:08d}.ckpt")
    if keep_last > 1 or (keep_every and step % keep_every == 0):
        own.unlink(missing_ok=True)
        try:
            os.link(last, own)
        except OSError:  # a file system without hard links
            part = own.with_suffix(".part")
            shutil.copyfile(last, part)
            os.replace(part, own)
    named = sorted((int(path.stem.removeprefix("step-")), path) for path in last.parent.glob(NAMED))
    passing = [path for number, path in named if not (keep_every and number % keep_every == 0)]
    newest = {path for _, path in named[-keep_last:]} if keep_last > 1 else set()
    for path in passing:
        if path not in newest:
            path.unlink()


def copied(value: Any) -> Any:
    """A copy in the machine's memory that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value


class Checkpoints(StepCallback):
    """Writes checkpoints/last.ckpt every so many optimiser steps and after the last one, and keeps some by their step.

    Args:
        folder: of the run.
        settings: how often, and which are kept.
        total_steps: of the run.
    """

    def __init__(self, folder: RunFolder, settings: TrainSettings, total_steps: int) -> None:
        self.folder, self.settings, self.total_steps = folder, settings, total_steps

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.step % self.settings.checkpoint_every and self.step != self.total_steps:
            return
        trainer.save_checkpoint(self.folder.checkpoint, weights_only=False)  # with the optimiser
