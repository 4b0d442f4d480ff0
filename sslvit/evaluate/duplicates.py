"""Near-duplicates: images whose features are nearly the same, in groups, within a data set and across two."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslvit.data.index import ShardIndex
from sslvit.data.reader import ShardReader
from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.neighbors import center_pixels
from sslvit.evaluate.sources import LabeledSet, frozen, full_float32
from sslvit.figures import plot_images
from sslvit.files import printable, write_atomically
from sslvit.models import Encoder
from sslvit.progress import track
from sslvit.results import Result
from sslvit.settings.probe import KNNSettings

BLOCK = 4096  # images per block; two blocks are compared at once, in 64 MB
MAX_IMAGES = 2_000_000  # in both sets, since their features are kept in memory and every pair is compared
ROUNDING = 1e-6  # of a cosine similarity in float32
SHOWN = 8  # groups in a picture, and images of each group
LISTED = 10  # groups in the text


@dataclass(repr=False)
class NearDuplicates(Result):
    """Groups of images that are nearly the same.

    Args:
        index: The images.
        against: Images that must not occur among them, such as those of a validation set; None for none.
        threshold: Smallest cosine similarity of two near-duplicates.
        samples: Sample numbers of the images that could be read, first of `index`, then of `against`.
        sizes: Number of them that belong to `index`.
        groups: Rows of `samples` in each group, the largest group first; a chain of near-duplicates is one group.
        features: Features of unit length, 'n d'.
    """

    index: ShardIndex
    against: ShardIndex | None
    threshold: float
    samples: np.ndarray
    sizes: int
    groups: list[np.ndarray]
    features: Tensor

    @property
    def leaks(self) -> list[tuple[list[str], list[str]]]:
        """Names of near-duplicates across the two sets, group by group: those of `index`, and those of `against`."""
        found = [(self.inside(group), group[group >= self.sizes]) for group in self.groups]
        return [(self.names(inside), self.names(outside)) for inside, outside in found if len(outside) and len(inside)]

    @property
    def within(self) -> list[list[str]]:
        """Names of near-duplicates within `index`, group by group."""
        return [self.names(inside) for group in self.groups if len(inside := self.inside(group)) > 1]

    def inside(self, group: np.ndarray) -> np.ndarray:
        """The rows of a group that belong to `index`."""
        return group[group < self.sizes]

    def name(self, row: int) -> str:
        """Shard and member name of an image."""
        index = self.index if row < self.sizes else self.against
        assert index is not None
        return index.key(int(self.samples[row]))

    def names(self, rows: np.ndarray) -> list[str]:
        """Names of several images."""
        return [self.name(int(row)) for row in rows]

    def kept(self) -> list[str]:
        """Names of the images of `index` to keep: all without near-duplicates, and the largest file of each group.

        Nothing is kept of a group with an image of `against`, and unreadable images are not kept.
        """
        is_kept = np.ones(self.sizes, bool)
        for group in self.groups:
            inside = self.inside(group)
            is_kept[inside] = False
            if len(inside) == len(group):
                is_kept[max(inside, key=lambda row: (self.index.locate(int(self.samples[row]))[2], -row))] = True
        return self.names(np.flatnonzero(is_kept))

    def write_kept(self, path: str | Path) -> int:
        """Write the names of the images to keep, one per line, and return their number.

        Raises:
            WriteError: The disk is full or cannot be written to.
        """
        names = self.kept()
        write_atomically(path, "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))
        return len(names)

    def text(self) -> str:
        """How many groups there are, and the largest of them."""
        within, leaks = self.within, self.leaks
        images = sum(map(len, within))
        lines = [
            f"  near-duplicates (cosine similarity of features {self.threshold:g} or more): {len(within):,} groups of "
            f"{images:,} images, {images - len(within):,} more than one of each"
        ]
        lines += [f"    {_brief(names)}" for names in within[:LISTED]]
        lines += [f"    and {len(within) - LISTED:,} more"] if len(within) > LISTED else []
        if self.against is not None:
            lines.append(
                f"  leaks: {sum(len(inside) for inside, _ in leaks):,} images are near-duplicates of "
                f"{sum(len(outside) for _, outside in leaks):,} of {printable(self.against.location)}"
            )
            lines += [f"    {_brief(inside)} = {_brief(outside)} there" for inside, outside in leaks[:LISTED]]
            lines += [f"    and {len(leaks) - LISTED:,} more groups"] if len(leaks) > LISTED else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The groups and the leaks, by name."""
        return {
            "threshold": self.threshold, "groups": self.within,
            "leaks": [{"images": inside, "against": outside} for inside, outside in self.leaks],
        }  # fmt: skip

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """A row for each group."""
        return ("images", "near-duplicates"), ((len(names), _brief(names)) for names in self.within)

    def plot(self, encoder: Encoder, path: str | Path) -> Path | None:
        """Plot the largest groups, those with a leak first, as the encoder sees them; None where there are none."""
        ordered = sorted(self.groups, key=lambda group: group[-1] < self.sizes)[:SHOWN]
        if not ordered:
            return None
        columns = min(SHOWN, max(map(len, ordered)))
        # in a leak, the last column is an image of the other set
        chosen = [np.append(group[: columns - 1], group[-1]) if len(group) > columns else group for group in ordered]
        readers = {index is self.index: ShardReader(index, encoder.settings.channels, 0)
                   for index in (self.index, self.against) if index is not None}  # fmt: skip
        rows, captions = [], []
        for group in chosen:
            seen = [center_pixels(encoder, readers[bool(one < self.sizes)], self.samples[[one]]) for one in group]
            rows.append(np.concatenate(seen))
            alike = (self.features[group] @ self.features[group[0]]).tolist()
            captions.append([f"{value:.3f}" + ("" if one < self.sizes else " other set")
                             for one, value in zip(group, alike, strict=True)])  # fmt: skip
        title = f"near-duplicates: cosine similarity with the first image, {self.threshold:g} or more to one of the row"
        return plot_images(path, rows, [f"{len(group):,} images" for group in ordered], title, captions)


def check_comparable(index: ShardIndex, threshold: float, against: ShardIndex | None) -> list[ShardIndex]:
    """The sets whose images are compared.

    Raises:
        ValueError: A threshold outside of (0, 1], or more images than are compared.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold {threshold:g}: must be in (0, 1].")
    indices = [index] if against is None else [index, against]
    if (count := sum(map(len, indices))) > MAX_IMAGES:
        raise ValueError(
            f"{printable(index.location)}: {count:,} images are more than the {MAX_IMAGES:,} that are compared pair by "
            "pair. Check parts of them, or pack fewer."
        )
    return indices


def find_near_duplicates(
    encoder: Encoder, index: ShardIndex, threshold: float, against: ShardIndex | None = None,
    cache: str | Path | None = KNNSettings.cache,
) -> NearDuplicates:  # fmt: skip
    """Find images, within a data set or across two, whose features have a high cosine similarity.

    Args:
        encoder: Encoder in evaluation mode; its default features are compared.
        index: Images.
        threshold: Smallest cosine similarity of near-duplicates.
        against: Other images that must not be among them.
        cache: Folder that caches features; None for no cache.

    Raises:
        ValueError: A threshold outside of (0, 1], or more images than are compared.
    """
    indices = check_comparable(index, threshold, against)
    device = pick_device()
    source = frozen(encoder.to(device))
    readouts = source.readouts(None, 1, None)
    extractor = FeatureExtractor(cache=FeatureCache(cache) if cache else None)
    sets = [LabeledSet(one, encoder.settings.channels, None, 1.0) for one in indices]  # any number may be unreadable
    tables = [extractor.features(source, one, readouts) for one in sets]
    features = F.normalize(torch.cat([table.at(readouts).values for table in tables]), dim=1)
    samples = np.concatenate([table.samples.numpy() for table in tables])
    first = len(tables[0].samples)
    groups = groups_of(connect(features, threshold, first, device))
    return NearDuplicates(index, against, threshold, samples, first, groups, features)


@full_float32()
def connect(
    features: Float[Tensor, "n d"], threshold: float, first: int, device: str | torch.device = "cpu",
    block: int = BLOCK,
) -> Int[np.ndarray, "n"]:  # fmt: skip
    """For each row, the smallest row that a chain of similar rows connects it with.

    Two blocks of rows are compared at a time, and only the connections are kept.

    Args:
        features: Features of unit length.
        threshold: Smallest cosine similarity of two similar rows.
        first: Number of leading rows, each compared with all rows after it; pairs of later rows are left out.
        device: Device on which similarities are computed.
        block: Number of rows in a block.
    """
    parent = np.arange(len(features))
    for start in track(range(0, first, block), "comparing", first, each=block):
        rows = features[start : min(start + block, first)].to(device)
        for begin in range(start, len(features), block):
            similar = rows @ features[begin : begin + block].to(device).T >= threshold - ROUNDING
            if begin == start:
                similar = similar.triu(1)  # each pair once, and none with itself
            one, other = (pair.cpu().numpy() for pair in similar.nonzero(as_tuple=True))
            _join(parent, one + start, other + begin)
    return _roots(parent, np.arange(len(features)))


def _join(parent: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Connect pairs of rows: attach each root to the smallest root it is paired with, until no pair has two roots."""
    while True:
        one, other = _roots(parent, one), _roots(parent, other)
        is_apart = one != other
        if not is_apart.any():
            return
        one, other = one[is_apart], other[is_apart]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The root of each row; every parent is a smaller row, so the search ends."""
    asked = rows
    while not np.array_equal(above := parent[rows], rows):
        rows = above
    parent[asked] = rows  # the next search is short
    return rows


def groups_of(roots: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more rows with the same root, the largest group first."""
    order = np.argsort(roots, kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
    return sorted((piece for piece in pieces if len(piece) > 1), key=lambda piece: (-len(piece), piece[0]))


def _brief(names: list[str]) -> str:
    """The first names of a group, and how many more there are."""
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    return " = ".join(printable(os.fspath(name)) for name in names[:4]) + more
