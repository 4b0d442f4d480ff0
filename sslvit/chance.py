"""Chance as a pure function: the same key gives the same numbers on any rank, worker or resume.

A stream of random numbers would have to be saved, and its position depends on who drew before. Here every draw
names its key (seed, step or epoch, purpose), and a row of a table can be had without the rows above it.
"""

from __future__ import annotations

import zlib

import numpy as np

WORDS_PER_BLOCK = 4  # Philox makes four 64-bit numbers per count


def generator(*key: int | str) -> np.random.Generator:
    """A generator that only its key decides; strings name the purpose of a draw."""
    return np.random.Generator(_philox(key))


def uniform_rows(key: tuple[int | str, ...], first: int, rows: int, columns: int) -> np.ndarray:
    """Rows first .. first + rows of an endless table of uniform numbers in [0, 1), without making the others.

    Returns:
        float64, (rows, columns).
    """
    stride = -(-columns // WORDS_PER_BLOCK)  # blocks a row takes
    philox = _philox(key)
    philox.advance(first * stride)
    table = np.random.Generator(philox).random((rows, stride * WORDS_PER_BLOCK))
    return table[:, :columns]


def _philox(key: tuple[int | str, ...]) -> np.random.Philox:
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key]
    return np.random.Philox(key=np.random.SeedSequence(numbers).generate_state(2, np.uint64))
