"""What a user names as data -> an index: folders, patterns, addresses, image folders, mixtures."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock

from sslvit.data.header import MODES, BadImage
from sslvit.data.index import ShardIndex, load_index, read_index, unlisted_warning
from sslvit.data.mixture import Index, JoinedIndex, MixturePlan, Plan, split_by_weight
from sslvit.data.open_folder import Check, channels_of, open_image_folder
from sslvit.data.plan import EpochPlan
from sslvit.data.python_data import given_index
from sslvit.data.records import CHECKED_BYTES, RECORD, is_url, sha256_of
from sslvit.data.remote import ShardCache
from sslvit.data.scan import index_names, index_shards
from sslvit.data.schema import checked_index, parse_json
from sslvit.data.sources import ImageSource
from sslvit.data.stream import StreamIndex
from sslvit.data.subset import limit_samples
from sslvit.files import expand_path, printable
from sslvit.settings import DataSettings, RunSettings
from sslvit.settings.data import PIPE, is_given
from sslvit.settings.task import TaskSettings

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096  # of an .npy file, at most
PATTERN_CHARACTERS = "{*?["
USAGE = "Pass a folder of images or of shards (sslvit shards pack SRC DST)."


def open_data(
    settings: DataSettings,
    seed: int,
    multiple_of: int = 1,
    usual_batch: int = TaskSettings.usual.batch,
    channels: int | None = None,
) -> tuple[Index | StreamIndex, Plan]:
    """The index of a run's data and the order in which it is read.

    Args:
        settings: Data and batch size.
        seed: Seed of the order.
        multiple_of: What a batch size that is chosen or lowered is a multiple of (`TrainSettings.batch_multiple`).
        usual_batch: Largest batch where none is given (`Usual.batch` of the task).
        channels: Channels of the encoder's input, to which a folder's images must be convertible; None for any.

    Raises:
        FileNotFoundError: nothing given, or nothing there.
        ValueError: no images there, a damaged index, or a batch that does not fit. What the names in an image folder
            and a few headers tell is refused before it is packed.
    """

    def check(source: str, found: ImageSource) -> None:
        numbers = channels_of(found)
        if channels is not None and numbers:
            check_channels(channels, channels if channels in numbers else min(numbers), source)
        if not settings.mixture:
            classes = None if found.classes is None else len(found.classes)
            images = settings.images_of(len(found.samples), source, classes)
            EpochPlan([images], settings.batch_for(images, usual_batch, multiple_of), seed)

    if settings.is_stream:
        if settings.has_limit:
            raise ValueError("data.limit: a stream cannot be drawn from. Pack it into shards, or leave the limit out.")
        stream = StreamIndex(
            expand(settings.shards or ""), settings.stream_samples, settings.allow_pipe, shard_cache(settings)
        )
        return stream, EpochPlan([len(stream)], settings.batch_for(len(stream), usual_batch, multiple_of), seed)
    if not settings.mixture:
        index = _open(settings.shards or "", settings, check)
        if settings.has_limit:
            index = limit_samples(index, settings, seed)
        return index, _plan(index, settings, settings.batch_for(len(index), usual_batch, multiple_of), seed)
    weights = list(settings.mixture.values())
    split_by_weight(weights, settings.global_batch_size or usual_batch)  # refuses before anything is opened
    sources = [_open(source, settings, check) for source in settings.mixture]
    fillable = min(len(index) * sum(weights) / weight for index, weight in zip(sources, weights, strict=True))
    rows = split_by_weight(weights, settings.batch_for(int(fillable), usual_batch, multiple_of))
    plans = []
    for number, (index, count) in enumerate(zip(sources, rows, strict=True)):
        try:
            plans.append(_plan(index, settings, count, seed + (number << 32)))
        except ValueError as error:
            raise ValueError(f"data.mixture, {index.location}: its {count} images of each batch: {error}") from error
    return JoinedIndex(sources, rows), MixturePlan(plans)


def open_run_data(settings: RunSettings) -> tuple[Index | StreamIndex, Plan]:
    """The index of a run's data and the order in which it is read; errors as of `open_data`."""
    batch_multiple, usual_batch = settings.train.batch_multiple, settings.task.usual.batch
    return open_data(settings.data, settings.seed, batch_multiple, usual_batch, settings.encoder.channels)


def _open(source: str, settings: DataSettings, check: Callable[[str, ImageSource], None]) -> ShardIndex:
    indexed = open_indexed(source)  # needs no cache
    return open_shards(source, shard_cache(settings), partial(check, source)) if indexed is None else indexed


def open_indexed(source: str | Path) -> ShardIndex | None:
    """The index of a folder that has one; None for whatever else a name may stand for.

    Raises:
        ValueError: a damaged index.
    """
    path = Path(expand_path(source))
    if is_given(str(source)) or not str(source) or not (path / "index.json").exists():
        return None
    index = load_index(path)
    if notice := unlisted_warning(index):
        logger.warning(f"{printable(path)}: {notice}")
    return index


def open_shards(source: str | Path, cache: ShardCache | None = None, check: Check | None = None) -> ShardIndex:
    """The index of a data set; shards without one are indexed, and an image folder is packed first.

    Args:
        source: a folder of shards or of images, a pattern of shards, or an address of either.
        cache: Cache for network shards and packed image folders; None for the default folder.
        check: Refuses what an image folder holds before it is packed, by raising ValueError; None for no check.

    Raises:
        FileNotFoundError: nothing given, or nothing there.
        ValueError: no images there, or a damaged index.
    """
    if is_given(str(source)):
        return given_index(str(source))
    if (indexed := open_indexed(source)) is not None:
        return indexed
    name, cache = expand_path(source), cache or shard_cache(DataSettings())
    path = Path(name)
    if not name:
        raise FileNotFoundError(f"no data given. {USAGE}")
    if not path.is_dir():  # a folder may be called anything, also like a pattern
        if any(sign in name for sign in PATTERN_CHARACTERS) or name.endswith(".tar"):
            return _open_pattern(name, cache)
        if is_url(name):
            return _open_address(name, cache)
        raise FileNotFoundError(f"{printable(path)} is not a folder. {USAGE}")
    if any(path.glob("*.tar")) and not (path / "packing").is_dir():
        if not os.access(path, os.W_OK):  # someone else's folder: its index is kept in the cache
            return _index_names(name, [str(tar) for tar in sorted(path.glob("*.tar"))], cache)
        with FileLock(path / ".index.lock"):  # every rank of a run comes here at once
            if not (path / "index.json").exists():
                logger.info(f"{printable(path)}: shards without an index; indexing them once.")
                return index_shards(path)
        return load_index(path)
    if (path / "packing").is_dir():
        return load_index(path)  # says what to do
    return open_image_folder(path, cache, check)


def is_image_folder(source: str | Path) -> bool:
    """Whether a source is a folder of images that has to be packed, and not one of shards or of their index."""
    path = Path(expand_path(source))
    is_indexed = (path / "index.json").exists() or (path / "train" / "index.json").exists()
    return path.is_dir() and not is_indexed and not (path / "packing").is_dir() and not any(path.glob("*.tar"))


def check_channels(encoder: int, images: int, location: str) -> None:
    """Refuse images whose channels are not those of the encoder's input and cannot be converted to them.

    Args:
        encoder: Channels of the encoder's input.
        images: Channels of the images.
        location: Where these lie, for the message.

    Raises:
        ValueError: They cannot.
    """
    if images != encoder and not {images, encoder} <= set(MODES):
        raise ValueError(
            f"encoder.channels: {encoder}, but the images of {printable(location)} have {images}. "
            f"Images are converted between {', '.join(map(str, MODES))} channels only."
        )


def check_present(index: Index | StreamIndex, max_fraction: float) -> None:
    """Check that the shards on this machine are there and as long as the index says.

    Up to a fraction of all samples in missing shards is reported and skipped.

    Raises:
        ValueError: more are missing.
    """
    shards = index.missing_shards()
    missing = sum(index.shards[number].samples for number in shards)
    if not missing:
        return
    number, problem = next(iter(shards.items()))
    text = (
        f"{printable(index.location)}: {len(shards)} shards cannot be read, {missing} of {len(index)} samples "
        f"({printable(index.shard_label(number))}: {problem})"
    )
    if missing > max_fraction * len(index):
        raise ValueError(f"{text}. Copy them again, or if they were changed on purpose: sslvit shards index FOLDER")
    logger.warning(f"{text}; they are skipped and counted.")


def shard_cache(settings: DataSettings) -> ShardCache:
    """The place for shards from the network and of image folders."""
    return ShardCache(settings.cache, settings.cache_gb)


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for: shard-{00..99}.tar as WebDataset expands it, shards/*.tar as a shell does.

    Raises:
        ValueError: braces that do not close.
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


def _plan(index: ShardIndex, settings: DataSettings, batch: int, seed: int) -> EpochPlan:
    lanes = settings.lanes
    if settings.mixture and lanes:
        lanes = int(np.gcd(lanes, batch))
    return EpochPlan(index.shard_samples, batch, seed, lanes, settings.window_shards)


def _open_pattern(pattern: str, cache: ShardCache) -> ShardIndex:
    """Some shards of a folder or an address: those of its index if it lists them all, otherwise indexed once."""
    names = expand(pattern)
    folder = names[0].rpartition("/")[0] or "."
    is_one_folder = all((name.rpartition("/")[0] or ".") == folder for name in names)
    if is_one_folder:
        with suppress(FileNotFoundError):  # no index there
            whole = _open_address(folder, cache) if is_url(folder) else load_index(folder)
            selected = _select_shards(whole, [name.rpartition("/")[2] for name in names])
            if selected is not None:
                return selected
    return _index_names(pattern, names, cache)


def _select_shards(whole: ShardIndex, names: list[str]) -> ShardIndex | None:
    """The part of an index that some of its shards make up; None if it does not list them all.

    The records of shards that follow each other stay in the file, which may be larger than this machine's memory.
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


def _index_names(pattern: str, names: list[str], cache: ShardCache) -> ShardIndex:
    """Index shards wherever they lie; the result is kept in the cache under the shards' names and versions."""
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
    """What tells replaced shards from those that were indexed: lengths and times, and what a server says."""
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


def _open_address(address: str, cache: ShardCache) -> ShardIndex:
    """The index that lies beside shards on the network."""
    address = address.rstrip("/")
    try:
        content = cache.get(f"{address}/index.json").read_bytes()
        about = checked_index(parse_json(content))
        (split,) = about["splits"].values()
        max_bytes = HEADER_BYTES + RECORD.itemsize * split["num_samples"]
        sha256 = about["records_sha256"]
        records = cache.get(f"{address}/index.npy", sha256=sha256, max_bytes=max_bytes)
        if records.stat().st_size <= CHECKED_BYTES and sha256_of(records) != sha256:  # on this machine's disk, by now
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
