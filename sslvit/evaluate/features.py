"""Frozen encoder -> features of a data set, in one pass, over any number of layers and poolings.

A pass is cut into batches of one size, keyed by position, so features do not depend on how many processes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sslvit.data.batch import Batch
from sslvit.data.loader import center_view, evaluation_loader, normalized_view
from sslvit.evaluate.cache import FeatureCache, key_of
from sslvit.evaluate.sources import FeatureTable, LabeledSet, NoScore, Place, Source
from sslvit.progress import track
from sslvit.ranks import all_gather, broadcast_from_rank0, is_first_rank, rank, world_size
from sslvit.settings.views import CenterSettings, ViewSettings


@dataclass
class Pass:
    """How features are computed.

    Args:
        batch: images per forward pass.
        workers: loader processes.
        cache: where passes over center views are kept, or None.
    """

    batch: int = 256
    workers: int = 0
    cache: FeatureCache | None = None
    _source: Source | None = None
    _held: dict[tuple[int, float], FeatureTable] = field(default_factory=dict)

    def features(
        self, source: Source, data: LabeledSet, places: Sequence[Place], fraction: float | None = None
    ) -> FeatureTable:
        """Features of the center view of every image; those of the last source are held, others may be in the cache.

        Args:
            source: of the features.
            data: the images.
            places: that are wanted.
            fraction: of the center crop; None for the encoder's own.
        """
        fraction = fraction or source.settings.crop_fraction
        if source is not self._source:
            self._source, self._held = source, {}
        held = self._held.get((id(data), fraction))
        wanted = [place for place in dict.fromkeys(places) if held is None or place not in held.columns]
        if wanted:
            made = self._through_cache(source, data, wanted, center_view(source.settings, fraction))
            held = FeatureTable((held.columns if held else {}) | made.columns, made.labels, made.samples)
            self._held[id(data), fraction] = held
        return held

    def _through_cache(
        self, source: Source, data: LabeledSet, places: Sequence[Place], view: CenterSettings
    ) -> FeatureTable:
        if self.cache is None:
            return self.run(source, data, places, view)
        key = key_of(source, data, view, self.batch)
        found = self.cache.find(key, places, data.samples) if is_first_rank() else None
        if broadcast_from_rank0(found is not None):
            data.account_for(data.samples, {})  # the cache holds whole data sets only
        missing = broadcast_from_rank0([place for place in places if found is None or place not in found.columns])
        if not missing:
            return found or empty_table(places)
        made = self.run(source, data, missing, view)
        if is_first_rank() and not data.unreadable:
            self.cache.put(key, made)
        return FeatureTable((found.columns if found else {}) | made.columns, made.labels, made.samples)

    @torch.no_grad()
    def run(
        self, source: Source, data: LabeledSet, places: Sequence[Place], view: ViewSettings, epoch: int = 0,
        seed: int = 0,
    ) -> FeatureTable:  # fmt: skip
        """One pass over the images, each seen once through a view; every rank takes part, the first gets the table.

        Images that cannot be read are left out, and `data` keeps the account.

        Args:
            source: of the features.
            data: the images.
            places: that are kept.
            view: of each image.
            epoch: of the views' chance.
            seed: of the views' chance.

        Raises:
            NoScore: too many images cannot be read, or other ones than in an earlier pass; features that are not
                finite.
        """
        settings = source.settings
        loader = evaluation_loader(
            data.reader, settings, self.batch, self.workers, rank(), world_size(), view, epoch, seed, data.chosen
        )
        rows: dict[Place, list[Tensor]] = {place: [] for place in places}
        labels, samples, bad = [], [], {}
        for piece in track(loader, "features", len(loader) * self.batch * world_size(), each=self.batch * world_size()):
            found = source.features_at(normalized_view(piece, settings, source.device), places)
            valid, numbers = all_gather(piece.valid), all_gather(labels_of(piece))
            gathered = [all_gather(values.float().cpu()) for values in found]
            samples.append(all_gather(piece.samples)[valid])
            bad |= piece.unreadable
            if is_first_rank():
                labels.append(numbers[valid])
                for place, values in zip(places, gathered, strict=True):
                    rows[place].append(values[valid])
        data.account_for(torch.cat(samples), bad)
        if not is_first_rank():
            check_finite(None, data)
            return empty_table(places)
        columns = {place: torch.cat(pieces) for place, pieces in rows.items()}
        table = FeatureTable(columns, torch.cat(labels), torch.cat(samples))
        check_finite(table, data)
        return table


def check_finite(table: FeatureTable | None, data: LabeledSet) -> None:
    """Refuse, on all ranks, a table that holds what is not finite; the first rank has it, the others give None.

    Raises:
        NoScore: some feature is not finite.
    """
    columns = {} if table is None else table.columns
    broken = [place for place, values in columns.items() if not values.isfinite().all()]
    broken = broadcast_from_rank0(broken)
    if broken:
        layer, pooling = broken[0]
        raise NoScore(
            f"features of layer {layer} ({pooling}) are not finite on {data.index.location}: the weights are broken. "
            "Has the run diverged (health.json)?"
        )


def empty_table(places: Sequence[Place]) -> FeatureTable:
    """What ranks other than the first have after a pass: nothing, in the same form."""
    nothing = torch.empty(0, dtype=torch.long)
    return FeatureTable({place: torch.empty(0, 1) for place in places}, nothing, nothing)


def labels_of(batch: Batch) -> Tensor:
    """Class numbers; -1 for images without labels, which measures that need none may use."""
    return torch.full((len(batch),), -1) if batch.labels is None else batch.labels
