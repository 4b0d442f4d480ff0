"""Measures that need no labels, for an encoder, its untrained network and raw pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sslvit.data.open import check_present
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.health import alignment, label_free
from sslvit.evaluate.probe import check_channels, untrained, untrained_row
from sslvit.evaluate.sources import LabeledSet, RawPixels, Source, frozen
from sslvit.models import Encoder, device_and_dtype
from sslvit.settings import ProbeSettings
from sslvit.settings.views import CropSettings

PAIR = CropSettings(scale=[0.2, 1.0])  # two crops of an image, whose features should agree


def measure_health(
    encoders: Mapping[str, Encoder], data: LabeledSet, settings: ProbeSettings
) -> dict[str, dict[str, float]]:
    """RankMe, deviation, spectrum, uniformity and alignment of raw pixels, untrained networks and encoders.

    Args:
        encoders: Encoders by row name; those of one architecture share one untrained network.
        data: The images.
        settings: How features are read, and the seed of the crops and of the untrained weights.
    """
    check_present(data.index, 0.0)
    check_channels(encoders)
    first = next(iter(encoders.values()))
    sources: dict[str, Source] = {"raw pixels": RawPixels(first.settings, device_and_dtype(first)[0])}
    for name, encoder in encoders.items():
        if row := untrained_row(name, encoders):
            sources[row] = frozen(untrained(encoder, settings.seed), settings.precision)
        sources[name] = frozen(encoder, settings.precision)
    extractor = FeatureExtractor(settings.batch, settings.workers)
    return {
        row: measures_of(source, data, extractor, settings.layer, settings.pooling, settings.seed)
        for row, source in sources.items()
    }


def measures_of(
    source: Source,
    data: LabeledSet,
    extractor: FeatureExtractor,
    layer: int | None = None,
    pooling: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """All measures of one source, on its device; empty on ranks other than the first."""
    readouts = source.readouts(layer, 1, pooling)
    features = extractor.features(source, data, readouts).at(readouts).values
    pair = [extractor.run(source, data, readouts, replace(PAIR), epoch, seed).at(readouts).values for epoch in (0, 1)]
    if not len(features):
        return {}
    features, one, other = (values.to(source.device) for values in (features, *pair))
    return label_free(features) | {"alignment": alignment(one, other)}
