"""One encoder, probed block by block: where in its depth the knowledge lies."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.features import Pass
from sslvit.evaluate.probe import LINEAR, ProbeTable, describe, open_labeled, score, untrained
from sslvit.evaluate.protocols import Bench
from sslvit.evaluate.scores import Draws, format_table
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet, RawPixels, Source
from sslvit.figures import curves
from sslvit.models import ViTEncoder
from sslvit.ranks import is_first_rank
from sslvit.settings import LogregSettings, ProbeSettings

logger = logging.getLogger(__name__)

HELD_OUT = "held-out training images"


@dataclass
class LayerTable(ProbeTable):
    """Scores in percent of each block.

    Args:
        draws: "layer 3", "untrained, layer 3", "raw pixels" -> column -> scores.
        about: what a reader needs to quote them.
        best: the block with the best linear probe on training images held out; the reported images choose nothing.
        last: the deepest block that was probed.
    """

    best: int
    last: int

    def text(self) -> str:
        """The table for a terminal, and the best layer in words."""
        scores = {number: self.rows[f"layer {number}"][LINEAR] for number in (self.best, self.last)}
        return (
            f"Right answers in percent on {self.about['val_images']:,} images of {self.about['val']}\n\n"
            f"{format_table(self.draws)}\n\n"
            f"best layer, by {HELD_OUT}: {self.best} (linear {scores[self.best]:.1f}; "
            f"the last probed, {self.last}: {scores[self.last]:.1f})"
        )

    def as_dict(self) -> dict:
        return super().as_dict() | {"best": self.best, "last": self.last}


def layer_numbers(text: str, depth: int) -> list[int]:
    """ "all" or "1,4,8" -> numbers of blocks, from 1.

    Raises:
        ValueError: neither of them, or blocks that the encoder does not have.
    """
    if text == "all":
        return list(range(1, depth + 1))
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= depth:
        raise ValueError(f"--layers {text}: expected all, or numbers from 1 to {depth} as in 1,{depth}.")
    return numbers


def probe_layers(encoder: ViTEncoder, settings: ProbeSettings, numbers: list[int]) -> LayerTable:
    """Score blocks of one encoder, from one pass over each data set.

    Args:
        encoder: what is probed.
        settings: data and probes.
        numbers: of the blocks, from 1.

    Raises:
        ValueError: a protocol that does not hold out training images to choose by.
    """
    if not isinstance(settings.protocol, LogregSettings):
        raise ValueError("--layers: the best layer is chosen by logistic regression. Leave out --protocol.")
    if settings.seeds != 1:
        raise ValueError(f"--seeds {settings.seeds}: --layers has one curve per seed. Give --seed one by one.")
    indices = open_labeled(settings)
    device = pick_device(settings.device)
    limit = settings.max_unreadable_fraction
    train, val = (LabeledSet(index, encoder.settings.channels, None, limit) for index in indices)
    cache = FeatureCache(settings.cache, settings.cache_gb) if settings.cache else None
    reading = Pass(settings.batch, settings.workers, cache)
    sources: dict[str, Source] = {"layer {}": FrozenEncoder(encoder.to(device))}
    if settings.baselines:
        sources["untrained, layer {}"] = FrozenEncoder(untrained(encoder, settings.seed))
        sources["raw pixels"] = RawPixels(encoder.settings)
    draws: Draws = {}
    for name, source in sources.items():
        bench = Bench(source, train, val, len(indices[0].classes), reading, device)
        asked = numbers if "{}" in name else numbers[-1:]
        places = [place for number in asked for place in source.places(number, settings.blocks, settings.pooling)]
        for data in (train, val):
            reading.features(source, data, list(dict.fromkeys(places)))  # all blocks in one pass
        for number in asked:
            row = name.format(number)
            logger.info(f"probing {row}")
            draws[row] = _scores(bench, replace(settings, layer=number))
    if not is_first_rank():
        return LayerTable(draws, {}, numbers[0], numbers[-1])
    best = max(numbers, key=lambda number: draws[f"layer {number}"][HELD_OUT][0])
    about = describe(bench, settings, {}) | {
        "pooling": settings.pooling or encoder.settings.pooling, "norm": encoder.settings.feature_norm
    }  # fmt: skip
    return LayerTable(draws, about, best, numbers[-1])


def draw_layers(table: LayerTable, numbers: list[int], path: str | Path) -> Path:
    """The linear probe against depth, the best layer marked."""
    lines = {"trained": (numbers, [table.rows[f"layer {number}"][LINEAR] for number in numbers])}
    if "raw pixels" in table.rows:
        lines["untrained"] = (numbers, [table.rows[f"untrained, layer {number}"][LINEAR] for number in numbers])
        lines["raw pixels"] = (numbers, [table.rows["raw pixels"][LINEAR]] * len(numbers))
    mark = (table.best, f"best on {HELD_OUT}")
    return curves(path, lines, "block", "linear probe, right answers in %", mark=mark)


def _scores(bench: Bench, settings: ProbeSettings) -> dict[str, list[float]]:
    scores, about = score(bench, settings, settings.seed)
    held_out = about["linear"]["right answers on training images held out"] if scores else 0.0
    return {HELD_OUT: [held_out], **scores}
