"""A cache of features on disk, keyed by encoder, shards and view."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslvit.evaluate.sources import FeatureTable, LabeledSet, Readout, Source
from sslvit.files import cache_folder, new_file, remove_stale_temporaries
from sslvit.settings.views import ViewSettings

logger = logging.getLogger(__name__)

FORMAT = 3  # increased when the same key would stand for different numbers


def key_of(source: Source, data: LabeledSet, view: ViewSettings, batch: int) -> str:
    """The cache key of features: weights, settings, images, view, and all else that affects their last digits."""
    settings = asdict(source.settings)
    content = {
        "format": FORMAT, "source": source.fingerprint(), "settings": settings, "shards": data.index.fingerprint(),
        "chosen": None if data.subset is None else data.subset.tolist(), "view": asdict(view), "batch": batch,
        "device": source.device.type, "precision": source.precision,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class FeatureCache:
    """A folder of features of limited size: the least recently used are deleted first. Other files are left alone."""

    def __init__(self, folder: str | Path, limit_gb: float = 20.0) -> None:
        self.folder, self.limit_gb = cache_folder(folder), limit_gb
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--cache {folder}: not a folder. Give one, or none.")

    def find(self, key: str, readouts: Sequence[Readout], data: LabeledSet) -> FeatureTable | None:
        """The cached features at some readouts, or None if there are none; a damaged file counts as missing.

        A cached table counts only if it has the samples of the data set in their order. Labels are those of the data
        set now: shards may have been labeled anew since.
        """
        try:
            found = load_file(self.folder / key / "rows.safetensors")["samples"]
        except (OSError, SafetensorError, KeyError):
            return None
        if not np.array_equal(found.numpy(), data.samples):
            return None
        columns = {}
        for readout in readouts:
            try:
                values = load_file(self.folder / key / _name(readout))["values"]
            except (OSError, SafetensorError, KeyError):
                continue
            if len(values) == len(found):
                columns[readout] = values
        with suppress(OSError):  # another process may have deleted it to make room
            os.utime(self.folder / key)
        return FeatureTable(columns, data.labels, found) if columns else None

    def put(self, key: str, table: FeatureTable) -> None:
        """Add a table to the features stored under its key. A full disk or a read-only folder is not an error."""
        folder = self.folder / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write({"samples": table.samples}, folder / "rows.safetensors")
            for readout, values in table.columns.items():
                _write({"values": values.contiguous()}, folder / _name(readout))
            os.utime(folder)
            self._shrink(folder)
        except OSError as error:
            logger.info(f"features are not cached: {error}")

    def _shrink(self, newest: Path) -> None:
        sizes = {}
        for entry in self.folder.iterdir():
            if _is_ours(entry):
                sizes[entry] = sum(file.stat().st_size for file in entry.iterdir())
        for entry in sorted(sizes, key=lambda entry: entry.stat().st_mtime):
            if sum(sizes.values()) <= self.limit_gb * 2**30 or entry == newest:
                return
            shutil.rmtree(entry, ignore_errors=True)
            del sizes[entry]


def _is_ours(entry: Path) -> bool:
    """Whether a folder is an entry of a cache: its name is a key, and it holds only tables, perhaps unfinished."""
    if not re.fullmatch(r"[0-9a-f]{32}", entry.name) or entry.is_symlink() or not entry.is_dir():
        return False
    return all(re.fullmatch(r"(rows|\d+-[a-z+]+)\.safetensors(\.\d+\.part)?", file.name) for file in entry.iterdir())


def _name(readout: Readout) -> str:
    return f"{readout[0]}-{readout[1]}.safetensors"


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    remove_stale_temporaries(path)
    with new_file(path, sync=False) as temporary:  # a file damaged by a power cut counts as missing
        save_file(tensors, temporary)
