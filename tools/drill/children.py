"""Processes forked after all imports: a command starts in milliseconds and can be killed at any moment."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FAULT = 70  # exit code of a child whose work raised
LONGEST = 120.0  # seconds after which a child counts as hanging
ENDS_IN_SECONDS = 5.0  # in which what a killed process started must be gone


class Child:
    """Work in a forked process that leads a session of its own, with its output in a file.

    Args:
        work: returns an exit code, or None for 0.
        log: file of its standard output and standard error.
        environment: variables to set.
        limits: resource limits by their number, such as {resource.RLIMIT_FSIZE: 4096}.
    """

    def __init__(
        self, work: Callable[[], int | None], log: Path, environment: dict[str, str] | None = None,
        limits: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.log, self.code, self.peak_bytes = log, None, 0
        reader, writer = os.pipe()
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _live(work, log, environment or {}, limits or {}, writer)
        os.close(writer)
        select.select([reader], [], [], LONGEST)
        os.close(reader)
        self.started = time.monotonic()  # the work begins now

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code, self.peak_bytes = os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        return self.code

    def wait(self, seconds: float = LONGEST) -> int | None:
        """The exit code; None, and the whole session is killed, if it has not ended by then."""
        while self.poll() is None and time.monotonic() < self.started + seconds:
            time.sleep(0.002)
        if self.code is None:
            self.kill_all()
            return None
        return self.code

    def wait_until(self, moment: float) -> bool:
        """Whether it still lives so many seconds after its start."""
        while self.poll() is None and time.monotonic() < self.started + moment:
            time.sleep(0.001)
        return self.code is None

    def send(self, number: int) -> None:
        """A signal to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9 of this process alone, as a scheduler or the kernel does it."""
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    def kill_all(self) -> None:
        """Clean up: this process and all that it started."""
        for pid in [*session_of(self.pid), self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while self.poll() is None:
            time.sleep(0.001)

    def left_behind(self, seconds: float = ENDS_IN_SECONDS) -> list[int]:
        """Processes that it started and that still live so long after its end; they are killed then."""
        deadline = time.monotonic() + seconds
        while (left := session_of(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill_all()
        return left

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def last_line(self) -> str:
        lines = [line for line in self.text().splitlines() if line.strip()]
        return lines[-1] if lines else ""


def in_child(work: Callable[[], int | None], log: Path) -> None:
    """Work that must succeed, away from this process, which stays free of threads.

    Raises:
        RuntimeError: it did not.
    """
    log.unlink(missing_ok=True)
    child = Child(work, log)
    if child.wait() != 0:
        raise RuntimeError(f"preparing the drill failed ({child.code}): {child.text()[-2000:]}")


def command(*words: object, folder: Path | None = None) -> Callable[[], int | None]:
    """`sslvit WORDS` as the work of a child, in a folder."""

    def work() -> int | None:
        from sslvit.cli import main

        if folder is not None:
            os.chdir(folder)
        try:
            return main([str(word) for word in words])
        except SystemExit as error:  # argparse
            return error.code if isinstance(error.code, int) else 2

    return work


def sslvit(log: Path, *words: object, folder: Path | None = None, **more) -> Child:
    """`sslvit WORDS`, begun in a folder."""
    return Child(command(*words, folder=folder), log, **more)


def ranks(words: list[str], count: int, folder: Path) -> list[Child]:
    """`sslvit WORDS` on so many ranks, each begun as torchrun begins it; logs are folder/rank-N.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "drill", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [
        sslvit(folder / f"rank-{rank}.txt", *words, environment={
            key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()
        })
        for rank in range(count)
    ]  # fmt: skip


def session_of(leader: int) -> list[int]:
    """Living processes of a session besides its leader."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != leader:
            try:
                state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(") ")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) == leader and state not in "ZX":
                found.append(int(entry))
    return found


def one_line_error(child: Child) -> str:
    """What is wrong with how a command said that it cannot go on; empty if it was said in one line, as promised."""
    text, last = child.text(), child.last_line()
    if child.code is None:
        return f"still running after {LONGEST:g} s"
    if child.code < 0:
        return f"killed by signal {-child.code}"
    if "Traceback (most recent call last)" in text:
        return f"a traceback: {' '.join(text[text.index('Traceback') :].split())[-400:]}"
    if not last.startswith("sslvit: "):
        return f"exit code {child.code}, and its last line is no error of sslvit's: {last[:300]}"
    if not last.isprintable():
        return f"control characters in the message: {last[:300]!r}"
    return ""


def _live(
    work: Callable[[], int | None], log: Path, environment: dict[str, str], limits: dict[int, int], ready: int
) -> None:
    """The child's whole life."""
    code: int | None = FAULT
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, out), (2, out)):
            os.dup2(source, target)
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        for number, most in limits.items():
            resource.setrlimit(number, (most, resource.getrlimit(number)[1]))
        os.write(ready, b"!")
        os.close(ready)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
