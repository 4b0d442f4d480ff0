"""Open shards by a pattern of names or an address, with the index beside them or one that is made once."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock

from sslvit.data.header import BadImage
from sslvit.data.index import ShardIndex, load_index, read_index
from sslvit.data.records import CHECKED_BYTES, RECORD, is_url, sha256_of
from sslvit.data.remote import ShardCache
from sslvit.data.scan import index_names
from sslvit.data.schema import checked_index, parse_json
from sslvit.files import printable
from sslvit.settings.data import PIPE

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096  # upper bound for the header of an .npy file
PATTERN_CHARACTERS = "{*?["


def expand(pattern: str) -> list[str]:
    """Expand a pattern: braces as in WebDataset (shard-{00..99}.tar), wildcards as in a shell (shards/*.tar).

    Raises:
        ValueError: a brace is not closed.
        FileNotFoundError: no file matches.
    """
    if os.path.exists(pattern):
        return [pattern]
    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ValueError(
            f"data.shards: {printable(pattern)}: braces that do not close. Example: shard-{{000..099}}.tar"
        ) from error
    found: list[str] = []
    for name in names:
        if is_url(name) or name.startswith(PIPE) or not any(sign in name for sign in "*?["):
            found.append(name)
            continue
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise FileNotFoundError(f"data.shards: no file matches {printable(name)}.")
        found += matches
    return found


def open_pattern(pattern: str, cache: ShardCache) -> ShardIndex:
    """Open some shards of a folder or address, from its index if it lists them all; otherwise they are indexed once."""
    names = expand(pattern)
    folder = names[0].rpartition("/")[0] or "."
    is_one_folder = all((name.rpartition("/")[0] or ".") == folder for name in names)
    if is_one_folder:
        with suppress(FileNotFoundError):  # there is no index
            whole = open_address(folder, cache) if is_url(folder) else load_index(folder)
            selected = _select_shards(whole, [name.rpartition("/")[2] for name in names])
            if selected is not None:
                return selected
    return index_named(pattern, names, cache)


def _select_shards(whole: ShardIndex, names: list[str]) -> ShardIndex | None:
    """Restrict an index to some of its shards; None if it does not list them all.

    The records of consecutive shards stay memory-mapped, since they may exceed this machine's memory.
    """
    number_of = {shard.name: number for number, shard in enumerate(whole.shards)}
    if not all(name in number_of for name in names):
        return None
    numbers = np.array([number_of[name] for name in names])
    if (np.diff(numbers) == 1).all():
        records = whole.records[whole.first_of_shard[numbers[0]] : whole.first_of_shard[numbers[-1] + 1]]
    else:
        of_shards = [whole.records[whole.first_of_shard[n] : whole.first_of_shard[n + 1]] for n in numbers]
        records = np.concatenate(of_shards)
    return dataclasses.replace(whole, shards=[whole.shards[n] for n in numbers], records=records)


def index_named(pattern: str, names: list[str], cache: ShardCache) -> ShardIndex:
    """Index shards at any location; the index is cached under the shards' names and versions."""
    names = [name if is_url(name) else str(Path(name).resolve()) for name in names]
    try:
        versions = _versions(names, cache)
    except BadImage as error:
        raise FileNotFoundError(f"data.shards: {error}") from error
    folder = cache.folder / f"index-{hashlib.sha256(repr((names, versions)).encode()).hexdigest()[:32]}"
    length_of = {name: int(version["length"]) for name, version in zip(names, versions, strict=True)
                 if is_url(name) and version.get("length", "").isdecimal()}  # fmt: skip

    def path_of(name: str) -> Path:
        try:
            path = cache.get(name, expected=length_of.get(name)) if is_url(name) else Path(name)
        except BadImage as error:
            raise FileNotFoundError(f"data.shards: {error}") from error
        if not path.exists():
            raise FileNotFoundError(f"data.shards: {name} does not exist (of {pattern}).")
        return path

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".index.lock"):
        reason = "shards without an index; indexing them once."
        if (folder / "index.json").exists():
            try:
                return _read_cached(folder, pattern, cache)
            except ValueError as error:
                reason = f"the cached index of these shards is damaged, so they are indexed again ({error})"
        logger.info(f"{printable(pattern)}: {reason}")
        index_names(pattern, names, path_of).save(folder)
        index = _read_cached(folder, pattern, cache)
        for shard in index.shards:
            if is_url(shard.name):
                cache.rename_to_digest(shard.name, shard.sha256)
        return index


def _read_cached(folder: Path, pattern: str, cache: ShardCache) -> ShardIndex:
    content, records = (folder / "index.json").read_bytes(), folder / "index.npy"
    return dataclasses.replace(read_index(content, records, pattern, cached_in=str(folder)), cache=cache)


def _versions(names: list[str], cache: ShardCache) -> list[Any]:
    """Versions that detect replaced shards: size and time of local files, and the metadata of remote ones."""
    addresses = [name for name in names if is_url(name)]
    of_address = dict(zip(addresses, cache.versions(addresses), strict=True)) if addresses else {}
    versions: list[Any] = []
    for name in names:
        if is_url(name):
            versions.append(of_address[name])
        elif os.path.exists(name):
            about = os.stat(name)
            versions.append((about.st_size, about.st_mtime_ns))
        else:
            versions.append(None)
    return versions


def open_address(address: str, cache: ShardCache) -> ShardIndex:
    """Open the index that lies beside shards on the network."""
    address = address.rstrip("/")
    try:
        content = cache.get(f"{address}/index.json").read_bytes()
        about = checked_index(parse_json(content))
        (split,) = about["splits"].values()
        max_bytes = HEADER_BYTES + RECORD.itemsize * split["num_samples"]
        sha256 = about["records_sha256"]
        records = cache.get(f"{address}/index.npy", sha256=sha256, max_bytes=max_bytes)
        if records.stat().st_size <= CHECKED_BYTES and sha256_of(records) != sha256:  # the cached copy may be damaged
            records.unlink()
            records = cache.get(f"{address}/index.npy", sha256=sha256, max_bytes=max_bytes)
    except BadImage as error:
        if "checksum" in str(error):
            raise ValueError(
                f"{address}/index.npy: not the one that index.json describes. Upload both again."
            ) from error
        raise FileNotFoundError(
            f"{address}: no index there ({error}). Run sslvit shards index where the shards lie and upload index.json "
            "and index.npy beside them, or name the shards: ADDRESS/shard-{000000..000099}.tar"
        ) from error
    except ValueError as error:
        raise ValueError(f"{printable(address)}/index.json: {error}. Index the shards again and upload it.") from error
    return dataclasses.replace(read_index(content, records, address), cache=cache)
