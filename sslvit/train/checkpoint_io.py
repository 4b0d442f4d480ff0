"""Checkpoints of a run: each is complete or absent, written at a step boundary; a few are kept."""

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

from sslvit.files import new_file, printable
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
    """Writes a checkpoint completely or not at all, and reads it without running any code in it.

    It is written to a temporary file, synced and renamed, so a killed writer or a full disk leaves the previous one.

    Args:
        settings: which checkpoints are kept, and whether a thread writes them while training continues, from a copy in
            memory.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.thread = ThreadPoolExecutor(1)  # starts with the first checkpoint that it writes
        self.writer: Future[None] | None = None
        self.written: set[Path] = set()
        self.unreadable: set[Path] = set()  # files beside them that were reported
        self.aborted = threading.Event()  # the run has ended with an error: do not wait for shards

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
        """Write a checkpoint, and delete those that are not kept."""
        if path in self.written and not path.exists():
            logger.warning(f"{path}: the checkpoint before was deleted meanwhile; a new one is written")
        write_checkpoint(checkpoint, path)
        self.written.add(path)
        if path.name == LAST:  # not the state in incident/
            shutil.rmtree(
                RunFolder(path.parents[1]).encoder, ignore_errors=True
            )  # of an earlier end of the run, and now outdated
            prune_checkpoints(path, checkpoint["global_step"], self.settings.keep_last, self.settings.keep_every)
            unreadable = delete_orphaned_shards(path.parent)
            for file in sorted(unreadable - self.unreadable):
                logger.warning(
                    f"{printable(file)}: not a readable checkpoint. Shards that it may refer to are kept; delete it if "
                    "nothing needs it"
                )
            self.unreadable |= unreadable

    def _kept(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values for the writer: in the background, a copy that later steps do not change."""
        if not self.settings.checkpoint_in_background:
            return values
        return tree_map_only(Tensor, lambda value: value.detach().to("cpu", copy=True), values)

    def _submit(self, work: Callable[[], None]) -> None:
        if self.settings.checkpoint_in_background:
            self.writer = self.thread.submit(work)
        else:
            work()

    def finish(self) -> None:
        """Wait for the background writer, and raise its error if it failed."""
        if self.writer is not None:
            failure = self.writer.exception()
            self.writer = None
            if failure is not None:
                raise failure

    def teardown(self) -> None:
        """Wait for a background writer; its error is only logged if the run has one of its own."""
        ended_by = sys.exc_info()[1]
        try:
            self.finish()
        except Exception as error:
            if ended_by is None:
                raise
            logger.error(error)  # the run's own error propagates

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Memory-map a checkpoint, weights only; the ranks of a machine share the pages that they read."""
        return read_checkpoint(Path(path), mmap=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def prune_checkpoints(last: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Name the newest checkpoint by its step if it is kept, and delete those that are not kept any longer.

    Args:
        last: The newest checkpoint; a kept one is the same file under two names.
        step: Its step.
        keep_last: Number of the newest checkpoints that are kept, this one included.
        keep_every: Checkpoints whose step is a multiple of it are kept for good.
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
    # a later one was left behind by a run that resumed from before it, since it was damaged
    done = [path for path in named if named_step(path) <= step]
    newest = done[-keep_last:] if keep_last > 1 else []
    for path in named:
        is_for_good = keep_every and named_step(path) % keep_every == 0
        if not is_for_good and path not in newest:
            path.unlink()
