"""Frozen encoder -> features of a data set, in one pass, at any number of readouts.

A pass is cut into batches of one size, keyed by position, so features do not depend on the number of processes that
share it. The host reads the features of a batch while the device computes those of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sslvit.data.batch import Batch
from sslvit.data.loader import center_view, evaluation_loader, normalized_view
from sslvit.data.python_data import PythonIndex
from sslvit.environment import pick_workers
from sslvit.evaluate.cache import FeatureCache, key_of
from sslvit.evaluate.sources import FeatureTable, LabeledSet, NoScore, Readout, Source, in_pieces
from sslvit.optim.guard import HostCopy
from sslvit.progress import track
from sslvit.ranks import all_gather, broadcast_from_rank0, is_first_rank, rank, world_size
from sslvit.settings.views import CenterSettings, ViewSettings

T = TypeVar("T")


@dataclass
class FeatureExtractor:
    """Computes features of data sets and keeps those of the last source; features of center views may also be cached.

    Args:
        batch: Images per forward pass.
        workers: Number of loader processes; None to choose by the source's device (`pick_workers`).
        cache: Cache on disk for features of center views; None for no cache. Those of data sets given from Python
            are not cached.
    """

    batch: int = 256
    workers: int | None = None
    cache: FeatureCache | None = None
    _source: Source | None = None
    _tables: dict[tuple[int, float], tuple[LabeledSet, FeatureTable]] = field(default_factory=dict)

    def features(
        self, source: Source, data: LabeledSet, readouts: Sequence[Readout], fraction: float | None = None
    ) -> FeatureTable:
        """Features of the center view of every image, computed once for each readout.

        If no fraction is given, the center crop is the encoder's own.
        """
        fraction = fraction or source.settings.crop_fraction
        if source is not self._source:
            self._source, self._tables = source, {}
        _, table = self._tables.get((id(data), fraction), (data, None))
        missing = [readout for readout in dict.fromkeys(readouts) if table is None or readout not in table.columns]
        if table is None or missing:
            made = self._through_cache(source, data, missing, center_view(source.settings, fraction))
            table = FeatureTable((table.columns if table else {}) | made.columns, made.labels, made.samples)
            self._tables[id(data), fraction] = data, table  # the set is kept, so that no other one gets its id
        return table

    def _through_cache(
        self, source: Source, data: LabeledSet, readouts: Sequence[Readout], view: CenterSettings
    ) -> FeatureTable:
        if self.cache is None or isinstance(data.index, PythonIndex):  # whose fingerprint is that of some images only
            return self.run(source, data, readouts, view)
        key = key_of(source, data, view, self.batch)
        cached = self.cache.find(key, readouts, data) if is_first_rank() else None
        if broadcast_from_rank0(cached is not None):
            data.account_for(data.samples, {})  # the cache holds whole data sets only
        columns = cached.columns if cached else {}
        missing = broadcast_from_rank0([readout for readout in readouts if readout not in columns])
        if not missing:
            return cached or empty_table(readouts)
        made = self.run(source, data, missing, view)
        if is_first_rank() and not data.unreadable:
            self.cache.put(key, made)
        return FeatureTable(columns | made.columns, made.labels, made.samples)

    @torch.no_grad()
    def run(
        self, source: Source, data: LabeledSet, readouts: Sequence[Readout], view: ViewSettings, epoch: int = 0,
        seed: int = 0,
    ) -> FeatureTable:  # fmt: skip
        """Compute features in one pass over the images, each seen once through a view.

        Every rank takes part; the first one gets the table, the others an empty one.

        Images that cannot be read are left out; `data` registers them.

        Raises:
            NoScore: too many images cannot be read, or not the same ones as in an earlier pass, or features are not
                finite.
        """
        settings = source.settings
        loader = evaluation_loader(
            data.reader, settings, self.batch, data.workers(pick_workers(self.workers, source.device.type)), rank(),
            world_size(), view, epoch, seed, data.subset, source.device.type == "cuda",
        )  # fmt: skip
        rows: dict[Readout, list[Tensor]] = {readout: [] for readout in readouts}
        labels: list[Tensor] = []
        samples: list[Tensor] = []
        bad: dict[str, str] = {}
        pieces = track(loader, "features", len(data.samples), each=self.batch * world_size())

        def features_of(piece: Batch) -> list[HostCopy]:
            images = normalized_view(piece, settings, source.device)
            largest = source.largest_activation(images.shape[2], images.shape[3])
            found = [source.features_at(some, readouts) for some in in_pieces(images, largest)]
            return [HostCopy(torch.cat(values).float()) for values in zip(*found, strict=True)]

        for piece, found in one_behind((piece, features_of(piece)) for piece in pieces):
            valid, numbers = all_gather(piece.valid), all_gather(labels_of(piece))
            gathered = [all_gather(values.read()) for values in found]
            samples.append(all_gather(piece.samples)[valid])
            bad |= piece.unreadable
            if is_first_rank():
                labels.append(numbers[valid])
                for readout, values in zip(readouts, gathered, strict=True):
                    rows[readout].append(values[valid])
        data.account_for(torch.cat(samples), bad)
        table = empty_table(readouts)
        if is_first_rank():
            columns = {readout: torch.cat(pieces) for readout, pieces in rows.items()}
            table = FeatureTable(columns, torch.cat(labels), torch.cat(samples))
        check_finite(table, data)
        return table


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items, each only after the next one has been made."""
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


def check_finite(table: FeatureTable, data: LabeledSet) -> None:
    """Raise NoScore on all ranks if features are not finite; only the first rank has any features."""
    broken = [readout for readout, values in table.columns.items() if not values.isfinite().all()]
    broken = broadcast_from_rank0(broken)
    if broken:
        layer, pooling = broken[0]
        raise NoScore(
            f"features of layer {layer} ({pooling}) are not finite on {data.index.location}: the weights are broken. "
            "Has the run diverged (health.json)?"
        )


def empty_table(readouts: Sequence[Readout]) -> FeatureTable:
    """A table without rows: what ranks other than the first have after a pass."""
    nothing = torch.empty(0, dtype=torch.long)
    return FeatureTable({readout: torch.empty(0, 1) for readout in readouts}, nothing, nothing)


def labels_of(batch: Batch) -> Tensor:
    """Class numbers; -1 for images without labels."""
    return torch.full((len(batch),), -1) if batch.labels is None else batch.labels
