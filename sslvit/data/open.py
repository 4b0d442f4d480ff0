"""Open the data that a user names: folders of shards, patterns, addresses, image folders and mixtures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock

from sslvit.data.header import MODES
from sslvit.data.index import ShardIndex, is_unfinished, load_index, unlisted_warning
from sslvit.data.mixture import Index, JoinedIndex, MixturePlan, Plan, split_by_weight
from sslvit.data.open_folder import Check, channels_of, open_image_folder
from sslvit.data.open_names import PATTERN_CHARACTERS, expand, index_named, open_address, open_pattern
from sslvit.data.plan import EpochPlan
from sslvit.data.python_data import given_index
from sslvit.data.records import is_url
from sslvit.data.remote import ShardCache
from sslvit.data.scan import index_shards
from sslvit.data.sources import ImageSource
from sslvit.data.stream import StreamIndex
from sslvit.data.subset import limit_samples
from sslvit.files import expand_path, printable
from sslvit.settings import DataSettings, RunSettings
from sslvit.settings.data import is_given
from sslvit.settings.task import TaskSettings

logger = logging.getLogger(__name__)

USAGE = "Pass a folder of images or of shards (sslvit shards pack SRC DST)."


def open_data(
    settings: DataSettings,
    seed: int,
    multiple_of: int = 1,
    usual_batch: int = TaskSettings.usual.batch,
    channels: int | None = None,
) -> tuple[Index | StreamIndex, Plan]:
    """Open a run's data: its index and the plan of its order.

    Args:
        settings: Data and batch size.
        seed: Seed of the order.
        multiple_of: Number that a chosen or lowered batch size is a multiple of (`TrainSettings.batch_multiple`).
        usual_batch: Largest batch size to choose if none is given (`Usual.batch` of the task).
        channels: Channels of the encoder's input, to which the images of a folder must be convertible; None for any.

    Raises:
        FileNotFoundError: no data is given, or it does not exist.
        ValueError: there are no images, the index is damaged, or the batch size does not fit. For an image folder,
            problems visible in its file names and a few headers are reported before it is packed.
    """

    def check(source: str, found: ImageSource) -> None:
        if channels is not None and (numbers := channels_of(found)):
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
    split_by_weight(weights, settings.global_batch_size or usual_batch)  # check the weights before anything is opened
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
    """Open the data of a run's settings; result and errors as for `open_data`."""
    batch_multiple, usual_batch = settings.train.batch_multiple, settings.task.usual.batch
    return open_data(settings.data, settings.seed, batch_multiple, usual_batch, settings.encoder.channels)


def _open(source: str, settings: DataSettings, check: Callable[[str, ImageSource], None]) -> ShardIndex:
    indexed = open_indexed(source)  # needs no cache
    return open_shards(source, shard_cache(settings), partial(check, source)) if indexed is None else indexed


def open_indexed(source: str | Path) -> ShardIndex | None:
    """The index of a folder that has one; None for any other kind of data.

    Raises:
        ValueError: the index is damaged.
    """
    path = Path(expand_path(source))
    if is_given(str(source)) or not str(source) or not (path / "index.json").exists():
        return None
    index = load_index(path)
    if notice := unlisted_warning(index):
        logger.warning(f"{printable(path)}: {notice}")
    return index


def open_shards(source: str | Path, cache: ShardCache | None = None, check: Check | None = None) -> ShardIndex:
    """Open the index of a data set; shards without one are indexed, and an image folder is packed first.

    Args:
        source: Folder of shards or images, pattern of shards, or address of either.
        cache: Cache for network shards and packed image folders; None for the default folder.
        check: Raises ValueError to reject an image folder before it is packed; None for no check.

    Raises:
        FileNotFoundError: no data is given, or it does not exist.
        ValueError: there are no images, or the index is damaged.
    """
    if is_given(str(source)):
        return given_index(str(source))
    if (indexed := open_indexed(source)) is not None:
        return indexed
    name, cache = expand_path(source), cache or shard_cache(DataSettings())
    path = Path(name)
    if not name:
        raise FileNotFoundError(f"no data given. {USAGE}")
    if not path.is_dir():  # checked first, since a folder's name may look like a pattern
        if any(sign in name for sign in PATTERN_CHARACTERS) or name.endswith(".tar"):
            return open_pattern(name, cache)
        if is_url(name):
            return open_address(name, cache)
        raise FileNotFoundError(f"{printable(path)} is not a folder. {USAGE}")
    if any(path.glob("*.tar")) and not is_unfinished(path):
        if not os.access(path, os.W_OK):  # read-only folder: its index is kept in the cache
            return index_named(name, [str(tar) for tar in sorted(path.glob("*.tar"))], cache)
        with FileLock(path / ".index.lock"):  # all ranks of a run get here at the same time
            if not (path / "index.json").exists():
                logger.info(f"{printable(path)}: shards without an index; indexing them once.")
                return index_shards(path)
        return load_index(path)
    if is_unfinished(path):
        return load_index(path)  # raises an error with the remedy
    return open_image_folder(path, cache, check)


def is_image_folder(source: str | Path) -> bool:
    """Whether a source is a folder of images to pack, not one of shards or of an index."""
    path = Path(expand_path(source))
    is_indexed = (path / "index.json").exists() or (path / "train" / "index.json").exists()
    return path.is_dir() and not is_indexed and not is_unfinished(path) and not any(path.glob("*.tar"))


def check_channels(encoder: int, images: int, location: str) -> None:
    """Reject images whose channels cannot be converted to those of the encoder's input.

    Args:
        encoder: Channels of the encoder's input.
        images: Channels of the images.
        location: Location of the images, for the message.

    Raises:
        ValueError: the channels cannot be converted.
    """
    if images != encoder and not {images, encoder} <= set(MODES):
        raise ValueError(
            f"encoder.channels: {encoder}, but the images of {printable(location)} have {images}. "
            f"Images are converted between {', '.join(map(str, MODES))} channels only."
        )


def check_present(index: Index | StreamIndex, max_fraction: float) -> None:
    """Check that the local shards exist and have the length given in the index.

    If at most `max_fraction` of all samples are in bad shards, these are reported and skipped.

    Raises:
        ValueError: more samples are missing.
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
    """The cache for network shards and packed image folders."""
    return ShardCache(settings.cache, settings.cache_gb)


def _plan(index: ShardIndex, settings: DataSettings, batch: int, seed: int) -> EpochPlan:
    lanes = settings.lanes
    if settings.mixture and lanes:
        lanes = int(np.gcd(lanes, batch))
    return EpochPlan(index.shard_samples, batch, seed, lanes, settings.window_shards)
