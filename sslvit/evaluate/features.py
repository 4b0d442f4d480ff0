"""Frozen encoder -> features of a data set, in one pass, over any number of layers and poolings.

A pass is cut into batches of one size, keyed by position, so features do not depend on how many processes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sslvit.data.batch import Batch
from sslvit.data.loader import evaluation_loader, normalised_view
from sslvit.evaluate.cache import FeatureCache, key_of
from sslvit.evaluate.sources import FeatureTable, LabelledSet, Place, Source
from sslvit.progress import track
from sslvit.ranks import count_ranks, gather_over_ranks, is_first_rank, rank, said_by_first
from sslvit.settings.views import CentreSettings, ViewSettings


@dataclass
class Pass:
    """How features are computed.

    Args:
        batch: images per forward pass.
        workers: loader processes.
        cache: where passes over centre views are kept, or None.
    """

    batch: int = 256
    workers: int = 0
    cache: FeatureCache | None = None
    _source: Source | None = None
    _held: dict[tuple[int, float], FeatureTable] = field(default_factory=dict)

    def features(
        self, source: Source, data: LabelledSet, places: Sequence[Place], fraction: float = 1.0
    ) -> FeatureTable:
        """Features of the centre view of every image; those of the last source are held, others may be in the cache."""
        if source is not self._source:
            self._source, self._held = source, {}
        held = self._held.get((id(data), fraction))
        wanted = [place for place in dict.fromkeys(places) if held is None or place not in held.columns]
        if wanted:
            made = self._through_cache(source, data, wanted, CentreSettings(fraction=fraction))
            held = FeatureTable((held.columns if held else {}) | made.columns, made.labels)
            self._held[id(data), fraction] = held
        return held

    def _through_cache(
        self, source: Source, data: LabelledSet, places: Sequence[Place], view: CentreSettings
    ) -> FeatureTable:
        if self.cache is None:
            return self.run(source, data, places, view)
        key = key_of(source, data, view, self.batch)
        found = self.cache.find(key, places) if is_first_rank() else None
        missing = said_by_first([place for place in places if found is None or place not in found.columns])
        if not missing:
            return found or made_nowhere(places)
        made = self.run(source, data, missing, view)
        if is_first_rank():
            self.cache.put(key, made)
        return FeatureTable((found.columns if found else {}) | made.columns, made.labels)

    @torch.no_grad()
    def run(
        self, source: Source, data: LabelledSet, places: Sequence[Place], view: ViewSettings, epoch: int = 0,
        seed: int = 0,
    ) -> FeatureTable:  # fmt: skip
        """One pass over the images, each seen once through a view; every rank takes part, the first gets the table.

        Args:
            source: of the features.
            data: the images.
            places: that are kept.
            view: of each image.
            epoch: of the views' chance.
            seed: of the views' chance.
        """
        settings = source.settings
        loader = evaluation_loader(
            data.reader, settings, self.batch, self.workers, rank(), count_ranks(), view, epoch, seed, data.chosen
        )
        rows: dict[Place, list[Tensor]] = {place: [] for place in places}
        labels = []
        for piece in track(
            loader, "features", len(loader) * self.batch * count_ranks(), each=self.batch * count_ranks()
        ):
            found = source.features_at(normalised_view(piece, settings, source.device), places)
            valid, numbers = gather_over_ranks(piece.valid), gather_over_ranks(labels_of(piece))
            gathered = [gather_over_ranks(values.float().cpu()) for values in found]
            if is_first_rank():
                labels.append(numbers[valid])
                for place, values in zip(places, gathered, strict=True):
                    rows[place].append(values[valid])
        if not is_first_rank():
            return made_nowhere(places)
        table = FeatureTable({place: torch.cat(pieces) for place, pieces in rows.items()}, torch.cat(labels))
        for (layer, pooling), values in table.columns.items():
            if not values.isfinite().all():
                raise ValueError(
                    f"features of layer {layer} ({pooling}) are not finite on {data.index.location}: the weights are "
                    "broken. Has the run diverged (health.json)?"
                )
        return table


def made_nowhere(places: Sequence[Place]) -> FeatureTable:
    """What ranks other than the first have after a pass: nothing, in the same form."""
    return FeatureTable({place: torch.empty(0, 1) for place in places}, torch.empty(0, dtype=torch.long))


def labels_of(batch: Batch) -> Tensor:
    """Class numbers; -1 for images without labels, which measures that need none may use."""
    return torch.full((len(batch),), -1) if batch.labels is None else batch.labels
