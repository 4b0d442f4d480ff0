"""Ways in which a run ends before its last step, and the exit codes that tell a scheduler which one it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """A command was told to stop, and the same command can be given again; no library takes it for an error.

    Args:
        message: what is kept.
        is_requeued: whether a scheduler was asked already, or must not be.
    """

    def __init__(self, message: str, is_requeued: bool = False) -> None:
        super().__init__(message)
        self.is_requeued = is_requeued


class RankLost(Exception):
    """Another rank no longer answers: its machine has stopped, or the network has. The run can go on with --resume."""


@contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """Within the block a signal to stop ends whatever goes on; a training run takes signals over with its first step.

    Args:
        message: behind the name of the signal.

    Raises:
        Preempted: a signal came.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"received {signal.Signals(number).name}{message}")

    with _handling(stop):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def is_first_process() -> bool:
    """Whether this process speaks and writes for all: rank zero under every launcher that Lightning knows."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


def requeue() -> None:
    """Ask SLURM to run this job again, where it runs as a batch job; says so where that fails."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+", job) or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        reason = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    said = f"was not taken: {reason}. Submit it again." if reason else "is in the queue again."
    print(f"SLURM job {job} {said}", file=sys.stderr, flush=True)
