"""Plausible silent faults, room by room: each changes numbers without an error, and a test must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change of one place in the code.

    Args:
        name: what is wrong then, as a sentence.
        file: that it is in.
        text: what stands there; it occurs exactly once.
        replacement: what stands there instead.
        tests: files of tests, or single tests, of which at least one must fail.
        survives: why no test can see it; empty for faults that must be caught.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    survives: str = ""
