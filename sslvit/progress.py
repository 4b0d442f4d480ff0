"""How far it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10


def track(items: Iterable[Item], what: str, total: int, unit: str = "images", each: int = 1) -> Iterator[Item]:
    """Yield the items and say how far it is, once it has taken two seconds.

    Args:
        items: to go through.
        what: is being done, as in "packing".
        total: how many units in all.
        unit: what is counted.
        each: units per item.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=f" {unit}", delay=2, leave=False) as bar:
            for item in items:
                yield item
                bar.update(each)
        return
    start, due = time.monotonic(), 2.0
    for done, item in enumerate(items):
        elapsed = time.monotonic() - start
        if elapsed > due and done:
            due = elapsed + SECONDS_BETWEEN_LINES
            rate = done * each / elapsed
            left = (total - done * each) / rate
            print(f"{what}: {done * each:,} of {total:,} {unit}, {rate:,.0f}/s, {left:.0f} s left", flush=True)
        yield item
