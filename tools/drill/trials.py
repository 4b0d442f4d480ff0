"""Trials: what is guaranteed, how often it was tried, what went wrong and how to repeat it."""

from __future__ import annotations

import itertools
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MAX_TEXT = 600  # characters of a problem in the report


@dataclass
class Trial:
    """One attempt to break a promise.

    Args:
        name: of the part and its number, which repeat the trial.
        folder: empty, for its files; removed afterwards.
        rng: all that it leaves to chance.
        inner: of a trial that holds many inputs, the only one to take; None for all.
        tried: how many attempts it counts for.
        problems: (name, text) of what went wrong.
    """

    name: str
    folder: Path
    rng: random.Random
    inner: int | None = None
    tried: int = 1
    problems: list[tuple[str, str]] = field(default_factory=list)

    def problem(self, text: str, inner: int | None = None) -> None:
        name, text = self.name if inner is None else f"{self.name}.{inner}", " ".join(text.split())
        self.problems.append((name, text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."))

    def expect(self, is_so: bool, text: str) -> bool:
        """Note a problem unless the expectation holds; returns whether it does."""
        if not is_so:
            self.problem(text)
        return is_so


@dataclass(frozen=True)
class Part:
    """A promise and the trial that tests it.

    Args:
        name: short, for --only.
        promise: one sentence, for the table.
        run: makes one trial.
        full: trials after which it has been tried enough, however much time is left.
    """

    name: str
    promise: str
    run: Callable[[Trial], None]
    full: int = 1_000_000


@dataclass
class Row:
    """What came of one part: a line of the table."""

    kind: str
    part: str
    promise: str
    tried: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)


def run_parts(
    kind: str, parts: list[Part], seconds: float, seed: int, scratch: Path, only: str | None = None
) -> list[Row]:
    """Trials of all parts in turn until the time is over; at least one trial of all is made.

    Args:
        kind: of the parts.
        parts: in the order of the table; which comes first depends on the seed.
        seconds: a trial that has begun is finished.
        seed: of all chance.
        scratch: folder for the trials.
        only: the name of one trial, such as mae-3 or tar-5.17.
    """
    if not parts:
        raise ValueError(f"{kind}: no such part.")
    rows = {part.name: Row(kind, part.name, part.promise) for part in parts}
    deadline = time.monotonic() + seconds
    if only is not None:
        name, _, place = only.rpartition("-")
        number, _, inner = place.partition(".")
        part = next((part for part in parts if part.name == name), None)
        if part is None or not number.isdigit():
            raise ValueError(f"--only {only}: no such trial of {kind}. Its parts: {', '.join(rows)}.")
        _run_one(part, int(number), int(inner) if inner else None, seed, scratch, rows[name])
        return list(rows.values())
    first = seed % len(parts)
    for number in itertools.count():
        left = [part for part in parts[first:] + parts[:first] if number < part.full]
        for part in left:
            if time.monotonic() > deadline and any(row.tried for row in rows.values()):
                return list(rows.values())
            _run_one(part, number, None, seed, scratch, rows[part.name])
        if not left:
            return list(rows.values())


def _run_one(part: Part, number: int, inner: int | None, seed: int, scratch: Path, row: Row) -> None:
    name = f"{part.name}-{number}"
    folder = scratch / row.kind / name
    folder.mkdir(parents=True)
    trial = Trial(name, folder, random.Random(f"{seed} {row.kind} {name}"), inner)
    try:
        part.run(trial)
    except Exception:  # in the drill's own process: what should not have happened there has
        trial.problem(traceback.format_exc()[-MAX_TEXT:])
    row.tried += trial.tried
    for failed in dict.fromkeys(name for name, _ in trial.problems):
        text = "; ".join(text for name, text in trial.problems if name == failed)
        command = f"python tools/drill/drill.py {row.kind} --seed {seed} --only {failed}"
        row.failures.append({"trial": failed, "problem": text, "command": command})
    shutil.rmtree(folder, ignore_errors=True)
