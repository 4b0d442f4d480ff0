"""Progress reports: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, TypeVar

from sslvit.messages import BEFORE_MESSAGE
from sslvit.stopping import is_first_process

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
FIRST_REPORT_SECONDS = 2.0
MIN_INTERVAL_SECONDS, MAX_INTERVAL_SECONDS = 10.0, 60.0  # between lines: a tenth of the elapsed time, within these
REDRAW_SECONDS = 0.2
BAR_CELLS = 20


class Counter:
    """Counts finished units.

    Attributes:
        done: Number of finished units.
        note: Text to show after the number.
    """

    def __init__(self, done: int = 0) -> None:
        self.done, self.note = done, ""

    def tick(self, units: int = 1) -> None:
        """Add finished units."""
        self.done += units


def _columns() -> int:
    """Width of the terminal that bars are drawn on, which stdout may not be."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size((80, 24)).columns


class Bar:
    """A progress bar on one line of the terminal, with a count and the remaining time.

    Of nested bars only the innermost is drawn, after the counts of those around it.

    Args:
        what: Name of the work.
        total: Total number of units; None if unknown.
        unit: Name of the units.
        done: Units that an earlier process has finished.
        start: When the work began, by `time.monotonic`; None for now.
        work: How much work a number of units is, if they are not all alike.
    """

    shown: ClassVar[list[Bar]] = []  # outermost first

    def __init__(
        self, what: str, total: int | None, unit: str, done: int = 0, start: float | None = None,
        work: Callable[[int], float] = float,
    ) -> None:  # fmt: skip
        self.what, self.total, self.unit, self.first, self.work = what, total, unit, done, work
        self.start = time.monotonic() if start is None else start
        self.width, self.drawn_at, self.is_left, self.brief = 0, 0.0, False, ""
        Bar.shown.append(self)

    def draw(self, done: int, note: str = "") -> None:
        """Draw the bar, unless it was drawn a moment ago."""
        now = time.monotonic()
        bits = [count_in_words(done, self.total, self.unit), *([note] if note else [])]
        self.brief = f"{self.what}: {', '.join(bits)}"
        if self.is_left or Bar.shown[-1] is not self or now - self.drawn_at < REDRAW_SECONDS:
            return
        self.drawn_at = now
        cells = ""
        if self.total is not None:
            full, empty = "#-" if is_ascii() else "\u2588\u2591"
            count = BAR_CELLS * min(done, self.total) // max(self.total, 1)
            cells = f"{full * count}{empty * (BAR_CELLS - count)} "
            bits += time_left(self.start, now, self.first, done, self.total, self.work)
        around = "".join(f"{bar.brief}; " for bar in Bar.shown[:-1] if bar.brief)
        room = _columns() - 1
        line = f"{around}{self.what}: {cells}{', '.join(bits)}"[:room]
        write(f"\r{line}{' ' * (self.width - len(line))}")
        self.width = len(line)

    def erase(self) -> None:
        """Clear the line for a message; the bar is drawn again at its next update."""
        if self.width and not self.is_left:
            write(f"\r{' ' * self.width}\r")
        self.width, self.drawn_at = 0, 0.0

    def close(self) -> None:
        """Erase the bar for good."""
        self.erase()
        self.is_left = True
        if self in Bar.shown:
            Bar.shown.remove(self)


def erase_bars() -> None:
    """Clear the terminal's line for a message."""
    for bar in Bar.shown:
        bar.erase()


BEFORE_MESSAGE.append(erase_bars)


def leave_bars() -> None:
    """Leave the drawn line in place and start a new one; the current bars are not drawn again."""
    if any(bar.width for bar in Bar.shown):
        os.write(2, b"\n")  # signal handlers call this, possibly in the middle of a print
    for bar in Bar.shown:
        bar.is_left = True


def write(text: str) -> None:
    """Write to the terminal and flush."""
    sys.stderr.write(text)
    sys.stderr.flush()


def is_ascii() -> bool:
    """Whether the terminal can only show ASCII."""
    encoding = (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "")
    return os.environ.get("TERM") == "dumb" or encoding != "utf8"


def shows_bars() -> bool:
    """Whether to show progress as a bar on a terminal instead of as lines."""
    return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO) and is_first_process()


def count_in_words(done: int, total: int | None, unit: str) -> str:
    """Format a count, with its total if that is known."""
    return f"{done:,} {unit}" if total is None else f"{min(done, total):,} of {total:,} {unit}"


def time_left(
    start: float, now: float, first: int, done: int, total: int, work: Callable[[int], float] = float
) -> list[str]:
    """Remaining time at the pace so far, as a list of one text; empty if unknown."""
    if done <= first or done >= total:
        return []
    return [f"{duration((work(total) - work(done)) * (now - start) / (work(done) - work(first)))} left"]


def duration(seconds: float) -> str:
    """Format a number of seconds."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def track(items: Iterable[Item], what: str, total: int, unit: str = "images", each: int = 1) -> Iterator[Item]:
    """Yield the items and report progress, beginning after two seconds.

    Args:
        items: Items to iterate over.
        what: Name of the work, as in "packing".
        total: Total number of units.
        unit: Name of the units.
        each: Units per item; the last item may have fewer.
    """
    with track_counter(what, total, unit) as counter:
        for item in items:
            yield item
            counter.tick(each)


@contextmanager
def track_counter(
    what: str, total: int | None, unit: str = "images", done: Callable[[], int] | None = None
) -> Iterator[Counter]:
    """Report progress from a background thread while the block runs.

    Args:
        what: Name of the work.
        total: Total number of units. None if unknown; then reports begin when the first unit is done.
        unit: Name of the units.
        done: Returns the number of finished units; None to use the yielded counter.
    """
    counter, finished = Counter(), threading.Event()
    read = done or (lambda: counter.done)
    thread = threading.Thread(target=_report, args=(what, total, unit, read, counter, finished), daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        finished.set()
        thread.join()


_trackers = [0]  # number of active progress reports; nested ones print fewer lines


def _report(
    what: str, total: int | None, unit: str, done: Callable[[], int], counter: Counter, finished: threading.Event
) -> None:
    start = time.monotonic()
    if not logger.isEnabledFor(logging.INFO) or not is_first_process():
        return
    _trackers[0] += 1
    try:
        if shows_bars():
            if not finished.wait(FIRST_REPORT_SECONDS):
                bar = Bar(what, total, unit, start=start)
                while not finished.wait(REDRAW_SECONDS):
                    if (count := done()) or total is not None:
                        bar.draw(count, counter.note)
                bar.close()
            return
        wait = FIRST_REPORT_SECONDS if _trackers[0] == 1 else MIN_INTERVAL_SECONDS
        while not finished.wait(wait):
            now, count = time.monotonic(), done()
            wait = min(max(MIN_INTERVAL_SECONDS, (now - start) / 10), MAX_INTERVAL_SECONDS)
            bits = [count_in_words(count, total, unit), *([counter.note] if counter.note else [])]
            if total is not None:
                bits += time_left(start, now, 0, count, total)
            if count or total is not None:
                try:
                    logger.info(f"{what}: {', '.join(bits)}")
                except BrokenPipeError:  # the reader has exited; the command ends at its next line
                    return
    finally:
        _trackers[0] -= 1


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and reports of libraries that load models while the block runs."""
    with ExitStack() as undone:
        for name in ("transformers", "huggingface_hub", "timm"):
            library = logging.getLogger(name)
            undone.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        transformers = sys.modules.get("transformers.utils.logging")  # a library that is not imported prints nothing
        if transformers is not None and transformers.is_progress_bar_enabled():
            transformers.disable_progress_bar()
            undone.callback(transformers.enable_progress_bar)
        hub = sys.modules.get("huggingface_hub.utils")
        if hub is not None and not hub.are_progress_bars_disabled():
            hub.disable_progress_bars()
            undone.callback(hub.enable_progress_bars)
        yield
