"""Reading weight files as named tensors without running code in them, and the checksum at the end of our checkpoints.

safetensors and .npz files contain only numbers; torch files are read with weights_only=True, even if an environment
variable requests otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvit.files import brief, printable

CHUNK = 2**22
MTIME_MARGIN_NS = 2_000_000_000  # a file modified this recently may change again without a newer timestamp
END_RECORD_BYTES = 22  # a zip archive's end record without the comment; its last two bytes are the comment's length
CHECKSUM = b"sslvit crc32 "  # start of a checkpoint's zip comment, followed by the checksum of all its bytes
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # transformers' names


def read_torch_file(path: Path, mmap: bool = False, map_location: str = "cpu") -> dict[str, Any]:
    """Read a .safetensors file, an .npz file or a torch file without running code in it.

    Args:
        path: The file.
        mmap: Memory-map a torch file, so that values are read when they are used. Another process must not write into
            the file meanwhile, but may replace it by a new file, as our own writers do.
        map_location: Device of a torch file's tensors; with `mmap`, tensors on "meta" have shapes but no values.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is of another kind or damaged, or contains objects other than weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix == ".npy":
        raise ValueError(f"{path}: one array, not a checkpoint. Give the .npz of all arrays.")
    if path.suffix not in (".safetensors", ".npz"):
        _check_kind(path)
        check_checksum(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files contain their command line
            mmap = mmap and zipfile.is_zipfile(path)  # torch up to 1.5 wrote another format
            content = torch.load(path, map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it holds objects besides tensors and loading those could run code. "
            "Ask its author for a file of weights only (.safetensors), or re-save its state dict where you trust it."
        ) from error
    except Exception as error:  # damaged bytes make torch's reader raise almost anything
        reason = printable(str(error).splitlines()[0], 120) if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason}). Is the download complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint with named weights.")
    return content


def _check_kind(path: Path) -> None:
    """Refuse a file that torch did not write; its files are zip archives, pickles or tar files."""
    with open(path, "rb") as file:
        start = file.read(32)
    if start and not start.startswith((b"PK", b"\x80")) and not tarfile.is_tarfile(path):
        first = brief(start.decode(errors="replace").splitlines()[0])
        raise ValueError(
            f"{path}: not a file of weights (it begins with {first}). Give a run folder, an encoder folder, or a file "
            "such as .ckpt, .pth, .safetensors or .npz."
        )


class ChecksumWriter:
    """A file object for torch.save that appends the checksum of all bytes as the zip archive's comment.

    torch itself stores checksums only of single records, and ignores them when reading.

    Args:
        file: The file, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum, self.tail = file, 0, b""

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes and add them to the checksum."""
        self.checksum = zlib.crc32(data, self.checksum)
        self.tail = (self.tail + bytes(data[-END_RECORD_BYTES:]))[-END_RECORD_BYTES:]
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def append_checksum(self) -> None:
        """Write the comment and its length, which was zero before."""
        if self.tail.startswith(b"PK\5\6") and self.tail.endswith(b"\0\0"):
            comment = CHECKSUM + b"%08x" % self.checksum
            self.file.seek(-2, os.SEEK_END)
            self.file.write(len(comment).to_bytes(2, "little") + comment)


_checked: set[tuple[str, int, int, int]] = set()


def check_checksum(path: Path) -> None:
    """Verify the checksum of one of our checkpoints, or those of the records in any other torch file.

    torch verifies neither. Other kinds of files have no checksums.

    Raises:
        ValueError: The file is damaged.
    """
    stat = path.stat()
    version = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if version in _checked:
        return
    try:
        if not _compare_checksum(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    with archive.open(entry) as file:
                        while file.read(CHUNK):
                            pass
    except Exception as error:  # damaged headers make zipfile raise almost anything
        raise ValueError(
            f"{path}: damaged: its bytes are not those that were written ({type(error).__name__}: {str(error)[:80]})."
        ) from error
    if time.time_ns() - stat.st_mtime_ns > MTIME_MARGIN_NS:
        _checked.add(version)


def _compare_checksum(path: Path) -> bool:
    """Verify the checksum at the end of a file; returns False if there is none.

    Raises:
        ValueError: The checksum does not match.
    """
    length = len(CHECKSUM) + 8
    stored = length.to_bytes(2, "little")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * (END_RECORD_BYTES + length)))  # also finds it in a truncated or extended file
        tail = file.read()
        start = tail.rfind(b"PK\5\6")
        has_length = start >= 0 and tail[start + END_RECORD_BYTES - 2 : start + END_RECORD_BYTES] == stored
        if CHECKSUM not in tail and not has_length:
            return False
        end, comment = tail[-length - END_RECORD_BYTES : -length], tail[-length:]
        file.seek(0)
        found, remaining = 0, size - length - 2
        while remaining > 0 and (data := file.read(min(CHUNK, remaining))):
            found, remaining = zlib.crc32(data, found), remaining - len(data)
    found = zlib.crc32(b"\0\0", found)  # the comment's length was zero when the checksum was computed
    if end[-2:] != stored or comment != CHECKSUM + b"%08x" % found:
        raise ValueError("another checksum")
    return True


def count_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """Count the distinct block numbers that follow a prefix in parameter names."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return sum(number.isdecimal() for number in numbers)


def read_folder_weights(folder: Path) -> dict[str, Any]:
    """Read the weights in a folder written by transformers: one file, or several listed in an index.

    Raises:
        FileNotFoundError: The folder has no weights.
        ValueError: A file is damaged, contains objects other than weights, or is outside the folder.
    """
    file = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: no weights there ({', '.join(FOLDER_FILES)}). Is the download complete?")
    if file.suffix != ".json":
        return read_torch_file(file)
    try:
        names = sorted({str(name) for name in json.loads(file.read_text())["weight_map"].values()})
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}). Is the download complete?") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{file}: names {name}, which is outside its folder.")
        weights |= read_torch_file(folder / name)
    return weights
