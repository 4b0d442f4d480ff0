"""Pack images into tar shards with an index.

Shards are in WebDataset format: KEY.jpg (or .png, ...) beside KEY.cls, which holds the class number. By default files
are stored unchanged, in an order shuffled with a fixed seed. Which sample goes into which shard is decided before
anything is read, so the same input gives the same bytes for any number of workers and machines.

    DST/packing/job.json          description of the packing job
    DST/packing/shard-000000.*    finished shards with their reports, which a restart skips
    DST/                          the shards and the index, once all are complete
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
from filelock import FileLock

from sslvit.data.any_source import SourceOptions, read_source
from sslvit.data.dataset_source import dataset_source
from sslvit.data.index import ShardIndex
from sslvit.data.labels import NO_LABEL
from sslvit.data.pack_job import PackJob
from sslvit.data.parallel import in_parallel
from sslvit.data.python_data import MapDataset
from sslvit.data.shard_images import shard_source
from sslvit.data.sources import Samples, SampleTable, hold_out
from sslvit.data.store import PackSettings
from sslvit.data.unfinished import (
    check_destination,
    describe_job,
    finish_packing,
    load_job,
    packed_earlier,
)
from sslvit.files import printable, write_atomically
from sslvit.locks import lock_folder

logger = logging.getLogger(__name__)


def pack_source(
    source: str | Path | MapDataset,
    destination: str | Path,
    settings: PackSettings | None = None,
    holdout: float = 0.0,
    overwrite: bool = False,
    workers: int | None = None,
    part: str | None = None,
    options: SourceOptions | None = None,
    only: str | Path | None = None,
) -> list[ShardIndex]:
    """Pack a folder of images, other shards, a list, an array, an IDX file or a data set.

    An interrupted packing is resumed: shards and folders that are complete are not packed again.

    Args:
        source: Any source that any_source.read_source accepts, or a map-style data set object.
        destination: Folder for the shards; with a holdout, for train/ and val/ in it.
        settings: How images are stored.
        holdout: Fraction of each class, the last by file name, that is packed into val/.
        overwrite: Replace existing shards.
        workers: Number of processes; None for one per core.
        part: "3/64" writes only the third of 64 parts, to pack on several machines.
        options: Options for reading the source.
        only: File with the names of the images to take from other shards, one per line.

    Returns:
        The index, or those of train and val; an empty list for a part.

    Raises:
        ValueError: there are no images, or the folder holds shards or an unfinished packing of another source.
    """
    destination = Path(destination)
    if not 0 <= holdout < 1:
        raise ValueError(
            f"--holdout {holdout}: must be in [0, 1) (0.1 holds out a tenth of each class for validation)."
        )
    part_of = _read_part(part)
    if only is not None and holdout:
        raise ValueError("--only and --holdout exclude each other: the list is of images that are split already.")
    if not isinstance(source, (str, Path)):
        if only is not None:
            raise ValueError("--only: takes some images of shards, and this is a data set object. Pack it first.")
        found, name = dataset_source(source, (options or SourceOptions()).label_column), type(source).__name__
    else:
        found = read_source(source, options) if only is None else shard_source(Path(source), only)
        name = printable(source)
    settings = settings or PackSettings()
    if found.orientation not in (None, settings.orientation):
        raise ValueError(
            f"{name}: its images are read {found.orientation}, and packing them so takes --orientation "
            f"{found.orientation}."
        )
    jobs = [(destination, SampleTable(found.samples))]
    if holdout:
        folders = (destination / "train", destination / "val")
        held_out = hold_out(found.samples, holdout)
        jobs = [(folder, SampleTable(samples)) for folder, samples in zip(folders, held_out, strict=True)]
        del held_out
    found.samples = []  # moved to the tables; the packing processes would copy the list
    earlier = [
        None if overwrite else packed_earlier(folder, samples, found.classes, settings) for folder, samples in jobs
    ]
    if None not in earlier and not all(samples.modified_ns.all() for _, samples in jobs):
        earlier = [None] * len(jobs)  # no files: others are compared by some of their images, too few to skip all
    for (folder, _), index in zip(jobs, earlier, strict=True):
        if index is None:
            check_destination(folder, overwrite)
        else:
            logger.info(f"{folder}: the same images are packed there already; --overwrite packs them again.")
    for note in found.notes:
        logger.info(f"{name}: {note}")
    packed = [
        pack(samples, folder, found.classes, settings, overwrite, workers, part_of, found.skipped)
        if index is None
        else index
        for (folder, samples), index in zip(jobs, earlier, strict=True)
    ]
    return [index for index in packed if index is not None and part_of[1] == 1]


def pack(
    samples: Samples,
    destination: str | Path,
    classes: list[str] | None = None,
    settings: PackSettings | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    part: tuple[int, int] = (1, 1),
    skipped: dict[str, str] | None = None,
) -> ShardIndex | None:
    """Write shards and their index; unreadable images are skipped, counted and listed in the index.

    `part` is the part that this process writes and the number of parts; `skipped` lists the files that the source has
    skipped.

    Returns:
        The index, or None for one of several parts (finish_packing joins them).

    Raises:
        ValueError: shards already exist, no image is readable, or there are no samples.
    """
    destination, settings = Path(destination), settings or PackSettings()
    if not samples:
        raise ValueError(f"{destination}: no images to pack.")
    check_destination(destination, overwrite)
    table = SampleTable.of(samples)
    _check_labels(table, classes, destination)
    folder = destination / "packing"
    number, count = part
    with lock_folder(folder, "pack into it", f".part-{number}-of-{count}.lock"):
        job = PackJob(table, folder, settings)
        _begin(job, describe_job(table, classes, settings), overwrite, skipped or {})
        shards = list(range(job.shards))[number - 1 :: count]
        sizes = np.diff(job.starts)
        for _ in in_parallel(job, shards, workers, "packing", int(sizes[shards].sum())):
            pass
        if count == 1:
            return finish_packing(destination, overwrite)
    logger.info(f"{folder}: part {number} of {count} is done. When all are: sslvit shards index --merge {destination}")
    return None


def _check_labels(samples: SampleTable, classes: list[str] | None, destination: Path) -> None:
    """If classes are given, raise ValueError for samples whose label is missing or out of range."""
    if classes is None:
        return
    unlabeled = int((samples.labels == NO_LABEL).sum())
    if unlabeled:
        raise ValueError(
            f"{destination}: {unlabeled} of {len(samples)} samples have no label, and there are {len(classes)} "
            "classes. Leave these samples out, or pass no classes to pack all of them without labels."
        )
    outside = samples.labels[(samples.labels < 0) | (samples.labels >= len(classes))]
    if len(outside):
        raise ValueError(f"{destination}: a label of {outside[0]} for {len(classes)} classes, which count from 0.")


def _begin(job: PackJob, identity: dict, overwrite: bool, skipped: dict[str, str]) -> None:
    """Create the folder and decide where shards begin, or resume an earlier attempt."""
    job_file = job.folder / "job.json"
    if job_file.exists():
        earlier = load_job(job.folder)
        changed = [key for key in identity if earlier.get(key) != identity[key]]
        if not changed:
            job.starts = np.array(earlier["starts"])
            done = sum(1 for _ in job.folder.glob("shard-*.json"))
            if done:
                logger.info(f"{job.folder}: going on; {done} of {job.shards} shards are packed already.")
            return
        if not overwrite and changed == ["times"]:
            raise ValueError(
                f"{job.folder}: an unfinished packing of files that have other times now: they were changed, or copied "
                "without their times (cp -p and rsync -a keep them). Delete that folder, or pass --overwrite."
            )
        if not overwrite:
            raise ValueError(
                f"{job.folder}: an unfinished packing of something else (other {', '.join(changed)}). "
                "Finish it, delete that folder, or pass --overwrite."
            )
        for old in [*job.folder.glob("shard-*"), job_file]:  # but not the locks in use
            old.unlink()
    job.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder / "job.lock"):  # if several parts start together, the first decides
        if not job_file.exists():
            job.cut()
            write_atomically(job_file, json.dumps(identity | {"starts": job.starts.tolist(), "passed_over": skipped}))
    job.starts = np.array(load_job(job.folder)["starts"])


def _read_part(part: str | None) -> tuple[int, int]:
    if part is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {part}: expected a part and their number, from 1/64 to 64/64.")
    return int(match[1]), int(match[2])
