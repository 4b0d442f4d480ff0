"""Reports on shards before a job: whether they are intact, their contents, and the resources they need."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sslvit.data.decode import decode_pixels
from sslvit.data.header import BadImage, read_header
from sslvit.data.index import ShardIndex, unlisted_warning
from sslvit.data.parallel import in_parallel
from sslvit.data.plan import EpochPlan
from sslvit.data.records import sha256_of
from sslvit.files import bytes_text, counted, printable
from sslvit.results import Result
from sslvit.run_plan import fitting_ranks

LARGE_PIXELS = 50_000_000  # slow to decode; half of the default data.max_pixels


@dataclass
class ShardCheck:
    """The findings on one shard, or on all of them.

    Args:
        damaged: Shards that are missing or have a wrong checksum, with the problem.
        corrupt: Images that cannot be decoded, with the reason.
        large: Images of more than LARGE_PIXELS, with their size.
        digests: Digest of an image's bytes -> sample numbers.
        sizes: Number of images by length of the shorter side.
        modes: Number of images of each mode.
    """

    damaged: dict[str, str] = field(default_factory=dict)
    corrupt: dict[str, str] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)
    digests: dict[bytes, list[int]] = field(default_factory=dict)
    sizes: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)

    def add(self, other: ShardCheck) -> None:
        """Add the findings on another shard."""
        for name in ("damaged", "corrupt", "large", "sizes", "modes"):
            getattr(self, name).update(getattr(other, name))
        for digest, samples in other.digests.items():
            self.digests.setdefault(digest, []).extend(samples)

    @property
    def duplicates(self) -> list[list[int]]:
        """Samples with the same bytes."""
        return [samples for samples in self.digests.values() if len(samples) > 1]

    @property
    def is_whole(self) -> bool:
        """Whether every shard is intact and every image can be decoded."""
        return not (self.damaged or self.corrupt)

    def text(self, index: ShardIndex) -> str:
        """Return the report as text."""
        lines = [f"{index.location}: {sum(self.modes.values()):,} images decoded"]
        for what, found in (("damaged shards", self.damaged), ("corrupt images", self.corrupt),
                            (f"images of more than {LARGE_PIXELS / 1e6:.0f} million pixels", self.large)):  # fmt: skip
            lines.append(f"  {what}: {len(found):,}")
            lines += [f"    {printable(name)}: {printable(reason)}" for name, reason in list(found.items())[:10]]
            lines += [f"    and {len(found) - 10:,} more"] if len(found) > 10 else []
        lines.append(f"  images that occur more than once (same bytes): {len(self.duplicates):,}")
        lines += [
            f"    {' = '.join(printable(index.key(sample)) for sample in same[:4])}" for same in self.duplicates[:10]
        ]
        modes = ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
        return "\n".join([*lines, f"  modes: {modes}", "  shorter side in pixels:", *_histogram(self.sizes)])


def check_shards(index: ShardIndex, workers: int | None = None) -> ShardCheck:
    """Verify every checksum and decode every image."""
    total = ShardCheck()
    for check in in_parallel(partial(_check_shard, index), len(index.shards), workers, "checking", len(index)):
        total.add(check)
    return total


def _check_shard(index: ShardIndex, number: int, tick: Callable[[int], None]) -> ShardCheck:
    found, shard = ShardCheck(), index.shards[number]
    try:
        path = index.shard_path(number)
        if sha256_of(path) != shard.sha256:
            found.damaged[shard.name] = "its bytes do not have the checksum in index.json"
    except (OSError, BadImage) as error:
        found.damaged[shard.name] = f"missing ({error})"
        tick(shard.samples)
        return found
    with open(path, "rb") as file:
        for sample in range(*index.first_of_shard[number : number + 2]):
            tick(1)
            try:
                _, offset, size = index.locate(sample)
                content = os.pread(file.fileno(), size, offset)
                if len(content) < size:
                    raise BadImage("truncated shard")
                header = read_header(content, upright=index.orientation == "upright")
                decode_pixels(content, header.channels, header=header)
            except BadImage as error:
                found.corrupt[index.key(sample)] = str(error)
                continue
            if header.height * header.width > LARGE_PIXELS:
                found.large[index.key(sample)] = f"{header.width} x {header.height}"
            found.modes[header.mode] += 1
            found.sizes[min(header.height, header.width)] += 1
            digest = hashlib.blake2b(content, digest_size=16).digest()
            found.digests.setdefault(digest, []).append(int(sample))
    return found


@dataclass(repr=False)
class Packing(Result):
    """Packed shards.

    Args:
        indices: The index of the shards, or those of train and val; empty while other parts are unfinished.
    """

    indices: list[ShardIndex]

    @property
    def path(self) -> str:
        """Folder of the shards; with a holdout, that of train."""
        return self.indices[0].location

    def text(self) -> str:
        """Describe the contents of the shards."""
        return "\n".join(describe_shards(index) for index in self.indices)

    def to_dict(self) -> dict[str, Any]:
        """Location -> contents of the shards there."""
        return {index.location: shards_content(index) for index in self.indices}


def shards_content(index: ShardIndex) -> dict[str, Any]:
    """Contents of shards, as a dict for programs."""
    return {
        "location": index.location, "images": len(index), "shards": len(index.shards), "channels": index.channels,
        "bytes": sum(shard.bytes for shard in index.shards), "image_size": index.image_size, "bits": index.bits,
        "classes": index.classes, "mean": index.mean, "std": index.std, "orientation": index.orientation,
        "skipped": index.skipped, "fingerprint": index.fingerprint(),
    }  # fmt: skip


def describe_shards(index: ShardIndex, global_batch_size: int | None = None) -> str:
    """Counts, statistics, and the batch sizes and cache that suit a job on these shards."""
    size = "x".join(map(str, index.image_size)) if index.image_size else "of several sizes"
    depth = f", {index.bits} bits" if index.bits != 8 else ""
    classes = f"{len(index.classes)} classes" if index.classes else "no labels"
    total = sum(shard.bytes for shard in index.shards)
    lines = [
        f"{printable(index.location)}: {len(index):,} images ({size}, {index.channels} channels{depth}, {classes}) in "
        f"{len(index.shards):,} {'shard' if len(index.shards) == 1 else 'shards'}, {bytes_text(total)}",
        f"  mean {index.mean}, std {index.std} (of pixels from 0 to 1)",
    ]
    if not index.classes:
        lines.append(
            "  NO LABELS: enough for pretraining; probes and fine-tuning need them (class folders, a list with a "
            "column label, an array of labels, or .cls members)"
        )
    constant = [str(number) for number, std in enumerate(index.std) if std == 0]
    if constant:
        lines.append(
            f"  warning: channel {', '.join(constant)} is the same everywhere (standard deviation 0), so it cannot be "
            "divided by it: set encoder.std for it to 1, or leave the channel out"
        )
    if index.orientation != "upright":
        lines.append("  images are read as their pixels are stored, whatever EXIF says of their orientation")
    if index.encoding:
        lines.append(f"  packed with: {printable(index.encoding)}")
    if index.skipped:
        reasons = Counter(index.skipped.values()).most_common()
        listed = ", ".join(f"{count} x {printable(reason, 80)}" for reason, count in reasons[:10])
        lines.append(f"  skipped: {listed}{', ...' if len(reasons) > 10 else ''} (by name in index.json)")
    missing = index.missing_shards()
    lines += [f"  {printable(index.shard_label(n))}: {problem}" for n, problem in list(missing.items())[:10]]
    if notice := unlisted_warning(index):
        lines.append(f"  {notice}")
    if index.classes:
        counts = np.bincount(index.labels_of(slice(None)), minlength=len(index.classes))
        ends = (int(counts.argmin()), int(counts.argmax()))
        smallest, largest = (f"{counts[i]:,} ({printable(index.classes[i], 40)})" for i in ends)
        equal = f"{counts[0]:,}" if counts.min() == counts.max() else f"{smallest} to {largest}"
        lines.append(f"  images per class: {equal}")
    if global_batch_size is not None and global_batch_size > len(index):
        lines.append(f"  a global batch of {global_batch_size:,} does not fit: choose at most {len(index):,}")
        return "\n".join(lines)
    batch = global_batch_size or min(4096, 1 << (len(index).bit_length() - 1))
    plan = EpochPlan(index.shard_samples, batch)
    if global_batch_size is not None:
        lines.append(
            f"  at a global batch of {batch:,}: {counted(plan.steps_per_epoch, 'step')} per epoch, each dropping "
            f"{plan.dropped_per_epoch:,} images; ranks that fit: {', '.join(map(str, fitting_ranks(batch, 1024)))}"
        )
    shard_bytes = max(shard.bytes for shard in index.shards)
    needs = {
        hosts: plan.shards_at_once(0, batch // hosts) * shard_bytes for hosts in (1, 2, 4, 8, 16) if batch % hosts == 0
    }
    caches = [f"{bytes_text(need)} on {hosts}" for hosts, need in needs.items()]
    if len(set(needs.values())) == 1:
        caches = [f"{bytes_text(needs[1])} on any number"]
    lines.append(f"  read over the network, each host needs a cache of about {', '.join(caches)} of hosts")
    return "\n".join(lines)


def _histogram(counts: Counter, bars: int = 10, width: int = 40) -> list[str]:
    """Draw a histogram as lines of text, with at most `bars` ranges of equal length."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    step = max(1, -(-(high - low + 1) // bars))
    ranges: Counter[int] = Counter()
    for value, count in counts.items():
        ranges[(value - low) // step] += count
    longest = max(ranges.values())
    lines = []
    for i, count in sorted(ranges.items()):
        start = low + i * step
        values = f"{start:>6} to {start + step - 1:<6}" if step > 1 else f"{start:>6}"
        lines.append(f"    {values} {count:>9,} {'#' * max(1, width * count // longest)}")
    return lines
