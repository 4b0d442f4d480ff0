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


class _Signals:
    """What signals have asked of this process since the outermost block of those below began.

    Attributes:
        received: name of the first one.
        has_raised: whether it has ended what went on, and did not leave that to a training run.
        blocks: how many of these blocks lie around what runs now.
    """

    received: str | None = None
    has_raised = False
    blocks = 0


_signals = _Signals()


def received_signal() -> str | None:
    """Name of the signal that asked this process to stop, if one came."""
    return _signals.received


def note_signal(number: int) -> str:
    """Remember that a signal came, and its name, for whoever handles signals after this run."""
    name = signal.Signals(number).name
    if _signals.blocks:
        _signals.received = _signals.received or name
    return name


@contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """Within the block a signal to stop ends whatever goes on; a training run takes signals over with its first step.

    Only the first one does: those after it would end what the first one still lets finish. A library may swallow an
    exception that comes out of nowhere; then whatever fails next counts as this.

    Args:
        message: behind the name of the signal.

    Raises:
        Preempted: a signal came.
    """
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked process has nothing to say or to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _signals.received is None:
            _signals.has_raised = True
            raise Preempted(f"received {note_signal(number)}{message}")

    with _handling(stop):
        try:
            yield
        except Exception as error:
            if not _signals.has_raised:
                raise
            raise Preempted(f"received {_signals.received}{message}") from error


@contextmanager
def finishing(is_process_ending: bool) -> Iterator[None]:
    """Within the block a signal to stop is remembered and changes nothing.

    Args:
        is_process_ending: nothing comes behind the block, so it stays like that to the end of the process.
    """

    def remember(number: int, frame: FrameType | None) -> None:
        note_signal(number)

    with _handling(remember, is_restored=not is_process_ending):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], is_restored: bool = True) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    _signals.blocks += 1
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items() if is_restored else ():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        _signals.blocks -= 1
        if not _signals.blocks:
            _signals.received, _signals.has_raised = None, False


def obey_parent_alone(worker: int = 0) -> None:
    """Make a process that loads data end when its parent says so, and not when all processes of a job are told to stop.

    SLURM tells each of them, and a run needs its batches until its checkpoint is written.

    Args:
        worker: number of the process, as torch's DataLoader gives it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


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
    outcome = f"was not taken: {reason}. Submit it again." if reason else "is in the queue again."
    print(f"SLURM job {job} {outcome}", file=sys.stderr, flush=True)
