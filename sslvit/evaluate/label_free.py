"""Measures that need no labels, of an encoder beside the same network untrained and raw pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sslvit.data.open import check_present
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.health import alignment, label_free
from sslvit.evaluate.probe import untrained
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet, RawPixels, Source
from sslvit.models import ViTEncoder
from sslvit.settings.probe import Precision
from sslvit.settings.views import CropSettings

PAIR = CropSettings(scale=[0.2, 1.0])  # two crops of an image, whose features should agree


def measure_health(
    encoder: ViTEncoder, data: LabeledSet, layer: int | None = None, pooling: str | None = None, batch: int = 256,
    workers: int | None = None, seed: int = 0, precision: Precision = "float32",
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Rows (raw pixels, untrained encoder, encoder) of RankMe, deviation, spectrum, uniformity and alignment."""
    check_present(data.index, 0.0)
    sources: dict[str, Source] = {
        "raw pixels": RawPixels(encoder.settings, next(encoder.parameters()).device),
        "untrained encoder": FrozenEncoder(untrained(encoder, seed), precision),
        "encoder": FrozenEncoder(encoder, precision),
    }
    return {
        row: measures_of(source, data, FeatureExtractor(batch, workers), layer, pooling, seed)
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


def evenly_spaced(images: int, limit: int) -> np.ndarray:
    """Sample numbers of at most `limit` images, evenly spaced over a data set."""
    return np.unique(np.linspace(0, images - 1, min(images, limit)).astype(int))
