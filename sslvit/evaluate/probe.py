"""One table: encoders beside raw pixels and beside themselves untrained, under the same probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sslvit.data.index import ShardIndex
from sslvit.data.open import check_present, open_shards
from sslvit.data.reader import ShardReader
from sslvit.environment import pick_device
from sslvit.evaluate.features import Features, encoder_features, pixel_features
from sslvit.evaluate.knn import knn_accuracy
from sslvit.evaluate.linear import LinearHead, draw_labels, fit_probe
from sslvit.models import ViTEncoder
from sslvit.settings import ProbeSettings


@dataclass
class ProbeTable:
    """Scores in percent.

    Args:
        rows: what was probed -> column -> score.
        about: what a reader needs to quote them.
    """

    rows: dict[str, dict[str, float]]
    about: dict[str, Any]

    def text(self) -> str:
        """The table for a terminal."""
        return format_table(self.rows)

    def as_dict(self) -> dict:
        return asdict(self)


def probe(encoders: dict[str, ViTEncoder], settings: ProbeSettings) -> ProbeTable:
    """Score encoders on labelled shards.

    Args:
        encoders: by the name of their row; one untrained encoder stands beside all that are built alike.
        settings: data and probes.

    Raises:
        ValueError: data without labels, classes that differ between train and val, too few labels, or encoders that
            take images of different channels.
        FileNotFoundError: no shards there.
    """
    train_index, val_index = open_labelled(settings)
    device = pick_device(settings.device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    first = next(iter(encoders.values())).settings
    channels = first.channels
    if any(encoder.settings.channels != channels for encoder in encoders.values()):
        raise ValueError(f"{', '.join(encoders)}: these encoders take images of different channels. Probe each alone.")
    train, val = ShardReader(train_index, channels), ShardReader(val_index, channels)  # decoded once for all rows
    sources: dict[str, Callable[[ShardReader], Features]] = {}
    options = {"batch": settings.batch, "workers": settings.workers}
    if settings.baselines:
        sources["raw pixels"] = lambda reader: pixel_features(reader, first, **options)
    for name, encoder in encoders.items():
        alike = [other for other in encoders if encoders[other].settings == encoder.settings]
        if settings.baselines and alike[0] == name:
            row = f"{', '.join(alike)} untrained" if len(encoders) > 1 else "untrained encoder"
            sources[row] = _features_of(untrained(encoder, settings.seed), settings, options)
        sources[name] = _features_of(encoder, settings, options)
    classes = len(train_index.classes)
    rows = {}
    for row, features in sources.items():
        print(f"probing {row}", flush=True)
        rows[row] = score_features(features(train), features(val), classes, settings)
    about = {
        "train": train_index.location, "train_images": len(train_index), "val": val_index.location,
        "val_images": len(val_index), "classes": classes,
        "linear": "L-BFGS logistic regression on standardised features; strength chosen on held-out training images",
        "features": {name: _describe(encoder, settings) for name, encoder in encoders.items()},
        "neighbours": settings.neighbours, "temperature": settings.temperature, "seed": settings.seed,
    }  # fmt: skip
    return ProbeTable(rows, about)


def untrained(encoder: ViTEncoder, seed: int) -> ViTEncoder:
    """The same encoder with the weights that a training would start from."""
    torch.manual_seed(seed)
    return ViTEncoder(encoder.settings).to(next(encoder.parameters()).device).eval()


def _features_of(encoder: ViTEncoder, settings: ProbeSettings, options: dict) -> Callable[[ShardReader], Features]:
    return lambda reader: encoder_features(encoder, reader, settings.layer, settings.pooling, **options)


def _describe(encoder: ViTEncoder, settings: ProbeSettings) -> str:
    layer = settings.layer or encoder.settings.feature_layer or encoder.settings.depth
    return f"layer {layer}, {settings.pooling or encoder.settings.pooling} pooling"


def score_features(
    train: Features, val: Features, classes: int, settings: ProbeSettings, head: LinearHead | None = None
) -> dict[str, float]:
    """The columns of the table for one source of features; `head` is the probe on all labels, if it is there."""
    head = head or fit_probe(train, classes, settings.seed)
    scores = {"linear, all labels": head.accuracy(val)}
    few = settings.labels_per_class
    if few:
        draws = [
            fit_probe(train[draw_labels(train.labels, few, settings.seed + draw)], classes, settings.seed).accuracy(val)
            for draw in range(settings.draws)
        ]
        scores[f"linear, {few} per class"] = sum(draws) / len(draws)
    scores[f"kNN, k = {settings.neighbours}"] = knn_accuracy(
        train, val, classes, settings.neighbours, settings.temperature
    )
    return scores


def format_table(rows: dict[str, dict[str, float]], decimals: int = 1) -> str:
    """Rows and columns in plain text."""
    columns = list(next(iter(rows.values())))
    first = max(len(name) for name in rows)
    widths = [max(len(column), 6) for column in columns]
    lines = ["  ".join([" " * first, *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))])]
    for name, scores in rows.items():
        cells = (f"{scores[c]:>{w}.{decimals}f}" for c, w in zip(columns, widths, strict=True))
        lines.append("  ".join([f"{name:<{first}}", *cells]))
    return "\n".join(lines)


def open_labelled(settings: ProbeSettings) -> tuple[ShardIndex, ShardIndex]:
    """The two data sets of a probe, once they are known to fit together."""
    train, val = (open_shards(source, f"{source.rstrip('/')}-shards") for source in (settings.train, settings.val))
    _check_classes(train, val, settings.labels_per_class)
    return train, val


def _check_classes(train: ShardIndex, val: ShardIndex, few: int | None) -> None:
    """Refuse data that cannot be probed before any feature is computed."""
    for index in (train, val):
        check_present(index, 0.0)
        index.labels_of(np.arange(0))  # refuses unlabelled data
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{train.location} and {val.location} have different classes ({', '.join(only[:5])} in one only). "
            "Pack both from one folder with --holdout."
        )
    counts = np.bincount(train.labels_of(slice(None)), minlength=len(train.classes))
    if few and counts.min() < few:
        smallest = train.classes[int(counts.argmin())]
        raise ValueError(f"--labels-per-class {few}: class {smallest} has only {counts.min()} training images.")
