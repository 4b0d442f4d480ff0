"""An unfinished packing on disk: its job, the reports of finished shards, and their joining into an index."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sslvit.data.index import ShardIndex, is_unfinished, load_index
from sslvit.data.records import load_records, save_records
from sslvit.data.scan import ShardReport, join_reports
from sslvit.data.schema import checked_job, checked_report, parse_json
from sslvit.data.sources import Samples, SampleTable
from sslvit.data.store import PackSettings
from sslvit.files import printable, write_atomically
from sslvit.locks import lock_folder

logger = logging.getLogger(__name__)


def finish_packing(destination: str | Path, overwrite: bool = False) -> ShardIndex:
    """Join the reports of all shards into an index, and move the shards to their destination.

    Raises:
        ValueError: nothing was packed there, shards are missing, or no image was readable.
    """
    destination = Path(destination)
    folder = destination / "packing"
    if not is_unfinished(destination):
        raise ValueError(
            f"{destination}: no packing to finish there (sslvit shards pack SRC {destination} --part 1/8)."
        )
    job = load_job(folder)
    with lock_folder(folder, "finish its packing", ".finish.lock"):
        if not overwrite and (joined := _joined_earlier(destination, job)) is not None:
            remove_packing(folder)  # what a killed process had yet to do
            return joined
        check_destination(destination, overwrite)
        return _finish(destination, folder, job)


def _finish(destination: Path, folder: Path, job: dict[str, Any]) -> ShardIndex:
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
        remove_packing(folder)
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{printable(destination)}: none of {job['images']} images is readable (first: {printable(name)}: "
            f"{printable(reason)})."
        )
    settings = PackSettings(**{name: job[name] for name in asdict(PackSettings())})
    index = join_reports(reports, destination, job["classes"], settings.describe(), settings.orientation)
    index.skipped = job["passed_over"] | index.skipped
    index.job = digest_job(job)
    for old in [*destination.glob("shard-*.tar"), destination / "index.npy", destination / "index.json"]:
        if old.name not in {shard.name for shard in index.shards} or (folder / old.name).exists():
            old.unlink(missing_ok=True)  # with --overwrite, and only once the new ones are complete
    for shard in index.shards:
        if (folder / shard.name).exists():  # unless an earlier attempt has moved it
            os.replace(folder / shard.name, destination / shard.name)
    index.save()
    remove_packing(folder)
    if skipped:
        name, reason = next(iter(skipped.items()))
        logger.info(
            f"skipped {len(skipped)} of {job['images']} images (first: {printable(name)}: {printable(reason)}); "
            "all are listed in index.json"
        )
    return index


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if the folder holds shards and `overwrite` is not set."""
    is_finishing = is_unfinished(folder) and not (folder / "index.json").exists()
    if not overwrite and not is_finishing and (any(folder.glob("*.tar")) or (folder / "index.json").exists()):
        raise ValueError(f"{folder}: already holds shards. Choose another folder, or pass --overwrite.")


def packed_earlier(
    folder: Path, samples: SampleTable, classes: list[str] | None, settings: PackSettings
) -> ShardIndex | None:
    """The index of complete shards of the same samples that packing wrote into the folder; None if there are none."""
    if not (folder / "index.json").exists():
        return None
    index = _joined_earlier(folder, describe_job(samples, classes, settings))
    return finish_packing(folder) if index is not None and is_unfinished(folder) else index


def _joined_earlier(folder: Path, job: dict[str, Any]) -> ShardIndex | None:
    """The index of complete shards of this job; None if there are none."""
    try:
        index = load_index(folder)
    except (FileNotFoundError, ValueError):
        return None
    return index if index.job == digest_job(job) and not index.missing_shards() else None


def remove_packing(folder: Path) -> None:
    """Remove the folder of an unfinished packing, unless it holds other files."""
    for pattern in ("shard-*", "job.*", ".*.lock"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def save_report(folder: Path, number: int, report: ShardReport) -> None:
    """Write the report on a finished shard, records first."""
    save_records(folder / f"shard-{number:06d}.npy", report.records)
    write_atomically(folder / f"shard-{number:06d}.json", json.dumps(report.as_dict()))


def load_report(folder: Path, number: int) -> ShardReport | None:
    """The report of a finished shard; None if it is not finished."""
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
    """Load the job of an unfinished packing."""
    path = folder / "job.json"
    try:
        job = checked_job(parse_json(path.read_bytes()), PackSettings)
        PackSettings(**{name: job[name] for name in asdict(PackSettings())})
        return job
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}. Delete {printable(folder)} and pack again.") from error


def describe_job(samples: SampleTable, classes: list[str] | None, settings: PackSettings) -> dict[str, Any]:
    """Properties of a packing that must be unchanged for a restart to resume it."""
    source, times = digest_samples(samples), digest_times(samples)
    return {"images": len(samples), "source": source, "times": times, "classes": classes, **asdict(settings)}


def digest_job(job: dict[str, Any]) -> str:
    """Digest of a job's description, without what a job.json says beside it."""
    names = ("images", "source", "times", "classes", *asdict(PackSettings()))
    return hashlib.sha256(json.dumps([job[name] for name in names]).encode()).hexdigest()


def digest_samples(samples: Samples) -> str:
    """Digest of names, labels and sizes, and of pixels if the source is not files; identifies a source."""
    digest = hashlib.sha256()
    for sample in samples:
        about = f"{sample.key}\0{sample.suffix}\0{sample.label}\0{sample.bytes}\n"
        digest.update(about.encode("utf-8", "surrogateescape"))  # names may not be valid UTF-8
    for source in SampleTable.of(samples).sources:
        digest.update(source.digest().encode())
    return digest.hexdigest()


def digest_times(samples: Samples) -> str:
    """Digest of the modification times of files, to detect changes that keep the size."""
    return hashlib.sha256(SampleTable.of(samples).modified_ns.tobytes()).hexdigest()
