"""Checkpoints of a run: each whole or absent, written at step boundaries, a few of them kept."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sslvit.files import new_file
from sslvit.settings import TrainSettings
from sslvit.sharded_checkpoint import (
    SHARDS,
    delete_orphaned_shards,
    read_checkpoint,
    wait_for_shards,
    write_checkpoint,
    write_shard,
)
from sslvit.train.folder import NAMED, RunFolder, named_step

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without running anything in it.

    It is written beside its place, synced and renamed, so a killed writer or a full disk leaves the one before.

    Args:
        settings: which checkpoints are kept, and whether a thread writes them while training goes on; a copy in memory
            is made first.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.thread = ThreadPoolExecutor(1)  # which begins with the first checkpoint that it writes
        self.writer: Future[None] | None = None
        self.written: set[Path] = set()
        self.aborted = threading.Event()  # the run has ended with an error: no part is waited for

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, in the background if the settings say so."""
        self.finish()
        self._submit(partial(self.write, self._kept(checkpoint), Path(path)))

    def save_shard(
        self, manifest: dict[str, Any], shards: dict[str, Tensor], path: Path, folder: str, rank: int, ranks: int
    ) -> None:
        """Write the rows that one rank holds; rank 0 writes the manifest once all ranks have written theirs.

        Args:
            manifest: The checkpoint without those rows.
            shards: The rows.
            path: The manifest's file.
            folder: Name of this checkpoint's folder of shards, new and the same on every rank.
            rank: The rank of this process.
            ranks: Number of ranks.
        """
        self.finish()
        manifest = self._kept(manifest) | {SHARDS: {"folder": folder, "ranks": ranks}}
        self._submit(partial(self._write_shard, manifest, self._kept(shards), path, rank))

    def _write_shard(self, manifest: dict[str, Any], shards: dict[str, Tensor], path: Path, rank: int) -> None:
        write_shard(manifest, shards, path, rank)
        if rank == 0:
            wait_for_shards(manifest, path, self.settings.timeout_seconds, self.aborted)
            self.write(manifest, path)

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write a checkpoint, and let go of those that are not to be kept."""
        if path in self.written and not path.exists():
            logger.warning(f"{path}: the checkpoint before was deleted meanwhile; a new one is written")
        write_checkpoint(checkpoint, path)
        self.written.add(path)
        if path.name == LAST:  # not the state in incident/
            shutil.rmtree(
                RunFolder(path.parents[1]).encoder, ignore_errors=True
            )  # of an earlier end: older from now on
            prune_checkpoints(path, checkpoint["global_step"], self.settings.keep_last, self.settings.keep_every)
            delete_orphaned_shards(path.parent)

    def _kept(self, values: dict[str, Any]) -> dict[str, Any]:
        """What a writer in the background may look at while training goes on: a copy that later steps do not change."""
        if not self.settings.checkpoint_in_background:
            return values
        return tree_map_only(Tensor, lambda value: value.detach().to("cpu", copy=True), values)

    def _submit(self, work: Callable[[], None]) -> None:
        if self.settings.checkpoint_in_background:
            self.writer = self.thread.submit(work)
        else:
            work()

    def finish(self) -> None:
        """Wait for the thread; raises what went wrong in it."""
        if self.writer is not None:
            failure = self.writer.exception()
            self.writer = None
            if failure is not None:
                raise failure

    def teardown(self) -> None:
        """Wait for a writer in the background; its error gives way to the run's own."""
        ended_by = sys.exc_info()[1]
        try:
            self.finish()
        except Exception as error:
            if ended_by is None:
                raise
            logger.error(error)  # and the run's own error goes on

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Map a checkpoint into memory, with weights only; the ranks of a machine share what they read of it."""
        return read_checkpoint(Path(path), mmap=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def prune_checkpoints(last: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Give the newest checkpoint a name by its step where it is one to keep, and let go of those that are not.

    Args:
        last: the newest; a kept one is the same file under two names.
        step: Its step.
        keep_last: so many of the newest stay, this one included.
        keep_every: those whose step it divides stay for good.
    """
    named_file = last.with_name(f"step-{step:08d}.ckpt")
    if keep_last > 1 or (keep_every and step % keep_every == 0):
        named_file.unlink(missing_ok=True)
        try:
            os.link(last, named_file)
        except OSError:  # a file system without hard links
            with new_file(named_file) as temporary:
                shutil.copyfile(last, temporary)
    named = sorted(last.parent.glob(NAMED))  # by step, as each has the same number of digits
    newest = named[-keep_last:] if keep_last > 1 else []
    for path in named:
        is_for_good = keep_every and named_step(path) % keep_every == 0
        if not is_for_good and path not in newest:
            path.unlink()
