"""Stopping before the last step: signals, Ctrl-C, lost ranks, and the exit codes that schedulers see."""

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
    """A command received a signal to stop and can be run again; a BaseException, so that libraries do not catch it.

    Args:
        message: What is kept.

    Attributes:
        is_requeued: Whether the scheduler has been asked to requeue the job already, or must not be asked.
    """

    is_requeued = False


class Interrupted(Preempted):
    """The user stopped a training run by Ctrl-C; no scheduler is asked to requeue it.

    Args:
        message: What is kept, and how to continue.
    """

    is_requeued = True


class RankLost(Exception):
    """Another rank no longer responds because its machine or the network is down; the run can be resumed."""


class _Signals:
    """Signals received since the outermost of the context managers below was entered.

    Attributes:
        received: Name of the first signal.
        has_raised: Whether the signal raised an exception here, instead of being left to a training run.
        blocks: Number of active context managers.
        is_process_ending: Whether the process ends with the outermost one.
    """

    received: str | None = None
    has_raised = False
    blocks = 0
    is_process_ending = False


_signals = _Signals()


def received_signal() -> str | None:
    """Name of the signal that asked this process to stop, if any."""
    return _signals.received


def note_signal(number: int) -> str:
    """Record a signal for the handlers that follow this run, and return its name."""
    name = signal.Signals(number).name
    if _signals.blocks:
        _signals.received = _signals.received or name
    return name


def hears_ctrl_c() -> bool:
    """Whether this process reacts to Ctrl-C; shells start background processes with it ignored."""
    return signal.getsignal(CTRL_C) is not signal.SIG_IGN


def end_at_next_ctrl_c() -> None:
    """Make the next Ctrl-C end the process at once, even within a computation that does not return to Python.

    Under torchrun, its processes get the Ctrl-C of a terminal twice, since torchrun passes it on to them. There all
    further ones are ignored, and torchrun ends processes that do not end by themselves.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(CTRL_C, signal.SIG_IGN)
    else:  # an exception if the process goes on after the command, such as in a notebook
        signal.signal(CTRL_C, signal.SIG_DFL if _signals.is_process_ending else signal.default_int_handler)


@contextmanager
def stopping_at_once(message: str, is_kept: str = "") -> Iterator[None]:
    """Make a signal to stop end the block at once; a training run handles signals itself from its first step on.

    Only the first signal does so, since later ones would interrupt the cleanup; Ctrl-C always does. If a library
    swallows the exception, the next error in the block is treated as the signal.

    Args:
        message: Text after the name of the signal.
        is_kept: Text after "interrupted" on Ctrl-C; by default the message.

    Raises:
        Preempted: A signal was received.
        KeyboardInterrupt: The signal was a Ctrl-C.
    """
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child has nothing to report or save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == CTRL_C:
            end_at_next_ctrl_c()
            if os.isatty(2):
                os.write(2, b"\n")  # the terminal has printed ^C on the current line
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
    """Within the block, only record signals to stop; Ctrl-C ends the process without a message.

    Args:
        is_process_ending: Whether the process ends with the block; the handlers then stay in place.
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
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
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
    """Make a data loading process end on a signal from its parent, but not on one sent to all processes of a job.

    SLURM and Ctrl-C in a terminal signal every process, but a run needs batches until its checkpoint is written.

    Args:
        worker: Number of the worker, passed by torch's DataLoader.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, CTRL_C))
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def is_first_process() -> bool:
    """Whether this process prints and writes for all: rank zero under every launcher that Lightning supports."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


def check_one_process(command: str) -> None:
    """Refuse to run a command in each of several processes that torchrun has started."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{command}: runs in one process. Start it without torchrun.")


def requeue() -> None:
    """Ask SLURM to requeue this job if it is a batch job, and print the outcome."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+", job) or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        reason = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    outcome = f"was not taken: {reason}. Submit it again." if reason else "is in the queue again."
    print(f"SLURM job {job} {outcome}", file=sys.stderr, flush=True)
