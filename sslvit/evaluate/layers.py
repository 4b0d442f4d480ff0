"""One encoder, probed block by block: where in its depth the knowledge lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslvit.data.reader import ShardReader
from sslvit.environment import pick_device
from sslvit.evaluate.features import layer_features, pixel_features
from sslvit.evaluate.linear import fit_probe
from sslvit.evaluate.probe import format_table, open_labelled, score_features, untrained
from sslvit.figures import curves
from sslvit.models import ViTEncoder
from sslvit.settings import ProbeSettings

HELD_OUT = "held-out training images"
LINEAR = "linear, all labels"


@dataclass
class LayerTable:
    """Scores in percent of each block.

    Args:
        rows: "layer 3", "untrained, layer 3", "raw pixels" -> column -> score.
        best: the block with the best linear probe on training images held out; the reported images choose nothing.
        last: the deepest block that was probed.
        about: what a reader needs to quote them.
    """

    rows: dict[str, dict[str, float]]
    best: int
    last: int
    about: dict[str, Any]

    def text(self) -> str:
        """The table for a terminal, and the best layer in words."""
        scores = {number: self.rows[f"layer {number}"][LINEAR] for number in (self.best, self.last)}
        return (
            f"Right answers in percent on {self.about['val_images']:,} images of {self.about['val']}\n\n"
            f"{format_table(self.rows)}\n\n"
            f"best layer, by {HELD_OUT}: {self.best} (linear {scores[self.best]:.1f}; "
            f"the last probed, {self.last}: {scores[self.last]:.1f})"
        )

    def as_dict(self) -> dict:
        return asdict(self)


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
    """
    train_index, val_index = open_labelled(settings)
    classes = len(train_index.classes)
    encoder = encoder.to(pick_device(settings.device))
    readers = [ShardReader(index, encoder.settings.channels) for index in (train_index, val_index)]
    options = {"batch": settings.batch, "workers": settings.workers}
    sources = {"layer {}": encoder}
    if settings.baselines:
        sources["untrained, layer {}"] = untrained(encoder, settings.seed)
    rows = {}
    for name, network in sources.items():
        train, val = (layer_features(network, reader, numbers, settings.pooling, **options) for reader in readers)
        for number, train_part, val_part in zip(numbers, train, val, strict=True):
            row = name.format(number)
            print(f"probing {row}", flush=True)
            rows[row] = _scores(train_part, val_part, classes, settings)
    if settings.baselines:
        train, val = (pixel_features(reader, encoder.settings, **options) for reader in readers)
        rows["raw pixels"] = _scores(train, val, classes, settings)
    best = max(numbers, key=lambda number: rows[f"layer {number}"][HELD_OUT])
    about = {
        "train": train_index.location, "train_images": len(train_index), "val": val_index.location,
        "val_images": len(val_index), "classes": classes, "pooling": settings.pooling or encoder.settings.pooling,
        "norm": encoder.settings.feature_norm, "seed": settings.seed,
    }  # fmt: skip
    return LayerTable(rows, best, numbers[-1], about)


def draw_layers(table: LayerTable, numbers: list[int], path: str | Path) -> Path:
    """The linear probe against depth, the best layer marked."""
    lines = {"trained": (numbers, [table.rows[f"layer {number}"][LINEAR] for number in numbers])}
    if "raw pixels" in table.rows:
        lines["untrained"] = (numbers, [table.rows[f"untrained, layer {number}"][LINEAR] for number in numbers])
        lines["raw pixels"] = (numbers, [table.rows["raw pixels"][LINEAR]] * len(numbers))
    mark = (table.best, f"best on {HELD_OUT}")
    return curves(path, lines, "block", "linear probe, right answers in %", mark=mark)


def _scores(train, val, classes: int, settings: ProbeSettings) -> dict[str, float]:
    head = fit_probe(train, classes, settings.seed)
    return {HELD_OUT: head.held_out, **score_features(train, val, classes, settings, head)}
