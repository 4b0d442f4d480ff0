"""Scan a shard: its members by offset, and the channels, sizes and statistics of its images.

Packing and indexing make one report per shard, in parallel and in any order; the reports are joined into the index.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.data.folders import first_image
from sslvit.data.header import IMAGE_SUFFIXES
from sslvit.data.index import Shard, ShardIndex, load_index
from sslvit.data.labels import NO_LABEL, NotClasses, brief_names, number_labels
from sslvit.data.measure import Measured, measure_shard
from sslvit.data.parallel import in_parallel
from sslvit.data.records import RECORD, sha256_of
from sslvit.data.schema import check_shard_name
from sslvit.data.tars import COMPRESSED_TARS, TarMembers, choose_images, compressed_kind
from sslvit.files import counted, printable
from sslvit.settings.pack import IndexOptions

logger = logging.getLogger(__name__)

USUAL = ("cls", "txt")  # fields whose texts are taken as labels unless another is requested
LABEL_FIELDS = (*USUAL, "json", "label", "class", "cls.txt")  # usual fields for labels


@dataclass
class ShardReport:
    """Everything that the index needs to know about one shard.

    Args:
        shard: Name, counts and checksum.
        records: Records of the samples.
        measured: Properties of the images.
        skipped: Name of each skipped image -> reason.
        labels: Label of each sample as text, by field, for fields that any sample has; empty if the records already
            hold class numbers.
        fields: Number of members other than images, by field.
    """

    shard: Shard
    records: np.ndarray
    measured: Measured = field(default_factory=Measured)
    skipped: dict[str, str] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    fields: Counter = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """The report of a packed shard without its records, in types that JSON supports."""
        measured = dict(vars(self.measured))
        for name in ("sizes", "kinds"):  # JSON keys cannot be pairs of numbers
            measured[name] = [[*key, count] for key, count in measured[name].items()]
        return {"shard": asdict(self.shard), "measured": measured, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, content: dict[str, Any], records: np.ndarray) -> ShardReport:
        """Read a report from its JSON (schema.checked_report) and its records."""
        measured = dict(content["measured"])
        for name in ("sizes", "kinds"):
            measured[name] = Counter({(a, b): count for a, b, count in measured[name]})
        for name in ("modes", "parts"):
            measured[name] = Counter(measured[name])
        return cls(Shard(**content["shard"]), records, Measured(**measured), content["skipped"])


def join_reports(
    reports: list[ShardReport], location: str | Path, classes: list[str] | None, encoding: str = "",
    orientation: str = "upright",
) -> ShardIndex:  # fmt: skip
    """Join the reports into the index of all shards; empty shards are left out.

    Raises:
        ValueError: no image could be decoded.
    """
    measured = Measured()
    skipped: dict[str, str] = {}
    for report in reports:
        measured.add(report.measured)
        skipped |= report.skipped
    for part, count in measured.parts.items():
        logger.info(f"{printable(location)}: {counted(count, 'image')}: {part}")
    kept = [report for report in reports if report.shard.samples]
    records = np.concatenate([report.records for report in kept]) if kept else np.empty(0, RECORD)
    return ShardIndex(
        str(location), [report.shard for report in kept], records, classes, encoding=encoding, skipped=skipped,
        orientation=orientation, **measured.describe(str(location)),
    )  # fmt: skip


def index_shards(folder: str | Path, workers: int | None = None, options: IndexOptions | None = None) -> ShardIndex:
    """Index tar shards written by other tools (WebDataset format): KEY.jpg beside KEY.cls.

    Damaged shards are read up to the damage and reported.

    Raises:
        ValueError: there are no shards, or no images in them.
    """
    names = sorted(path.name for path in Path(folder).glob("*.tar"))
    if not names:
        raise ValueError(f"{printable(folder)}: no .tar files there{_compressed_hint(Path(folder))}.")
    for name in names:
        try:
            check_shard_name(name)
        except ValueError as error:
            raise ValueError(f"{printable(folder)}: {error}.") from error
    if image := first_image(Path(folder)):
        logger.warning(
            f"{printable(folder)}: its .tar files are read as shards, and the images beside them (the first: "
            f"{printable(image)}) are not read. If those are meant, move the .tar files elsewhere"
        )
    options, earlier = options or IndexOptions(), _earlier_index(Path(folder))
    if options.orientation is None and earlier is not None and earlier.orientation == "stored":
        options = replace(options, orientation="stored")
    index = index_names(str(folder), names, lambda name: Path(folder) / name, workers, options)
    if earlier is not None and {one.sha256 for one in earlier.shards} & {one.sha256 for one in index.shards}:
        known = earlier.classes or []  # names written by packing; the tars hold only numbers
        if index.classes and all(name.isdecimal() for name in index.classes) and len(known) >= len(index.classes):
            index.classes = known
        index.encoding = earlier.encoding
    if compressed := _compressed(Path(folder)):
        logger.info(
            f"{printable(folder)}: skipped {counted(len(compressed), 'compressed tar file')} (first: "
            f"{printable(compressed[0])}), which cannot be read by offset. Unpack them (gunzip) and index again"
        )
        index.skipped |= dict.fromkeys(compressed, "compressed tar file, which cannot be read by offset")
    index.save()
    return index


def _earlier_index(folder: Path) -> ShardIndex | None:
    """The earlier index, which holds details that the tars lack; None if it is missing or damaged."""
    try:
        return load_index(folder)
    except (FileNotFoundError, ValueError):
        return None


def _compressed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(COMPRESSED_TARS))


def _compressed_hint(folder: Path) -> str:
    packed = _compressed(folder)
    if not packed:
        return ""
    return (
        f", but {len(packed)} compressed ones ({printable(packed[0])}, ...), which cannot be read by offset. Unpack "
        f"them once (gunzip), or stream them: --data.shards '{printable(folder / '*.tar.gz')}' --data.stream_samples N"
    )


def index_names(
    location: str,
    names: list[str],
    path_of: Callable[[str], Path],
    workers: int | None = None,
    options: IndexOptions | None = None,
) -> ShardIndex:
    """Index the named shards, at any location.

    `path_of` returns the local path of a shard and fetches a remote one first.
    """
    options = options or IndexOptions()

    def scan(number: int, tick: Callable[[int], None]) -> ShardReport:
        report = scan_shard(path_of(names[number]), len(names), options)
        report.shard.name = names[number]
        tick(1)
        return report

    reports = list(in_parallel(scan, len(names), workers, "indexing", len(names), "shards"))
    if not any(report.shard.samples for report in reports):
        raise ValueError(f"{printable(location)}: the shards hold no images{_why_empty(reports)}.")
    classes = number_reports(printable(location), reports, options.labels)
    index = join_reports(reports, location, classes, orientation=options.orientation or "upright")
    if index.skipped:
        name, reason = next(iter(index.skipped.items()))
        logger.info(
            f"skipped {len(index.skipped)} entries (first: {printable(name)}: {printable(reason)}); "
            "all are listed in index.json"
        )
    return index


def _why_empty(reports: list[ShardReport]) -> str:
    """Reason why the shards hold no images: the first skipped entry, or the fields found."""
    for report in reports:
        for name, reason in report.skipped.items():
            return f" ({printable(name)}: {printable(reason)})"
    fields = sum((report.fields for report in reports), Counter())
    members = ", ".join(f"{count} x .{printable(name, 40)}" for name, count in fields.most_common(5))
    return f" ({f'their members: {members}; ' if members else ''}images end in {', '.join(sorted(IMAGE_SUFFIXES))})"


def number_reports(location: str, reports: list[ShardReport], requested: str | None) -> list[str] | None:
    """Write class numbers into the records; returns the class names, or None without labels. Logs unused labels."""
    samples = sum(report.shard.samples for report in reports)
    fields = sum((report.fields for report in reports), Counter())
    # one field for all shards, since .cls and .txt may name different things
    field_name = requested or next((name for name in USUAL if any(name in report.labels for report in reports)), "cls")
    texts = [text for report in reports for text in report.labels.get(field_name, [""] * report.shard.samples)]
    if missing := texts.count(""):
        if requested:
            raise ValueError(f"--labels {requested}: {missing} of {samples} images of {location} have none.")
        others = [name for name in fields if name in LABEL_FIELDS]
        if missing < samples and field_name != "txt":  # some without .txt mean that these are captions
            other = next((name for name in others if name != field_name), "")
            logger.info(
                f"{location}: {missing} of {samples} images have no label (.{field_name}), so the others' are not used "
                f"either{f'; to use the .{other} members: --labels {other}' if other else ''}"
            )
        elif others:
            logger.info(
                f"{location}: the .{others[0]} members are not used as labels; to use them: --labels {others[0]}"
            )
        return None
    try:
        if requested is None and field_name == "txt" and len(set(texts)) > samples / 2:
            raise NotClasses(f"{len(set(texts))} different texts (.txt) for {samples} images are no classes")
        classes, numbers = number_labels(texts)
    except NotClasses as error:
        if requested:
            raise ValueError(f"--labels {requested}: {error}. Leave it out to index them without labels.") from error
        logger.info(f"{location}: {error}; they are not used")
        return None
    names = [text for text in set(texts) if not text.isdecimal()]
    if names and len(names) < len(set(texts)):
        logger.info(
            f"{location}: some labels are numbers, others names ({brief_names(names, 3)}); all are taken as names"
        )
    number_of = dict(zip(texts, numbers, strict=True))
    for report in reports:
        report.records["label"] = [number_of[text] for text in report.labels.get(field_name, [])]
    return classes


def scan_shard(path: Path, shards: int = 1, options: IndexOptions | None = None) -> ShardReport:
    """Scan one tar file of `shards` for its members, checksum and image properties.

    Unsafe members (absolute paths, "..", pickles) and unreadable ones are skipped and reported. Every member that looks
    like an image is either a sample or listed as skipped.
    """
    options = options or IndexOptions()
    length = path.stat().st_size
    with open(path, "rb") as file:
        members = TarMembers(file, length)
        if kind := compressed_kind(file):
            members.skipped[path.name] = (
                f"{kind}, not a plain tar. Unpack it once, or name it .tar.gz and stream it (--data.stream_samples)"
            )
        else:
            members.read(path.name)
    images, skipped = choose_images(members, path.name, options.image)
    labels = {name: members.labels(images, name) for name in ([options.labels] if options.labels else USUAL)}
    records = np.array([(image.offset, image.size, NO_LABEL) for image in images], RECORD)
    measured, unreadable = measure_shard(path, records, shards, options.orientation != "stored")
    for row, reason in unreadable.items():
        skipped[f"{path.name}/{images[row].name}"] = reason
    kept = [row for row in range(len(records)) if row not in unreadable]
    records, labels = records[kept], {name: [texts[row] for row in kept] for name, texts in labels.items()}
    shard = Shard(path.name, len(records), length, sha256_of(path))
    labels = {name: texts for name, texts in labels.items() if any(texts)}
    return ShardReport(shard, records, measured, members.skipped | skipped, labels, members.fields)
