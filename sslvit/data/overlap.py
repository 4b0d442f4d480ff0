"""Detect overlap of training and validation images, by comparing bytes and names on a sample."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from sslvit.data.index import ShardIndex
from sslvit.data.plan import evenly_spaced
from sslvit.data.python_data import PythonIndex
from sslvit.files import expand_path, printable
from sslvit.stopping import is_first_process

logger = logging.getLogger(__name__)

MAX_COMPARED = 500  # evenly spaced validation images
MIN_COMPARED = 10  # fewer are not conclusive
MAX_READ = 20_000  # training images with the same lengths as those
MAX_BYTES = 2**16  # bytes compared at the end of each image


@dataclass
class Stored:
    """Encoded images: their lengths in bytes, and a function that reads their ends."""

    sizes: np.ndarray
    read: Callable[[int], bytes]


def check_same_data(train: ShardIndex, val: ShardIndex, is_allowed: bool, option: str) -> None:
    """Reject validation data that is the training data, and warn about images that are in both.

    Args:
        train: Training data of a head or of the weights.
        val: Validation data.
        is_allowed: Whether to warn about equal data instead of rejecting it.
        option: Option that allows equal data, for the message.

    Raises:
        ValueError: both are the same data.
    """
    names = f"{printable(train.location)} and {printable(val.location)}"
    if train.fingerprint() == val.fingerprint():
        refuse_or_warn(names, is_allowed, option)
    elif not any(one.is_remote or isinstance(one, PythonIndex) for one in (train, val)):
        with stored(train) as one, stored(val) as other:
            is_shared = warn_of_shared(one, other, names)
        if not is_shared and have_same_names(train, val) and is_first_process():
            logger.warning(
                f"{names}: {len(val):,} images of the same names in both; if they are the same in other files, these "
                "scores say nothing of others"
            )


def check_same_source(train: str | None, val: str | None, is_allowed: bool, option: str) -> None:
    """Reject the same folder for both before it is packed; arguments and errors as for check_same_data."""
    if not train or not val or is_allowed:
        return
    one, other = (os.path.realpath(expand_path(path)) for path in (train, val))
    if one == other and os.path.exists(one):
        refuse_or_warn(f"{printable(train)} and {printable(val)}", is_allowed, option)


def refuse_or_warn(names: str, is_allowed: bool, option: str) -> None:
    """Raise ValueError for equal training and validation data, or warn if that is allowed."""
    if not is_allowed:
        raise ValueError(
            f"{names}: the same images. Scores of images that were trained on say nothing of others: hold some out "
            f"(sslvit shards pack SRC DST --holdout 0.1), or pass {option}."
        )
    if is_first_process():
        logger.warning(f"{names}: the same images, so these scores say nothing of others")


def warn_of_shared(train: Stored, val: Stored, names: str) -> bool:
    """Warn about validation images that are also training images; returns whether there are any."""
    shared, compared = count_shared(train, val)
    if shared and is_first_process():
        logger.warning(f"{names}: {shared:,} of {compared:,} images to be scored that were compared are in both")
    return shared > 0


def count_shared(train: Stored, val: Stored) -> tuple[int, int]:
    """Number of compared validation images that are also training images, and number of compared images."""
    count = min(MAX_COMPARED, len(val.sizes))
    while count >= min(MIN_COMPARED, len(val.sizes)):
        chosen = evenly_spaced(len(val.sizes), count)
        alike = np.nonzero(np.isin(train.sizes, val.sizes[chosen]))[0]
        if len(alike) <= MAX_READ:
            found = {train.read(int(number)) for number in alike}
            return sum(val.read(int(number)) in found for number in chosen), count
        count //= 2
    return 0, 0


def have_same_names(train: ShardIndex, val: ShardIndex) -> bool:
    """Whether both hold the same file names, as re-encoded copies do; names that are all numbers do not count."""
    if len(train) != len(val):
        return False
    chosen = evenly_spaced(len(val), min(MAX_COMPARED, len(val)))
    of_train, of_val = (
        [PurePosixPath(index.key(int(number))).name.partition(".")[0] for number in chosen] for index in (train, val)
    )
    return of_train == of_val and not all(name.isdecimal() for name in of_val)


@contextmanager
def stored(index: ShardIndex) -> Iterator[Stored]:
    """The images of local shards, whose files stay open within the block."""
    with ExitStack() as files:
        opened: dict[int, BinaryIO] = {}

        def read(sample: int) -> bytes:
            shard = int(np.searchsorted(index.first_of_shard, sample, side="right")) - 1
            if shard not in opened:
                opened[shard] = files.enter_context(open(index.local_path(shard), "rb"))
            record = index.records[sample]
            size = int(record["size"])
            return read_end(opened[shard], int(record["offset"]) + size, size)

        yield Stored(np.asarray(index.records["size"]), read)


def stored_files(paths: list[Path]) -> Stored:
    """Images in separate files."""
    sizes = np.array([path.stat().st_size for path in paths])

    def read(number: int) -> bytes:
        with open(paths[number], "rb") as file:
            return read_end(file, int(sizes[number]), int(sizes[number]))

    return Stored(sizes, read)


def read_end(file: BinaryIO, end: int, size: int) -> bytes:
    """Read the last bytes of an image, at most MAX_BYTES."""
    length = min(size, MAX_BYTES)
    file.seek(max(end - length, 0))
    return file.read(length)
