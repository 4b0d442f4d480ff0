"""One encoder, probed block by block."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.labeled import open_labeled
from sslvit.evaluate.probe import LINEAR, ProbeTable, describe, score, untrained, untrained_row
from sslvit.evaluate.protocols import HELD_OUT_ACCURACY, ProbeContext
from sslvit.evaluate.scores import Scores, format_table
from sslvit.evaluate.sources import LabeledSet, RawPixels, Source, frozen, in_precision
from sslvit.figures import plot_curves
from sslvit.models import Encoder
from sslvit.ranks import is_first_rank
from sslvit.settings import LogregSettings, ProbeSettings

logger = logging.getLogger(__name__)

HELD_OUT = "held-out training images"


@dataclass(repr=False)
class LayerTable(ProbeTable):
    """A table of scores in percent of each block.

    Args:
        scores: "layer 3", "untrained, layer 3", "raw pixels" -> column -> scores.
        about: what a reader needs to quote them.
        best: the block with the best linear probe on held-out training images; the reported images are not used for it.
        last: the deepest block that was probed.
        figure: the plot of scores against depth, once it is drawn.
    """

    best: int
    last: int
    figure: Path | None = None

    def text(self) -> str:
        """The table for a terminal, with the best layer and notes below it."""
        about = self.about
        scores = {number: self.rows[f"layer {number}"][LINEAR] for number in (self.best, self.last)}
        drawn = f"\n{self.figure}" if self.figure else ""
        return (
            f"Top-1 accuracy (%) on {about['val_images']:,} images{self.skipped('val')} of {about['val']}\n"
            f"(heads fitted on {about['train_images']:,}{self.skipped('train')} of {about['train']})\n"
            f"each image: {about['view']}{in_precision(about['precision'])}\n\n"
            f"{format_table(self.scores)}\n\n"
            f"best layer, by {HELD_OUT}: {self.best} (linear {scores[self.best]:.1f}; "
            f"the last probed, {self.last}: {scores[self.last]:.1f})\n{self.notes()}{drawn}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The table as it is written to JSON."""
        return super().to_dict() | {"best": self.best, "last": self.last}


def layer_numbers(text: str, depth: int) -> list[int]:
    """Numbers of blocks, counted from 1, from "all" or "1,4,8".

    Raises:
        ValueError: another text, or blocks that the encoder does not have.
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


def probe_layers(encoder: Encoder, settings: ProbeSettings, numbers: list[int]) -> LayerTable:
    """Score blocks of one encoder, numbered from 1, from one pass over each data set.

    Raises:
        ValueError: the protocol is not logistic regression, which holds out training images, or there are more seeds.
    """
    if not isinstance(settings.protocol, LogregSettings):
        raise ValueError("--layers: the best layer is chosen by logistic regression. Leave out --protocol.")
    if settings.seeds != 1:
        raise ValueError(f"--seeds {settings.seeds}: --layers has one curve per seed. Give --seed one by one.")
    indices = open_labeled(settings)
    if np.bincount(indices[0].labels_of(slice(None))).max() < 2:
        raise ValueError(
            "--layers: the best layer is selected on held-out training images, and no class has two. Give more images, "
            "or name one block (--layer)."
        )
    device = pick_device(settings.device)
    limit = settings.max_unreadable_fraction
    train, val = (LabeledSet(index, encoder.settings.channels, None, limit) for index in indices)
    cache = FeatureCache(settings.cache, settings.cache_gb) if settings.cache else None
    extractor = FeatureExtractor(settings.batch, settings.workers, cache)
    sources: dict[str, Source] = {"layer {}": frozen(encoder.to(device), settings.precision)}
    if settings.baselines:
        if untrained_row("encoder", {"encoder": encoder}):
            sources["untrained, layer {}"] = frozen(untrained(encoder, settings.seed), settings.precision)
        sources["raw pixels"] = RawPixels(encoder.settings, device)
    table: Scores = {}
    probed_as: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        context = ProbeContext(source, train, val, extractor, device)
        probed = numbers if "{}" in name else numbers[-1:]
        readouts = [
            readout for number in probed for readout in source.readouts(number, settings.blocks, settings.pooling)
        ]
        for data in (train, val):
            extractor.features(source, data, readouts)  # all blocks in one pass
        fingerprint = source.fingerprint()
        for number in probed:
            row = name.format(number)
            logger.info(f"probing {row}")
            scores, probed_as[row], _ = score(context, replace(settings, layer=number), settings.seed)
            probed_as[row]["fingerprint"] = fingerprint
            held_out = probed_as[row]["linear"][HELD_OUT_ACCURACY] if scores else 0.0
            table[row] = {HELD_OUT: [held_out], **scores}
    if not is_first_rank():
        return LayerTable(table, {}, numbers[0], numbers[-1])
    best = max(numbers, key=lambda number: table[f"layer {number}"][HELD_OUT][0])
    about = describe(context, settings, probed_as, {"encoder": encoder.settings}) | {
        "pooling": settings.pooling or encoder.settings.pooling, "norm": encoder.settings.feature_norm
    }  # fmt: skip
    return LayerTable(table, about, best, numbers[-1])


def plot_layers(table: LayerTable, numbers: list[int], path: str | Path) -> Path:
    """Plot the linear probe against depth, with the best layer marked."""
    lines = {"trained": (numbers, [table.rows[f"layer {number}"][LINEAR] for number in numbers])}
    if f"untrained, layer {numbers[0]}" in table.rows:
        lines["untrained"] = (numbers, [table.rows[f"untrained, layer {number}"][LINEAR] for number in numbers])
    if "raw pixels" in table.rows:
        lines["raw pixels"] = (numbers, [table.rows["raw pixels"][LINEAR]] * len(numbers))
    mark = (table.best, f"best on {HELD_OUT}")
    return plot_curves(path, lines, "block", "linear probe, top-1 accuracy (%)", mark=mark)
