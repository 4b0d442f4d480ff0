"""What features are worth without labels, beside the same network untrained and raw pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sslvit.data.open import check_present
from sslvit.evaluate.features import Pass
from sslvit.evaluate.health import alignment, label_free
from sslvit.evaluate.probe import untrained
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet, RawPixels, Source
from sslvit.models import ViTEncoder
from sslvit.settings.views import CropSettings

PAIR = CropSettings(scale=[0.2, 1.0])  # two crops of an image, whose features should agree


def measure_health(
    encoder: ViTEncoder, data: LabeledSet, layer: int | None = None, pooling: str | None = None, batch: int = 256,
    workers: int = 0, seed: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Rows (raw pixels, untrained encoder, encoder) of RankMe, deviation, spectrum, uniformity and alignment.

    Args:
        encoder: that is measured, on its device.
        data: the images, with labels or without.
        layer: block; None for the encoder's own choice.
        pooling: of its tokens; None for the encoder's own choice.
        batch: images per forward pass.
        workers: loader processes.
        seed: of the crops and the untrained weights.
    """
    check_present(data.index, 0.0)
    sources: dict[str, Source] = {
        "raw pixels": RawPixels(encoder.settings),
        "untrained encoder": FrozenEncoder(untrained(encoder, seed)),
        "encoder": FrozenEncoder(encoder),
    }
    return {
        row: measures_of(source, data, Pass(batch, workers), layer, pooling, seed) for row, source in sources.items()
    }


def measures_of(
    source: Source,
    data: LabeledSet,
    reading: Pass,
    layer: int | None = None,
    pooling: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """All measures of one source; empty on ranks other than the first."""
    places = source.places(layer, 1, pooling)
    features = reading.features(source, data, places).at(places).values
    pair = [reading.run(source, data, places, replace(PAIR), epoch, seed).at(places).values for epoch in (0, 1)]
    if not len(features):
        return {}
    return label_free(features) | {"alignment": alignment(*pair)}


def spread(images: int, most: int) -> np.ndarray:
    """Numbers of at most so many samples, evenly spread over a data set."""
    return np.unique(np.linspace(0, images - 1, min(images, most)).astype(int))
