"""How far it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
FIRST_REPORT_SECONDS = 2.0
REPORT_INTERVAL_SECONDS = 10.0


class Counter:
    """Units done so far."""

    def __init__(self) -> None:
        self.done = 0

    def tick(self, units: int = 1) -> None:
        """Count units that are done."""
        self.done += units


def track(items: Iterable[Item], what: str, total: int, unit: str = "images", each: int = 1) -> Iterator[Item]:
    """Yield the items and say how far it is, once it has taken two seconds.

    Args:
        items: Items to go through.
        what: Name of the work, as in "packing".
        total: Total number of units.
        unit: what is counted.
        each: units per item.
    """
    with track_counter(what, total, unit) as counter:
        for item in items:
            yield item
            counter.tick(each)


@contextmanager
def track_counter(
    what: str, total: int, unit: str = "images", done: Callable[[], int] | None = None
) -> Iterator[Counter]:
    """Say how far it is while the block runs, from a thread of its own.

    Args:
        what: Name of the work.
        total: Total number of units.
        unit: what is counted.
        done: Returns the number of units done; None to count the ticks of the yielded counter.
    """
    counter, finished = Counter(), threading.Event()
    read = done or (lambda: counter.done)
    thread = threading.Thread(target=_report, args=(what, total, unit, read, finished), daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        finished.set()
        thread.join()


def _report(what: str, total: int, unit: str, done: Callable[[], int], finished: threading.Event) -> None:
    start = time.monotonic()
    if not logger.isEnabledFor(logging.INFO):
        return
    if sys.stderr.isatty():
        if not finished.wait(FIRST_REPORT_SECONDS):
            with tqdm(total=total, desc=what, unit=f" {unit}", leave=False) as bar:
                bar.start_t = bar.last_print_t = time.time() - FIRST_REPORT_SECONDS
                while not finished.wait(0.2):
                    bar.update(done() - bar.n)
        return
    wait = FIRST_REPORT_SECONDS
    while not finished.wait(wait):
        wait = REPORT_INTERVAL_SECONDS
        count = done()
        rate = count / (time.monotonic() - start)
        left = f", {(total - count) / rate:.0f} s left" if count else ""
        logger.info(f"{what}: {count:,} of {total:,} {unit}, {rate:,.0f}/s{left}")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While the block runs, libraries that load models show no bars and no reports of theirs among our output."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    had_bars = {}
    for name in ("transformers.utils.logging", "huggingface_hub.utils"):
        module = sys.modules.get(name)  # one that is not imported shows nothing
        if module is not None:
            is_transformers = name.startswith("transformers")
            had_bars[name] = (
                module.is_progress_bar_enabled() if is_transformers else not module.are_progress_bars_disabled()
            )
            (module.disable_progress_bar if is_transformers else module.disable_progress_bars)()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, had in had_bars.items():
            if had:
                module = sys.modules[name]
                (module.enable_progress_bar if name.startswith("transformers") else module.enable_progress_bars)()
