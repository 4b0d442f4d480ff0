"""Checkpoints of tensors that are sharded over ranks: each rank writes its shard, and reading joins them.

    last.ckpt                           manifest: the checkpoint with a name and a shape in place of each sharded tensor
    shards/FOLDER/rank-00000.pt, ...    the rows of each rank

If every rank has all tensors, the checkpoint is a single file. `read_checkpoint` reads both kinds.
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

from sslvit.files import WriteError, new_file, write_atomically
from sslvit.stopping import RankLost
from sslvit.weight_files import ChecksumWriter, check_checksum, read_torch_file

SHARD, SHARDS = "shard", "shards"  # keys of a manifest: a tensor's name; folder and number of the shards
FAILED = ".failed"  # suffix of a file with the reason why a shard could not be written
READ_ATTEMPTS = 3  # in case the checkpoint is replaced while it is read
MAX_RANKS = 1 << 20


def extract_local_shards(value: Any, shards: dict[str, Tensor], path: str = "") -> Any:
    """Make the manifest of a checkpoint, in which a name and a shape replace each sharded tensor.

    Args:
        value: The checkpoint, or a value inside it.
        shards: Filled with this rank's rows of each tensor, by name.
        path: Path of the value within the checkpoint.
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
    """Shard a tensor that every rank has in full, in the same way as another one."""
    mesh = like.device_mesh
    chunks = full.chunk(mesh.size(), dim=0)  # as fully_shard splits
    rank = mesh.get_local_rank()
    rows = chunks[rank] if rank < len(chunks) else full.narrow(0, 0, 0)
    local = rows.to(like.device, copy=True)
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def write_checkpoint(checkpoint: dict[str, Any], path: Path, last: Path | None = None) -> None:
    """Write a checkpoint file atomically.

    The temporary file has a fixed name, so that the next writer, on any machine, overwrites what a killed process left.

    Args:
        checkpoint: The content.
        path: The file.
        last: The newest complete checkpoint, if that is another file.

    Raises:
        RuntimeError: The disk is full or not writable; the previous checkpoint is untouched.
    """
    try:
        with new_file(path, temporary=path.with_suffix(".part")) as temporary, open(temporary, "wb") as file:
            writer = ChecksumWriter(file)
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # it only needs write and flush
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
    """Write one rank's rows; on an error, also write the reason to a file for rank 0, which would wait in vain."""
    file = shard_file(manifest, path, rank)
    try:
        write_checkpoint({"global_step": manifest["global_step"], "tensors": shards}, file, path)
    except RuntimeError as error:
        with suppress(OSError):
            write_atomically(file.with_suffix(FAILED), str(error))
        raise


def wait_for_shards(manifest: dict[str, Any], path: Path, timeout_seconds: float, aborted: threading.Event) -> None:
    """Wait until all ranks have written their shards, unless the run is aborted.

    Raises:
        RankLost: A rank has not written its shard in time.
        RuntimeError: A rank could not write its shard, or the run has ended.
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


def delete_orphaned_shards(folder: Path) -> set[Path]:
    """Delete shards that no checkpoint in the folder refers to, left from deleted or incomplete checkpoints.

    A checkpoint is written after its shards, so one that cannot be read may refer to any that are not newer than it.

    Returns:
        Checkpoints that cannot be read, for whose sake some shards may have been kept.
    """
    if not (folder / SHARDS).is_dir():
        return set()
    named: set[Path] = set()
    unreadable: dict[Path, float] = {}
    for path in folder.glob("*.ckpt"):
        if path.is_dir():
            continue  # another program's; ours are files
        try:
            manifest = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            named |= {shards_folder(manifest, path)} if SHARDS in manifest else set()
        except Exception:  # a foreign file, or one being copied
            with suppress(FileNotFoundError):  # deleted meanwhile
                unreadable[path] = path.lstat().st_ctime  # a copy may have the mtime of its original
    for shards in (folder / SHARDS).iterdir():
        if shards not in named and (not unreadable or shards.stat().st_mtime > max(unreadable.values())):
            shutil.rmtree(shards, ignore_errors=True)
    return set(unreadable)


def shards_folder(manifest: dict[str, Any], path: Path) -> Path:
    """Folder of a manifest's shards, which must be inside shards/."""
    name = str(manifest[SHARDS].get("folder"))
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{path}: its shards are in {name}, which is outside its folder.")
    return path.parent / SHARDS / name


def shard_file(manifest: dict[str, Any], path: Path, rank: int) -> Path:
    """The shard file of one rank."""
    return shards_folder(manifest, path) / f"rank-{rank:05d}.pt"


def shard_files(manifest: dict[str, Any], path: Path) -> list[Path]:
    """The shard files of a checkpoint; raises FileNotFoundError if one is missing."""
    ranks = manifest[SHARDS].get("ranks")
    if not isinstance(ranks, int) or not 0 < ranks < MAX_RANKS:
        raise ValueError(f"{path}: states {str(ranks)[:40]} shards. Is it damaged?")
    files = []
    for rank in range(ranks):
        files.append(shard_file(manifest, path, rank))
        if not files[-1].exists():  # fail at the first, however many it claims
            raise FileNotFoundError(f"{files[-1]}: a shard of {path} is missing. Copy the folder {SHARDS}/ as well.")
    return files


def join_shards(manifest: dict[str, Any], path: Path, mmap: bool = False, map_location: str = "cpu") -> dict[str, Any]:
    """Join the shards of all ranks into the complete checkpoint; arguments as in `read_torch_file`."""
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
    """Read a checkpoint, sharded or not, or any file that `read_torch_file` reads; arguments as in `read_torch_file`.

    If a running training replaces the checkpoint meanwhile, the newer one is read.

    Raises:
        FileNotFoundError: The file or a shard is missing.
        ValueError: A file is damaged, or contains objects other than weights.
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
    """Verify the checksums of a checkpoint and its shards.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    manifest = read_torch_file(path, mmap=True, map_location="meta")
    if isinstance(manifest.get(SHARDS), dict):
        for shard in shard_files(manifest, path):
            check_checksum(shard)
