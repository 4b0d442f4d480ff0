"""Images -> tar shards and their index.

Shards are WebDataset's: KEY.jpg (or .png, ...) beside KEY.cls, which holds the class number. Files go in
unchanged unless asked otherwise, in an order shuffled by a fixed seed, and the same input gives the same bytes for
any number of workers and machines: which sample goes in which shard is decided before anything is read.

    DST/packing/job.json          what is being packed, how
    DST/packing/shard-000000.*    finished shards with their reports; a restart skips these
    DST/                          takes the shards and the index when all are whole
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sslvit import rng
from sslvit.data.any_source import SourceOptions, read_source
from sslvit.data.decode import BadImage
from sslvit.data.index import RECORD, Shard, ShardIndex, load_records, save_records
from sslvit.data.labels import NO_LABEL
from sslvit.data.parallel import in_parallel
from sslvit.data.scan import ShardReport, join_reports, measure_shard
from sslvit.data.schema import checked_job, checked_report, parse_json
from sslvit.data.sources import Samples, SampleTable, Texts, hold_out
from sslvit.data.store import BLOCK, PackSettings, TarWriter, store
from sslvit.files import lock_folder, new_file, printable, write_atomically

logger = logging.getLogger(__name__)

MAX_MEMBER_NAME = 100  # of the plain tar header
TRIAL_IMAGES = 64  # encoded ahead to estimate how long the others become


@dataclass
class PackJob:
    """Everything that decides the bytes of the shards; the processes share it by fork.

    Args:
        samples: in the order of their source, as a table, which the processes do not copy.
        folder: for finished shards.
        settings: how images are stored.
        keys: unique names, one per sample.
        order: sample numbers in the order of packing.
        starts: position in that order at which each shard begins, and the end.
    """

    samples: SampleTable
    folder: Path
    settings: PackSettings
    keys: Texts = field(default_factory=lambda: Texts([]))
    order: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, int))

    def __post_init__(self) -> None:
        self.keys = Texts(_unique_keys(self.samples))
        self.order = rng.generator(0, "pack").permutation(len(self.samples))

    def cut(self) -> None:
        """Decide where shards begin."""
        self.starts = _shard_starts(self._stored_bytes(), self.settings.shard_mb * 2**20)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.starts) - 1

    def identity(self, classes: list[str] | None) -> dict:
        """What must be the same for a restart to go on."""
        source, times = digest_samples(self.samples), digest_times(self.samples)
        more = {"classes": classes, **asdict(self.settings)}
        return {"images": len(self.samples), "source": source, "times": times, **more}

    def _stored_bytes(self) -> np.ndarray:
        """About how long each sample becomes, in the order of packing; files that stay as they are exactly so."""
        sizes = self.samples.bytes[self.order].astype(float)
        headers = BLOCK + 2 * BLOCK * (self.samples.labels[self.order] != NO_LABEL)
        if self.settings.describe():
            trials = np.linspace(0, len(self.order) - 1, min(len(self.order), TRIAL_IMAGES)).astype(int)
            before = after = 0
            for position in trials:
                sample = self.samples[self.order[position]]
                try:
                    content = sample.read()
                    after += len(store(content, sample.suffix, self.settings)[0])
                    before += len(content)
                except (BadImage, OSError):
                    continue
            sizes *= after / before if before else 1.0
        return np.ceil(sizes / BLOCK) * BLOCK + headers

    def __call__(self, number: int, tick: Callable[[int], None]) -> ShardReport:
        """Write one shard and its report, each whole or not at all."""
        finished = load_report(self.folder, number)
        numbers = self.order[self.starts[number] : self.starts[number + 1]]
        if finished is not None:
            tick(len(numbers))
            return finished
        rows: list[tuple[int, int, int]] = []
        skipped: dict[str, str] = {}
        with new_file(self.folder / shard_name(number)) as part:
            with TarWriter(part) as tar:
                for i in numbers:
                    tick(1)
                    self._add(tar, i, rows, skipped)
            records = np.array(rows, RECORD)
            shard = Shard(shard_name(number), len(records), part.stat().st_size, tar.digest.hexdigest())
            upright = self.settings.orientation == "upright"
            measured, _ = measure_shard(part, records, self.shards, upright, self.settings.max_pixels, is_checked=True)
        report = ShardReport(shard, records, measured, skipped)
        save_report(self.folder, number, report)
        return report

    def _add(self, tar: TarWriter, number: int, rows: list[tuple[int, int, int]], skipped: dict[str, str]) -> None:
        """Write one sample, or note why not."""
        sample = self.samples[number]
        try:
            content, suffix = store(sample.read(), sample.suffix, self.settings)
        except BadImage as error:
            skipped[sample.key + sample.suffix] = str(error)
            return
        except OSError as error:  # of reading; what the disk says of writing ends the packing
            skipped[sample.key + sample.suffix] = error.strerror or str(error)
            return
        offset = tar.add(self.keys[number] + suffix, content)
        if sample.label != NO_LABEL:
            tar.add(self.keys[number] + ".cls", str(sample.label).encode())
        rows.append((offset, len(content), sample.label))


def pack_source(
    source: str | Path,
    destination: str | Path,
    settings: PackSettings | None = None,
    holdout: float = 0.0,
    overwrite: bool = False,
    workers: int | None = None,
    part: str | None = None,
    options: SourceOptions | None = None,
) -> list[ShardIndex]:
    """Pack a folder of images, a list, an array or an IDX file.

    Args:
        source: of the images (see any_source.read_source).
        destination: folder for the shards; with a holdout its train/ and val/.
        settings: how images are stored.
        holdout: fraction of each class, the last by file name, that goes to val/ instead.
        overwrite: replace shards that are already there.
        workers: processes; None for one per core.
        part: "3/64" writes the third of 64 parts only, as one machine of several.
        options: what only the user knows of the source.

    Returns:
        The index, or those of train and val; nothing for a part.

    Raises:
        ValueError: no images, shards already there, or an unfinished packing of something else.
    """
    destination = Path(destination)
    if not 0 <= holdout < 1:
        raise ValueError(
            f"--holdout {holdout}: must be in [0, 1) (0.1 holds out a tenth of each class for validation)."
        )
    part_of = _read_part(part)
    found = read_source(source, options)
    settings = settings or PackSettings()
    jobs = [(destination, SampleTable(found.samples))]
    if holdout:
        folders = (destination / "train", destination / "val")
        held_out = hold_out(found.samples, holdout)
        jobs = [(folder, SampleTable(samples)) for folder, samples in zip(folders, held_out, strict=True)]
        del held_out
    found.samples = []  # now in the tables: the processes that pack would copy them
    for folder, _ in jobs:
        check_destination(folder, overwrite)
    for note in found.notes:
        logger.info(f"{printable(source)}: {note}")
    packed = [
        pack(samples, folder, found.classes, settings, overwrite, workers, part_of, found.skipped)
        for folder, samples in jobs
    ]
    return [index for index in packed if index is not None]


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
    """Write shards and their index; unreadable images are skipped, counted and named in the index.

    Args:
        samples: images in the order of their source.
        destination: folder for the shards.
        classes: names by label, or None for images without labels.
        settings: how images are stored.
        overwrite: replace shards that are already there.
        workers: processes; None for one per core.
        part: which of how many parts this process writes.
        skipped: what was skipped in the source already, with the reason.

    Returns:
        The index, or None if other parts are still to come (finish_packing joins them).

    Raises:
        ValueError: shards are already there, nothing is readable, or nothing was given.
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
        _begin(job, job.identity(classes), overwrite, skipped or {})
        shards = list(range(job.shards))[number - 1 :: count]
        sizes = np.diff(job.starts)
        for _ in in_parallel(job, shards, workers, "packing", int(sizes[shards].sum())):
            pass
        if count == 1:
            return finish_packing(destination, overwrite)
    logger.info(f"{folder}: part {number} of {count} is done. When all are: sslvit shards index --merge {destination}")
    return None


def _check_labels(samples: SampleTable, classes: list[str] | None, destination: Path) -> None:
    """Raise ValueError for samples without a label, or with one beyond the classes, where classes are given."""
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


def finish_packing(destination: str | Path, overwrite: bool = False) -> ShardIndex:
    """Join the reports of all shards into an index, and put the shards in their place.

    Raises:
        ValueError: nothing was packed there, shards are missing, or no image was readable.
    """
    destination = Path(destination)
    folder = destination / "packing"
    if not (folder / "job.json").exists():
        raise ValueError(
            f"{destination}: no packing to finish there (sslvit shards pack SRC {destination} --part 1/8)."
        )
    check_destination(destination, overwrite)
    with lock_folder(folder, "finish its packing", ".finish.lock"):
        return _finish(destination, folder)


def _finish(destination: Path, folder: Path) -> ShardIndex:
    job = load_job(folder)
    shards = len(job["starts"]) - 1
    found = {number: load_report(folder, number) for number in range(shards)}
    reports = [report for report in found.values() if report is not None]
    if missing := [shard_name(number) for number, report in found.items() if report is None]:
        raise ValueError(
            f"{destination}: {len(missing)} of {shards} shards are not packed yet (first: {missing[0]}). Run the "
            "missing parts first."
        )
    skipped = {name: reason for report in reports for name, reason in report.skipped.items()}
    if not any(report.shard.samples for report in reports):
        shutil.rmtree(folder)
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{printable(destination)}: none of {job['images']} images is readable (first: {printable(name)}: "
            f"{printable(reason)})."
        )
    settings = PackSettings(**{name: job[name] for name in asdict(PackSettings())})
    index = join_reports(reports, destination, job["classes"], settings.describe(), settings.orientation)
    index.skipped = job["passed_over"] | index.skipped
    for old in [*destination.glob("shard-*.tar"), *destination.glob("index.*")]:
        if old.name not in {shard.name for shard in index.shards} or (folder / old.name).exists():
            old.unlink()  # with --overwrite, and only now that the new ones are whole
    for shard in index.shards:
        if (folder / shard.name).exists():  # not yet moved by an earlier attempt
            os.replace(folder / shard.name, destination / shard.name)
    index.save()
    shutil.rmtree(folder)
    if skipped:
        name, reason = next(iter(skipped.items()))
        logger.info(
            f"skipped {len(skipped)} of {job['images']} images (first: {printable(name)}: {printable(reason)}); "
            "all are listed in index.json"
        )
    return index


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if shards lie there and may not be replaced."""
    is_finishing = (folder / "packing" / "job.json").exists() and not (folder / "index.json").exists()
    if not overwrite and not is_finishing and (any(folder.glob("*.tar")) or (folder / "index.json").exists()):
        raise ValueError(f"{folder}: already holds shards. Choose another folder, or pass --overwrite.")


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def save_report(folder: Path, number: int, report: ShardReport) -> None:
    """Write the report on a finished shard, its records first."""
    save_records(folder / f"shard-{number:06d}.npy", report.records)
    write_atomically(folder / f"shard-{number:06d}.json", json.dumps(report.as_dict()))


def load_report(folder: Path, number: int) -> ShardReport | None:
    """The report of a finished shard.

    Raises:
        ValueError: it is damaged, or of another shard.
    """
    path = folder / f"shard-{number:06d}.json"
    if not path.exists():
        return None
    try:
        report = checked_report(parse_json(path.read_bytes()), shard_name(number))
        records = load_records(path.with_suffix(".npy"), report["shard"]["samples"], None)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}. Delete it and run the same packing again.") from error
    return ShardReport.from_dict(report, records)


def load_job(folder: Path) -> dict[str, Any]:
    """What an unfinished packing has decided.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "job.json"
    try:
        job = checked_job(parse_json(path.read_bytes()), PackSettings)
        PackSettings(**{name: job[name] for name in asdict(PackSettings())})
        return job
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}. Delete {printable(folder)} and pack again.") from error


def digest_samples(samples: Samples) -> str:
    """Of names, labels and lengths, and of pixels where there are no files: what tells one source from another."""
    digest = hashlib.sha256()
    for sample in samples:
        about = f"{sample.key}\0{sample.suffix}\0{sample.label}\0{sample.bytes}\n"
        digest.update(about.encode("utf-8", "surrogateescape"))  # names need not be UTF-8
    for source in SampleTable.of(samples).sources:
        digest.update(source.digest().encode())
    return digest.hexdigest()


def digest_times(samples: Samples) -> str:
    """Of the times of files, which tell changed ones of equal length apart."""
    return hashlib.sha256(SampleTable.of(samples).modified_ns.tobytes()).hexdigest()


def _begin(job: PackJob, identity: dict, overwrite: bool, skipped: dict[str, str]) -> None:
    """Make the folder and decide where shards begin, or go on with what an earlier attempt left there."""
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
        for old in job.folder.glob("[sj]*"):  # shards, reports and the job; not the locks that are held
            old.unlink()
    job.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder / "job.lock"):  # of several parts that begin at once, the first decides
        if not job_file.exists():
            job.cut()
            write_atomically(job_file, json.dumps(identity | {"starts": job.starts.tolist(), "passed_over": skipped}))
    job.starts = np.array(load_job(job.folder)["starts"])


def _shard_starts(sizes: np.ndarray, limit: float) -> np.ndarray:
    """Where shards begin so that none grows past the limit, unless one image alone does."""
    ends = np.cumsum(sizes)
    starts = [0]
    while starts[-1] < len(sizes):
        before = ends[starts[-1] - 1] if starts[-1] else 0.0
        starts.append(max(starts[-1] + 1, int(np.searchsorted(ends, before + limit, side="right"))))
    return np.array(starts)


def _read_part(part: str | None) -> tuple[int, int]:
    if part is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {part}: expected a part and their number, from 1/64 to 64/64.")
    return int(match[1]), int(match[2])


def _unique_keys(samples: Samples) -> list[str]:
    """Keys without dots, which WebDataset would split at, inside their folder, and short enough for a tar header."""
    used: set[str] = set()
    keys = []
    for number, sample in enumerate(samples):
        key = re.sub(r"[^\w/+-]", "_", sample.key).strip("/")
        if key in used or not key or len(key.encode()) + len(sample.suffix) + 1 > MAX_MEMBER_NAME:
            key = f"{number:09d}"
            while key in used:
                key += "_"
        used.add(key)
        keys.append(key)
    return keys
