"""Files that others wrote -> named tensors, so that nothing in a file can run.

safetensors and .npz hold numbers only; torch's pickles are read with weights only, also where an environment variable
asks otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvit.files import printable

CHUNK = 2**22
UNSURE_NS = 2_000_000_000  # a file written so lately may change without a newer date
END = 22  # bytes that an archive ends in, before its comment; the last two are the length of that
SEAL = b"sslvit crc32 "  # of the comment of a checkpoint of ours: the checksum of all its bytes follows
TRIES = 3  # to read a checkpoint that is replaced meanwhile
SHARD, SHARDS = "shard", "shards"  # in a checkpoint: what stands for a tensor that lies in parts; where the parts are
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # of transformers


def read_torch_file(path: Path) -> dict[str, Any]:
    """A .safetensors file, an .npz of arrays or a torch file, read so that nothing in it can run.

    A checkpoint in parts comes whole. A run that goes on may replace it while it is read; then the newer one is read.

    Raises:
        ValueError: it is neither, it is damaged, or it holds more than numbers.
    """
    for _ in range(TRIES):
        content = read_one_file(path)
        if not isinstance(content.get(SHARDS), dict):
            return content
        try:
            return joined(content, path)
        except FileNotFoundError:
            if read_one_file(path).get(SHARDS) == content[SHARDS]:
                raise
    raise ValueError(f"{path}: replaced again and again while it was read. Read it when the run has ended.")


def read_one_file(path: Path) -> dict[str, Any]:
    """read_torch_file for one file, whole or a part."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix == ".npy":
        raise ValueError(f"{path}: one array, not a checkpoint. Give the .npz of all arrays.")
    if path.suffix not in (".safetensors", ".npz"):
        check_zip(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold their command line
            content = torch.load(path, map_location="cpu", weights_only=True)
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


def check_checkpoint(path: Path) -> None:
    """Whether a checkpoint's bytes, and those of its parts, are the ones that were written.

    Raises:
        ValueError: a file is damaged or missing.
    """
    head = read_one_file(path)
    if isinstance(head.get(SHARDS), dict):
        for part in shard_files(head, path):
            check_zip(part)


_checked: set[tuple[str, int, int, int]] = set()


def check_zip(path: Path) -> None:
    """Compare the checksum of one of our checkpoints, or those of the records in a torch file that others wrote.

    Torch does not look at either. Other kinds of files have none.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    about = path.stat()
    mark = (str(path), about.st_ino, about.st_size, about.st_mtime_ns)
    if mark in _checked:
        return
    try:
        if not _compare_seal(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    with archive.open(entry) as file:
                        while file.read(CHUNK):
                            pass
    except Exception as error:  # damaged headers make zipfile raise almost anything
        raise ValueError(
            f"{path}: damaged: its bytes are not those that were written ({type(error).__name__}: {str(error)[:80]})."
        ) from error
    if time.time_ns() - about.st_mtime_ns > UNSURE_NS:
        _checked.add(mark)


def _compare_seal(path: Path) -> bool:
    """Whether a file ends in the checksum of its bytes, as our checkpoints do.

    Raises:
        ValueError: it does, but of other bytes.
    """
    length = len(SEAL) + 8
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * (END + length)))  # also of one that is cut, or that something was put behind
        tail = file.read()
        start = tail.rfind(b"PK\5\6")
        has_length = start >= 0 and tail[start + END - 2 : start + END] == length.to_bytes(2, "little")
        if SEAL not in tail and not has_length:
            return False
        end, comment = tail[-length - END : -length], tail[-length:]
        file.seek(0)
        found, left = 0, size - length - 2
        while left > 0:
            data = file.read(min(CHUNK, left))
            found, left = zlib.crc32(data, found), left - len(data)
            if not data:
                break
    found = zlib.crc32(b"\0\0", found)  # the length of the comment, before there was one
    if end[-2:] != length.to_bytes(2, "little") or comment != SEAL + b"%08x" % found:
        raise ValueError("another checksum")
    return True


def shards_folder(head: dict[str, Any], path: Path) -> Path:
    """Where the parts of a checkpoint are that was written by ranks that each hold a part of every weight.

    Raises:
        ValueError: it names a place elsewhere.
    """
    name = str(head[SHARDS].get("folder"))
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{path}: its parts are in {name}, which is outside its folder.")
    return path.parent / SHARDS / name


def shard_file(head: dict[str, Any], path: Path, rank: int) -> Path:
    return shards_folder(head, path) / f"rank-{rank:05d}.pt"


def shard_files(head: dict[str, Any], path: Path) -> list[Path]:
    """The parts of a checkpoint, all of which are there.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: it says an impossible number of parts.
    """
    ranks = head[SHARDS].get("ranks")
    if not isinstance(ranks, int) or not 0 < ranks < 1 << 20:
        raise ValueError(f"{path}: says that it has {str(ranks)[:40]} parts. Is it damaged?")
    files = []
    for rank in range(ranks):
        files.append(shard_file(head, path, rank))
        if not files[-1].exists():  # said at the first, however many it promises
            raise FileNotFoundError(
                f"{files[-1]}: a part of {path} is missing. Copy the folder {SHARDS}/ along with it."
            )
    return files


def joined(head: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint in parts, whole: the rows of each tensor, rank by rank.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: the parts do not fit.
    """
    parts = [read_one_file(file) for file in shard_files(head, path)]

    def whole(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {SHARD, "shape"}:
            tensor = torch.cat([part["tensors"][value[SHARD]] for part in parts])
            if list(tensor.shape) != value["shape"]:
                raise ValueError(f"{value[SHARD]} is {list(tensor.shape)}, not {value['shape']}")
            return tensor
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    try:
        return whole({key: value for key, value in head.items() if key != SHARDS})
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{path}: its parts do not fit together ({reason}). Are they of one checkpoint?") from error


def read_folder_weights(folder: Path) -> dict[str, Any]:
    """The content of the weights in a folder of transformers: one file, or several named by an index.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged, holds more than numbers, or is named outside the folder.
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
