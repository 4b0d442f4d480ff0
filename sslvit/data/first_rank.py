"""Who walks an image folder when a run starts: the first process on each machine, which tells the others what it found.

At that time the processes know nothing of each other yet but what their launcher says: torchrun and Lightning a local
rank, SLURM its job. A note in the cache names the launch, so that one of an earlier start is not taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sslvit.files import WriteError, is_running, printable, write_atomically

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 60.0  # for a note of this launch; after that, a process walks the folder itself
POLL_SECONDS = 0.1


def is_local_rank_zero() -> bool:
    """Whether this process is the first of its run on this machine, or the only one."""
    if "LOCAL_RANK" in os.environ:
        return os.environ["LOCAL_RANK"] == "0"
    return not _is_slurm_task() or os.environ.get("SLURM_LOCALID", "0") == "0"


@contextmanager
def publish_folder(notes: Path, source: Path) -> Iterator[Callable[[Path], None]]:
    """Walk a folder for the other processes of this machine; the block calls what it gets with the result.

    Where no note can be written, each of the others walks by itself after a while.
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
            note.unlink()  # the others meet the error themselves
        raise


def wait_for_folder(notes: Path, source: Path) -> Path | None:
    """What the first process of this launch found; None where it tells nothing, so that one has to walk oneself."""
    note, deadline, is_reported = _note_path(notes, source), time.monotonic() + MAX_WAIT_SECONDS, False
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(note.read_bytes())
            if not set(_launches()).isdisjoint(about["launches"]):
                if about["found"] is not None:
                    return Path(about["found"])
                process, identity = about["walker"]
                if _identity(int(process)) != identity:
                    return None  # it has ended without a word
                deadline = time.monotonic() + MAX_WAIT_SECONDS  # it is at work, which may take long
        if not is_reported:
            is_reported = True
            logger.info(f"{printable(source)}: waiting for the first process on this machine to walk it")
        time.sleep(POLL_SECONDS)
    return None


def _note_path(notes: Path, source: Path) -> Path:
    name = f"{socket.gethostname()} {source.resolve()}".encode("utf-8", "surrogateescape")
    return notes / f"walk-{hashlib.sha256(name).hexdigest()[:16]}.json"


def _launches() -> list[str]:
    """What this process shares with the others of its run: its parent and how often that began anew, or its job."""
    if _is_slurm_task() and "LOCAL_RANK" not in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return ["slurm " + " ".join(os.environ.get(name, "") for name in names)]
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return [_identity(os.getppid()) + (f" {again}" if again else "")]


def _is_slurm_task() -> bool:
    return "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"


def _identity(process: int) -> str:
    """A process by its number and the time at which it began, as numbers are used again."""
    try:
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = "unknown" if is_running(process) else "ended"
    return f"{process} {began}"
