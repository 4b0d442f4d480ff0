"""Counter-based random numbers: the same key gives the same numbers on any rank, in any worker and after a resume.

The state of a sequential generator would have to be saved, and it depends on all earlier draws. Here every draw has a
key (seed, step or epoch, purpose), and any row of an endless table can be computed without the others.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # settings and plans use this module without torch
    from torch import Tensor

GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64  # as int64: torch has no products of uint64
MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
MAX_COLUMNS = 1 << 20
Cells = TypeVar("Cells", np.ndarray, "Tensor")


def generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator determined by its key alone; strings name the purpose of a draw."""
    return np.random.Generator(np.random.Philox(_sequence(key)))


@contextmanager
def torch_seeded(*key: int | str) -> Iterator[None]:
    """Seed torch's CPU generator by a key while the block runs; torchvision's transforms use no other generator."""
    import torch  # not at the top: settings and plans use this module without torch

    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int(generator(*key).integers(2**62)))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def all_seeded(*key: int | str) -> Iterator[None]:
    """Seed the global generators of torch (CPU), NumPy and Python by a key while third-party code runs."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 third-party code uses the global one
    seeds = generator(*key, "others").integers(2**32, size=2).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002
    try:
        with torch_seeded(*key):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def seed_torch(*key: int | str) -> None:
    """Seed torch's generators on all devices by a key. In a training step, only dropout uses them."""
    import torch  # not at the top: settings and plans use this module without torch

    torch.manual_seed(int(generator(*key).integers(2**62)))


def uniform(key: tuple[int | str, ...], rows: np.ndarray, columns: int) -> np.ndarray:
    """Compute the given rows of an endless table of uniform numbers in [0, 1).

    Each cell is the output of SplitMix64 (Steele et al. 2014) at the cell's position in one long sequence, so only the
    requested rows are computed.

    Args:
        key: Seed, epoch or step, and purpose.
        rows: Row numbers below 2**44, in any order.
        columns: Numbers per row.

    Returns:
        float64, (len(rows), columns).
    """
    cells = np.asarray(rows, np.int64)[:, None] * MAX_COLUMNS + np.arange(1, columns + 1)
    return _split_mix(key, cells, columns).astype(np.float64) * 2.0**-53


def uniform_on(key: tuple[int | str, ...], rows: Tensor, columns: int) -> Tensor:
    """Compute the same numbers as `uniform` on the device of `rows`, without a transfer from the host.

    Args:
        key: As in `uniform`.
        rows: Row numbers, int64, 'b'.
        columns: Numbers per row.

    Returns:
        float64, 'b columns'.
    """
    import torch

    cells = rows[:, None] * MAX_COLUMNS + torch.arange(1, columns + 1, device=rows.device)
    return _split_mix(key, cells, columns).double() * 2.0**-53


def _split_mix(key: tuple[int | str, ...], cells: Cells, columns: int) -> Cells:
    """53 random bits for each cell of a key's table as int64; products wrap around as with uint64."""
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} columns are more than a row of this table has ({MAX_COLUMNS}).")
    mixed = cells * GOLDEN_RATIO + int(_sequence(key).generate_state(1, np.uint64).view(np.int64)[0])
    mixed = (mixed ^ _shifted(mixed, 30)) * MULTIPLIERS[0]
    mixed = (mixed ^ _shifted(mixed, 27)) * MULTIPLIERS[1]
    return _shifted(mixed ^ _shifted(mixed, 31), 11)


def _shifted(values: Cells, bits: int) -> Cells:
    """Logical shift to the right; the >> of int64 would repeat the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _sequence(key: tuple[int | str, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key])
