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
CTRL_C = signal.SIGINT


class Preempted(BaseException):
    """A command was told to stop, and the same command can be given again; no library takes it for an error.

    Args:
        message: what is kept.

    Attributes:
        is_requeued: whether a scheduler was asked already, or must not be.
    """

    is_requeued = False


class Interrupted(Preempted):
    """The person at the keyboard stopped a training run by Ctrl-C; no scheduler is asked to start it again.

    Args:
        message: what is kept, and how to go on.
    """

    is_requeued = True


class RankLost(Exception):
    """Another rank no longer answers: its machine has stopped, or the network has. The run can be resumed."""


class _Signals:
    """What signals have asked of this process since the outermost block of those below began.

    Attributes:
        received: name of the first one.
        has_raised: whether it has ended what went on, and did not leave that to a training run.
        blocks: how many of these blocks lie around what runs now.
        is_process_ending: whether the process ends with the outermost block.
    """

    received: str | None = None
    has_raised = False
    blocks = 0
    is_process_ending = False


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


def hears_ctrl_c() -> bool:
    """Whether Ctrl-C is for this process: a shell starts what runs in the background without it."""
    return signal.getsignal(CTRL_C) is not signal.SIG_IGN


def end_at_next_ctrl_c() -> None:
    """Make the next Ctrl-C end whatever goes on, a computation that never returns to Python included.

    torchrun hears the Ctrl-C of a terminal that its processes have heard, too, and passes it on to them: there all
    further ones are ignored, and torchrun ends what does not end by itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(CTRL_C, signal.SIG_IGN)
    else:  # in a process that is not ours, such as a notebook's, an exception
        signal.signal(CTRL_C, signal.SIG_DFL if _signals.is_process_ending else signal.default_int_handler)


@contextmanager
def stopping_at_once(message: str, is_kept: str = "") -> Iterator[None]:
    """Within the block a signal to stop ends whatever goes on; a training run takes signals over with its first step.

    Only the first one does: those after it would end what the first one still lets finish, except by Ctrl-C. A library
    may swallow an exception that comes out of nowhere; then whatever fails next counts as this.

    Args:
        message: behind the name of the signal.
        is_kept: behind "interrupted" after a Ctrl-C; by default the message.

    Raises:
        Preempted: a signal came.
        KeyboardInterrupt: it was a Ctrl-C.
    """
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked process has nothing to say or to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == CTRL_C:
            end_at_next_ctrl_c()
            if os.isatty(2):
                os.write(2, b"\n")  # it shows ^C where the cursor was
        if number == CTRL_C or _signals.received is None:
            _signals.has_raised = True
            note_signal(number)
            raise what_to_raise()

    def what_to_raise() -> BaseException:
        if _signals.received == CTRL_C.name:
            return KeyboardInterrupt(f"interrupted{is_kept or message}")
        return Preempted(f"received {_signals.received}{message}")

    with _handling(stop):
        try:
            yield
        except Exception as error:
            if not _signals.has_raised:
                raise
            raise what_to_raise() from error


@contextmanager
def finishing(is_process_ending: bool) -> Iterator[None]:
    """Within the block a signal to stop is remembered and changes nothing; Ctrl-C ends the process without a word.

    Args:
        is_process_ending: nothing comes behind the block, so it stays like that to the end of the process.
    """

    def remember(number: int, frame: FrameType | None) -> None:
        if number != CTRL_C:
            note_signal(number)
        else:
            end_at_next_ctrl_c()
            signal.raise_signal(CTRL_C)

    _signals.is_process_ending = is_process_ending
    with _handling(remember, is_restored=not is_process_ending):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], is_restored: bool = True) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    _signals.blocks += 1
    numbers = (*SIGNALS, CTRL_C) if hears_ctrl_c() else SIGNALS
    before = {number: signal.signal(number, handler) for number in numbers}
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

    SLURM tells each of them, a terminal does by Ctrl-C, and a run needs its batches until its checkpoint is written.

    Args:
        worker: number of the process, as torch's DataLoader gives it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, CTRL_C))
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
