"""index.npy, which holds one record per sample, and its checksum."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from sslvit.data.labels import NO_LABEL
from sslvit.files import new_file, printable

RECORD = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4")])
CHECKED_BYTES = 64 * 2**20  # up to this size, the checksum of index.npy is verified at each start


def save_records(file: Path, records: np.ndarray) -> None:
    """Write records atomically; np.save would not report a full disk."""
    with new_file(file) as temporary, open(temporary, "wb") as out:
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(records))
        out.write(np.ascontiguousarray(records).data)


def load_records(file: Path, samples: int, classes: list[str] | None) -> np.ndarray:
    """Load the records of `samples` samples; in large files, labels are checked only when they are used.

    Raises:
        ValueError: the file is missing or damaged, or does not hold these records.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns about the syntax of a damaged header
            records = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"{file.name} is missing") from error
    except Exception as error:  # numpy parses headers with Python's parser, which raises other errors
        raise ValueError(f"{file.name} is unreadable ({printable(error, 80)})") from error
    if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.ndim != 1:
        raise ValueError(f"{file.name} holds something else than records")
    if len(records) != samples:
        raise ValueError(f"{file.name} holds {len(records)} records for {samples} images")
    if records.nbytes <= CHECKED_BYTES:
        check_labels(records["label"], classes, file.name)
    return records


def check_digest(records_file: Path, expected: str) -> None:
    """Raise ValueError if a records file of up to CHECKED_BYTES has a wrong checksum."""
    try:
        is_other = os.path.getsize(records_file) <= CHECKED_BYTES and sha256_of(records_file) != expected
    except FileNotFoundError as error:
        raise ValueError(f"{records_file.name} is missing") from error
    if is_other:
        raise ValueError(f"{records_file.name} is not the one that it describes")


def check_labels(labels: np.ndarray, classes: list[str] | None, name: str) -> None:
    """Raise ValueError for class numbers out of range, which could make np.bincount allocate any amount of memory."""
    if not labels.size:
        return
    smallest, largest = int(labels.min()), int(labels.max())
    lowest = NO_LABEL if classes is None else 0
    if smallest < lowest or (classes is not None and largest >= len(classes)):
        wrong = smallest if smallest < lowest else largest
        raise ValueError(f"{name} has the label {wrong}, which is none of its {len(classes or [])} classes")


def is_url(source: str) -> bool:
    """Whether a source is an address on the network."""
    return "://" in source


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
