"""Checkpoints of a run: each whole or absent, written at step boundaries, a few of them kept."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins import CheckpointIO
from torch import Tensor

from sslvit.files import new_file
from sslvit.settings import TrainSettings
from sslvit.stopping import RankLost
from sslvit.train.folder import NAMED, RunFolder
from sslvit.weight_files import END, SEAL, SHARDS, read_torch_file, shard_file, shards_folder

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
FAILED = ".failed"  # beside a part that could not be written: why


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without running anything in it.

    It is written beside its place, synced and renamed, so a killed writer or a full disk leaves the one before.

    Args:
        settings: which checkpoints are kept, and whether a thread writes them while training goes on; a copy in memory
            is made first.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.writer: threading.Thread | None = None
        self.failure: Exception | None = None
        self.written: set[Path] = set()
        self.aborted = threading.Event()  # the run has ended with an error: no part is waited for

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.finish()
        self._submit(partial(self.write, self._kept(checkpoint), Path(path)))

    def save_shard(
        self, head: dict[str, Any], own: dict[str, Tensor], path: Path, name: str, rank: int, ranks: int
    ) -> None:
        """One rank's part of a checkpoint whose tensors are spread over ranks; each calls it.

        Args:
            head: the checkpoint, with places for those tensors; the first rank writes it once all parts are there.
            own: this rank's parts.
            path: of the head.
            name: of this checkpoint's folder of parts, the same on every rank and new.
            rank: of this process.
            ranks: how many there are.
        """
        self.finish()
        head = self._kept(head) | {SHARDS: {"folder": name, "ranks": ranks}}
        self._submit(partial(self.write_shard, head, self._kept(own), path, rank))

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        if path in self.written and not path.exists():
            logger.warning(f"{path}: the checkpoint before was deleted meanwhile; a new one is written")
        write_whole(checkpoint, path)
        self.written.add(path)
        if path.name == LAST:  # not the state in incident/
            shutil.rmtree(
                RunFolder(path.parents[1]).encoder, ignore_errors=True
            )  # of an earlier end: older from now on
            keep_some(path, checkpoint["global_step"], self.settings.keep_last, self.settings.keep_every)
            delete_orphaned_shards(path.parent)

    def write_shard(self, head: dict[str, Any], own: dict[str, Tensor], path: Path, rank: int) -> None:
        own_file = shard_file(head, path, rank)
        try:
            write_whole({"global_step": head["global_step"], "tensors": own}, own_file, path)
        except RuntimeError as error:
            with suppress(OSError):
                own_file.with_suffix(FAILED).write_text(str(error))  # for the first rank, which would wait in vain
            raise
        if rank == 0:
            self.wait_for_parts([shard_file(head, path, number) for number in range(head[SHARDS]["ranks"])])
            self.write(head, path)

    def wait_for_parts(self, parts: list[Path]) -> None:
        """Until all ranks have written theirs.

        Raises:
            RankLost: one has not, in train.timeout_seconds.
            RuntimeError: one could not, or the run has ended meanwhile.
        """
        deadline, waited = time.monotonic() + self.settings.timeout_seconds, self.settings.timeout_seconds
        while missing := [part for part in parts if not part.exists()]:
            failed = [part.with_suffix(FAILED) for part in missing if part.with_suffix(FAILED).exists()]
            if failed:
                raise RuntimeError(failed[0].read_text())
            if self.aborted.is_set():
                raise RuntimeError(f"{missing[0]}: not written, as the run ended; the checkpoint before is as it was.")
            if time.monotonic() > deadline:
                raise RankLost(
                    f"{missing[0]}: another rank has not written its part of the checkpoint in {waited:g} s "
                    "(train.timeout_seconds). Has it ended, and is the run folder on a disk that all machines share? "
                    "Go on from the checkpoint before with --resume"
                )
            time.sleep(0.01)

    def _kept(self, values: dict[str, Any]) -> dict[str, Any]:
        """What a writer in the background may look at while training goes on."""
        return copied(values) if self.settings.checkpoint_in_background else values

    def _submit(self, work: Callable[[], None]) -> None:
        if not self.settings.checkpoint_in_background:
            work()
            return
        self.writer = threading.Thread(target=self._try, args=(work,))
        self.writer.start()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it must reach the run
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
        ended_by = sys.exc_info()[1]
        try:
            self.finish()
        except Exception as error:
            if ended_by is None:
                raise
            logger.error(error)  # and the run's own error goes on

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        return read_torch_file(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class SummedFile:
    """A file to which torch writes an archive, and behind it the checksum of all its bytes, as an archive's comment.

    torch has checksums of its records alone, and does not look at them when it reads.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum, self.end = file, 0, b""

    def write(self, data: bytes | memoryview) -> int:
        self.sum = zlib.crc32(data, self.sum)
        self.end = (self.end + bytes(data[-END:]))[-END:]
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        """Write the comment and its length, which is zero so far."""
        if self.end.startswith(b"PK\5\6") and self.end.endswith(b"\0\0"):
            comment = SEAL + b"%08x" % self.sum
            self.file.seek(-2, os.SEEK_END)
            self.file.write(len(comment).to_bytes(2, "little") + comment)


def write_whole(checkpoint: dict[str, Any], path: Path, last: Path | None = None) -> None:
    """Beside its place, synced, renamed.

    Args:
        checkpoint: what is written.
        path: its place.
        last: of the newest whole checkpoint, if that is not this place.

    Raises:
        RuntimeError: the disk is full or cannot be written to; the checkpoint before is as it was.
    """
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            summed = SummedFile(file)
            torch.save(checkpoint, summed)
            summed.seal()
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
        before = "The checkpoint before it is whole" if (last or path).exists() else "There is none before it"
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
            with new_file(own) as part:
                shutil.copyfile(last, part)
    named = sorted((int(path.stem.removeprefix("step-")), path) for path in last.parent.glob(NAMED))
    passing = [path for number, path in named if not (keep_every and number % keep_every == 0)]
    newest = {path for _, path in named[-keep_last:]} if keep_last > 1 else set()
    for path in passing:
        if path not in newest:
            path.unlink()


def delete_orphaned_shards(folder: Path) -> None:
    """Let go of parts of checkpoints that no file in the folder names: of older ones, and of half-written ones."""
    if not (folder / SHARDS).is_dir():
        return
    named = set()
    for path in folder.glob("*.ckpt"):
        try:
            head = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            named |= {shards_folder(head, path)} if SHARDS in head else set()
        except Exception:  # somebody's file, or one that is being copied: it may name any of them
            return
    for parts in (folder / SHARDS).iterdir():
        if parts not in named:
            shutil.rmtree(parts, ignore_errors=True)


def copied(value: Any) -> Any:
    """A copy in the machine's memory that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value
