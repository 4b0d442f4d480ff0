"""Checkpoints whose tensors are spread over ranks: split into shards, written rank by rank, joined when read.

    last.ckpt                           the manifest: the checkpoint, with a name and a shape for each such tensor
    shards/FOLDER/rank-00000.pt, ...    the rows that each rank holds

A checkpoint of ranks that each hold everything is one file. Both are read by `read_checkpoint`, whatever wrote them.
"""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sslvit.files import WriteError, new_file
from sslvit.stopping import RankLost
from sslvit.weight_files import ChecksumWriter, check_checksum, read_torch_file

SHARD, SHARDS = "shard", "shards"  # keys of a manifest: what stands for a tensor; where the shards are
FAILED = ".failed"  # beside a shard that could not be written: why
READ_ATTEMPTS = 3  # for a checkpoint that is replaced meanwhile
MAX_RANKS = 1 << 20


def extract_local_shards(value: Any, shards: dict[str, Tensor], path: str = "") -> Any:
    """The manifest of a checkpoint: a name and a shape stand for each tensor that is spread over ranks.

    Args:
        value: The checkpoint, or a value inside it.
        shards: Receives the rows that this rank holds, by name.
        path: Where the value stands in the checkpoint.
    """
    if isinstance(value, DTensor):
        shards[path] = value.to_local().detach()
        return {SHARD: path, "shape": list(value.shape)}
    if isinstance(value, dict):
        return {key: extract_local_shards(item, shards, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [extract_local_shards(item, shards, f"{path}/{i}") for i, item in enumerate(value)]
    return value


def shard_like(full: Tensor, like: DTensor) -> DTensor:
    """This rank's shard of a tensor that every rank holds in full, split as another one is."""
    mesh = like.device_mesh
    chunks = full.chunk(mesh.size(), dim=0)  # as fully_shard splits
    rank = mesh.get_local_rank()
    rows = chunks[rank] if rank < len(chunks) else full.narrow(0, 0, 0)
    local = rows.to(like.device, copy=True)
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def write_checkpoint(checkpoint: dict[str, Any], path: Path, last: Path | None = None) -> None:
    """Write a file that is complete or absent.

    The temporary file has one name, so that the next writer, on any machine, writes over what a killed one has left.

    Args:
        checkpoint: The content.
        path: The file.
        last: The newest complete checkpoint, if that is another file.

    Raises:
        RuntimeError: The disk is full or cannot be written to; the previous checkpoint is untouched.
    """
    try:
        with new_file(path, temporary=path.with_suffix(".part")) as temporary, open(temporary, "wb") as file:
            writer = ChecksumWriter(file)
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # it needs no more than write and flush
            writer.append_checksum()
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        before = "The checkpoint before it is whole" if (last or path).exists() else "There is none before it"
        cause = error.__cause__ if isinstance(error, WriteError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
        raise RuntimeError(
            f"{path}: the checkpoint of step {checkpoint.get('global_step')} could not be written ({reason}). "
            f"{before}; make room, then sslvit resume RUN."
        ) from error


def write_shard(manifest: dict[str, Any], shards: dict[str, Tensor], path: Path, rank: int) -> None:
    """Write the rows that one rank holds; on an error, also the reason for rank 0, which would wait in vain."""
    file = shard_file(manifest, path, rank)
    try:
        write_checkpoint({"global_step": manifest["global_step"], "tensors": shards}, file, path)
    except RuntimeError as error:
        with suppress(OSError):
            file.with_suffix(FAILED).write_text(str(error))
        raise


def wait_for_shards(manifest: dict[str, Any], path: Path, timeout_seconds: float, aborted: threading.Event) -> None:
    """Wait until all ranks have written their shards, unless the run is aborted meanwhile.

    Raises:
        RankLost: A rank has not written its shard in that time.
        RuntimeError: A rank could not write, or the run has ended.
    """
    files = [shard_file(manifest, path, rank) for rank in range(manifest[SHARDS]["ranks"])]
    deadline = time.monotonic() + timeout_seconds
    while missing := [file for file in files if not file.exists()]:
        failed = [file.with_suffix(FAILED) for file in missing if file.with_suffix(FAILED).exists()]
        if failed:
            raise RuntimeError(failed[0].read_text())
        if aborted.is_set():
            raise RuntimeError(f"{missing[0]}: not written, as the run ended; the previous checkpoint is untouched.")
        if time.monotonic() > deadline:
            raise RankLost(
                f"{missing[0]}: another rank has not written its shard of the checkpoint in {timeout_seconds:g} s "
                "(train.timeout_seconds). Has it ended, and is the run folder on a disk that all machines share? "
                "Go on from the previous checkpoint: sslvit resume RUN"
            )
        time.sleep(0.01)


def delete_orphaned_shards(folder: Path) -> None:
    """Delete shards that no checkpoint in the folder names: those of deleted ones, and of half-written ones."""
    if not (folder / SHARDS).is_dir():
        return
    named = set()
    for path in folder.glob("*.ckpt"):
        try:
            manifest = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            named |= {shards_folder(manifest, path)} if SHARDS in manifest else set()
        except Exception:  # somebody's file, or one that is being copied: it may name any of them
            return
    for shards in (folder / SHARDS).iterdir():
        if shards not in named:
            shutil.rmtree(shards, ignore_errors=True)


def shards_folder(manifest: dict[str, Any], path: Path) -> Path:
    """The folder that a manifest's shards are in; it may be nowhere else."""
    name = str(manifest[SHARDS].get("folder"))
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{path}: its shards are in {name}, which is outside its folder.")
    return path.parent / SHARDS / name


def shard_file(manifest: dict[str, Any], path: Path, rank: int) -> Path:
    """The file of one rank."""
    return shards_folder(manifest, path) / f"rank-{rank:05d}.pt"


def shard_files(manifest: dict[str, Any], path: Path) -> list[Path]:
    """The shards of a checkpoint; FileNotFoundError if one is missing."""
    ranks = manifest[SHARDS].get("ranks")
    if not isinstance(ranks, int) or not 0 < ranks < MAX_RANKS:
        raise ValueError(f"{path}: states {str(ranks)[:40]} shards. Is it damaged?")
    files = []
    for rank in range(ranks):
        files.append(shard_file(manifest, path, rank))
        if not files[-1].exists():  # raised at the first, however many it promises
            raise FileNotFoundError(f"{files[-1]}: a shard of {path} is missing. Copy the folder {SHARDS}/ as well.")
    return files


def join_shards(manifest: dict[str, Any], path: Path, mmap: bool = False, map_location: str = "cpu") -> dict[str, Any]:
    """The complete checkpoint: each tensor's rows, rank by rank; arguments as of `read_torch_file`."""
    shards = [read_torch_file(file, mmap, map_location) for file in shard_files(manifest, path)]

    def join(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {SHARD, "shape"}:
            tensor = torch.cat([shard["tensors"][value[SHARD]] for shard in shards])
            if list(tensor.shape) != value["shape"]:
                raise ValueError(f"{value[SHARD]} is {list(tensor.shape)}, not {value['shape']}")
            return tensor
        if isinstance(value, dict):
            return {key: join(item) for key, item in value.items()}
        return [join(item) for item in value] if isinstance(value, list) else value

    try:
        return {key: join(value) for key, value in manifest.items() if key != SHARDS}
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{path}: its shards do not fit together ({reason}). Are they of one checkpoint?") from error


def read_checkpoint(path: Path, mmap: bool = False, map_location: str = "cpu") -> dict[str, Any]:
    """A checkpoint, sharded or not, or any file that `read_torch_file` reads; arguments as of that.

    A running training may replace it meanwhile; then the newer one is read.

    Raises:
        FileNotFoundError: The file or a shard is missing.
        ValueError: A file is damaged, or holds more than numbers.
    """
    for _ in range(READ_ATTEMPTS):
        content = read_torch_file(path, mmap, map_location)
        if not isinstance(content.get(SHARDS), dict):
            return content
        try:
            return join_shards(content, path, mmap, map_location)
        except FileNotFoundError:
            if read_torch_file(path).get(SHARDS) == content[SHARDS]:
                raise
    raise ValueError(f"{path}: replaced repeatedly while it was read. Read it when the run has ended.")


def check_checkpoint(path: Path) -> None:
    """Compare the checksums of a checkpoint and of its shards with their bytes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    manifest = read_torch_file(path, mmap=True, map_location="meta")
    if isinstance(manifest.get(SHARDS), dict):
        for shard in shard_files(manifest, path):
            check_checksum(shard)
