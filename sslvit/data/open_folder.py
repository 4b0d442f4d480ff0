"""Open an image folder as data: its shards are packed into the cache on first use.

The folder is listed only once per machine: the first process does it and publishes the result to the others. The
processes are not connected yet at that point and only know what their launcher tells them: torchrun and Lightning set a
local rank, SLURM a job. The result is a note in the cache that identifies the launch, so that a note from an earlier
launch is ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock

from sslvit.data.folders import folder_source
from sslvit.data.header import BadImage, read_header
from sslvit.data.index import ShardIndex, load_index
from sslvit.data.pack import pack
from sslvit.data.plan import evenly_spaced
from sslvit.data.remote import ShardCache
from sslvit.data.sources import ImageSource
from sslvit.data.unfinished import digest_samples, digest_times
from sslvit.files import WriteError, is_running, printable, write_atomically

logger = logging.getLogger(__name__)

Check = Callable[[ImageSource], None]  # raises ValueError to reject a folder before it is packed
MAX_LOOKED_AT = 16  # evenly spaced images whose headers are read to find the channels
MAX_WAIT_SECONDS = 60.0  # for a note of this launch; after that, a process lists the folder itself
POLL_SECONDS = 0.1


def open_image_folder(path: Path, cache: ShardCache, check: Check | None = None) -> ShardIndex:
    """The index of an image folder's shards, which are packed into the cache on first use; `check` may reject it."""
    notes = cache.folder / "packed"
    if not is_local_rank_zero() and (folder := wait_for_folder(notes, path)) is not None:
        with FileLock(folder / ".pack.lock"):  # the first process may still be packing
            if (folder / "index.json").exists():
                return load_index(folder)
    with publish_folder(notes, path) if is_local_rank_zero() else nullcontext() as publish:
        found = folder_source(path)
        folder = packed_folder(path, found, cache)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".pack.lock"):
            if publish is not None:
                publish(folder)  # from now on, the others wait for the lock
            index = _pack_once(path, found, folder, check)
    return index


def _pack_once(path: Path, found: ImageSource, folder: Path, check: Check | None) -> ShardIndex:
    """The index of a folder's shards, which are packed now unless they exist."""
    with suppress(FileNotFoundError, ValueError):  # the cache may have been cleared of some files
        index = load_index(folder)
        if not index.missing_shards():
            logger.info(f"{printable(path)}: an image folder; using its shards packed earlier in {folder}.")
            return index
    if check is not None:
        check(found)
    for note in found.notes:
        logger.info(f"{printable(path)}: {note}")
    logger.info(f"{printable(path)}: an image folder; packing it into {folder} first.")
    packed = pack(found.samples, folder, found.classes, overwrite=True, skipped=found.skipped)
    assert packed is not None  # None only for a part
    return packed


def channels_of(found: ImageSource) -> set[int]:
    """Numbers of channels found in a few readable images of a folder."""
    numbers = set()
    for sample in evenly_spaced(len(found.samples), MAX_LOOKED_AT):
        with suppress(BadImage, OSError):
            numbers.add(read_header(found.samples[int(sample)].read()).channels)
    return numbers


def packed_folder(path: Path, found: ImageSource, cache: ShardCache) -> Path:
    """Cache folder for an image folder's shards; its name depends on all file names, sizes, times and classes."""
    about = f"{digest_samples(found.samples)} {digest_times(found.samples)} {found.classes}"
    digest = hashlib.sha256(about.encode("utf-8", "surrogateescape"))
    name = re.sub(r"[^\w-]", "_", path.resolve().name) or "images"
    return cache.folder / "packed" / f"{name[:40]}-{digest.hexdigest()[:16]}"


def is_local_rank_zero() -> bool:
    """Whether this is the first or only process of its run on this machine."""
    if "LOCAL_RANK" in os.environ:
        return os.environ["LOCAL_RANK"] == "0"
    return not _is_slurm_task() or os.environ.get("SLURM_LOCALID", "0") == "0"


@contextmanager
def publish_folder(notes: Path, source: Path) -> Iterator[Callable[[Path], None]]:
    """List a folder on behalf of the other processes on this machine; yields a function that publishes the result.

    If no note can be written, the other processes list the folder themselves after a timeout.
    """
    identity = _identity(os.getpid())
    about = {"walker": [os.getpid(), identity], "launches": [identity, *_launches()]}
    note = _note_path(notes, source)

    def publish(found: Path | None) -> None:
        with suppress(WriteError):
            write_atomically(note, json.dumps(about | {"found": found and str(found)}), sync=False)

    publish(None)

    try:
        yield publish
    except BaseException:
        with suppress(OSError):
            note.unlink()  # the other processes run into the same error themselves
        raise


def wait_for_folder(notes: Path, source: Path) -> Path | None:
    """The folder published by the first process of this launch; None if there is none, so list the folder yourself."""
    note, deadline, is_reported = _note_path(notes, source), time.monotonic() + MAX_WAIT_SECONDS, False
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(note.read_bytes())
            if not set(_launches()).isdisjoint(about["launches"]):
                if about["found"] is not None:
                    return Path(about["found"])
                process, identity = about["walker"]
                if _identity(int(process)) != identity:
                    return None  # it ended without a result
                deadline = time.monotonic() + MAX_WAIT_SECONDS  # it is still working, which may take long
        if not is_reported:
            is_reported = True
            logger.info(f"{printable(source)}: waiting for the first process on this machine to walk it")
        time.sleep(POLL_SECONDS)
    return None


def _note_path(notes: Path, source: Path) -> Path:
    name = f"{socket.gethostname()} {source.resolve()}".encode("utf-8", "surrogateescape")
    return notes / f"walk-{hashlib.sha256(name).hexdigest()[:16]}.json"


def _launches() -> list[str]:
    """Identifiers shared by the processes of a run: the parent process and its restart count, or the SLURM job step."""
    if _is_slurm_task() and "LOCAL_RANK" not in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return ["slurm " + " ".join(os.environ.get(name, "") for name in names)]
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return [_identity(os.getppid()) + (f" {again}" if again else "")]


def _is_slurm_task() -> bool:
    return "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"


def _identity(process: int) -> str:
    """Identify a process by PID and start time, since PIDs are reused."""
    try:
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = "unknown" if is_running(process) else "ended"
    return f"{process} {began}"
