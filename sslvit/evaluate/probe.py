"""One table: encoders beside raw pixels and beside themselves untrained, under the same probes."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sslvit.data.index import ShardIndex
from sslvit.data.labels import brief_names, sorted_names
from sslvit.data.open import check_present, open_shards
from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.features import Pass
from sslvit.evaluate.knn import knn_accuracies
from sslvit.evaluate.linear import draw_labels, fit_probe
from sslvit.evaluate.protocols import Bench, check_places, linear_probe, places_of, words
from sslvit.evaluate.scores import Draws, format_table, independent, interval, mean, sampling_interval
from sslvit.evaluate.sources import Features, FrozenEncoder, LabeledSet, RawPixels, Source
from sslvit.files import brief
from sslvit.models import ViTEncoder
from sslvit.ranks import is_first_rank
from sslvit.settings import ProbeSettings

logger = logging.getLogger(__name__)

LINEAR = "linear, all labels"
PAPER_RULE = "the paper's choice"
FEW_STEPS = 1000  # the papers' rates are meant for several times as many


@dataclass
class ProbeTable:
    """Scores in percent.

    Args:
        draws: what was probed -> column -> independent scores: each seed's mean, or a single seed's draws.
        about: what a reader needs to quote them.
    """

    draws: Draws
    about: dict[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """Means over draws and seeds."""
        return {row: {column: mean(values) for column, values in of.items()} for row, of in self.draws.items()}

    def text(self) -> str:
        """The table for a terminal, and what stands below it."""
        images = self.about["val_images"]
        below = [
            f"one percentage of {images:,} images is uncertain by up to ± {sampling_interval(images):.1f} by that alone"
        ]
        if any(interval(values) is not None for scores in self.draws.values() for values in scores.values()):
            over = (
                f"{self.about['seeds']} seeds" if self.about["seeds"] > 1 else f"{self.about['draws']} draws of labels"
            )
            below.append(f"± is half the 95 % interval of a mean over {over}")
        if paper := self.about.get("chosen_by_paper"):
            below.append(f"the paper chose on the images that it reports: {paper}")
        if any(k > self.about["train_images"] for k in self.about["neighbors"]):
            below.append(f"no kNN with more neighbors than the {self.about['train_images']:,} training images")
        if any(PAPER_RULE in scores for scores in self.draws.values()):
            below.append(f"{PAPER_RULE}: made on the reported images, for comparison with published numbers only")
        steps = [of["linear"]["steps"] for of in self.about["probed"].values() if "steps" in of.get("linear", {})]
        if steps and min(steps) < FEW_STEPS:
            below.append(
                f"the head took {min(steps)} steps, and the paper's rate is meant for thousands: with so few images, "
                "raise --protocol.base_lr (dinov2: --protocol.iterations), or lower --protocol.batch"
            )
        return format_table(self.draws) + "\n\n" + "\n".join(below)

    def as_dict(self) -> dict:
        intervals = {row: {column: interval(values) for column, values in of.items()} for row, of in self.draws.items()}
        return {"rows": self.rows, "intervals": intervals, "draws": self.draws, "about": self.about}


def probe(encoders: dict[str, ViTEncoder], settings: ProbeSettings) -> ProbeTable:
    """Score encoders on labeled shards.

    Several processes share the passes through the encoders; the first one fits the heads and has the table.

    Args:
        encoders: by the name of their row; one untrained encoder stands beside all that are built alike.
        settings: data and probes.

    Raises:
        ValueError: data without labels, classes that differ between train and val, too few labels, or encoders that
            take images of different channels.
        FileNotFoundError: no shards there.
    """
    train_index, val_index = open_labeled(settings)
    device = pick_device(settings.device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    first = next(iter(encoders.values())).settings
    if any(encoder.settings.channels != first.channels for encoder in encoders.values()):
        raise ValueError(f"{', '.join(encoders)}: these encoders take images of different channels. Probe each alone.")
    limit = settings.max_unreadable_fraction
    train, val = (LabeledSet(index, first.channels, None, limit) for index in (train_index, val_index))
    rows: dict[str, list[tuple[Source, int]]] = {}  # each source with the seeds that it is scored under
    seeds = range(settings.seed, settings.seed + settings.seeds)
    if settings.baselines:
        rows["raw pixels"] = [(source, seed) for source in [RawPixels(first)] for seed in seeds]
    for name, encoder in encoders.items():
        alike = [other for other in encoders if encoders[other].settings == encoder.settings]
        if settings.baselines and alike[0] == name:
            row = f"{', '.join(alike)} untrained" if len(encoders) > 1 else "untrained encoder"
            rows[row] = [(FrozenEncoder(untrained(encoder, seed)), seed) for seed in seeds]
        rows[name] = [(source, seed) for source in [FrozenEncoder(encoder)] for seed in seeds]
    for sources in rows.values():
        check_places(sources[0][0], settings)  # what cannot be probed is refused before the first pass
    cache = FeatureCache(settings.cache, settings.cache_gb) if settings.cache else None
    reading = Pass(settings.batch, settings.workers, cache)
    draws: Draws = {}
    probed: dict[str, dict[str, Any]] = {}
    for row, sources in rows.items():
        logger.info(f"probing {row}")
        by_seed: dict[str, list[list[float]]] = defaultdict(list)
        for source, seed in sources:
            bench = Bench(source, train, val, len(train_index.classes), reading, device)
            is_same = source is sources[0][0] and seed != sources[0][1]
            scores, probed[row] = score(bench, replace(settings, neighbors=[]) if is_same else settings, seed)
            for column, values in scores.items():
                by_seed[column].append(values)
        draws[row] = {column: independent(values) for column, values in by_seed.items()}
        probed[row] |= {"fingerprint": sources[-1][0].fingerprint(), "scores": dict(by_seed)}
    return ProbeTable(draws, describe(bench, settings, probed))


def describe(bench: Bench, settings: ProbeSettings, probed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a reader needs to quote the scores."""
    train, val = bench.train.index, bench.val.index
    protocol = settings.protocol
    return {
        "train": train.location, "train_images": bench.train.images, "train_unreadable": bench.train.unreadable,
        "val": val.location, "val_images": bench.val.images, "val_unreadable": bench.val.unreadable,
        "view": bench.source.settings.crop_in_words,
        "classes": bench.classes, "fingerprints": {"train": train.fingerprint(), "val": val.fingerprint()},
        "protocol": protocol.name if protocol else None, "source": protocol.source if protocol else None,
        "chosen_by_paper": protocol.chosen_by_paper if protocol else None, "probed": probed,
        "neighbors": settings.neighbors, "temperature": settings.temperature, "draws": settings.draws,
        "seeds": settings.seeds, "seed": settings.seed,
    }  # fmt: skip


def untrained(encoder: ViTEncoder, seed: int) -> ViTEncoder:
    """The same encoder with the weights that a training would start from."""
    torch.manual_seed(seed)
    return ViTEncoder(encoder.settings).to(next(encoder.parameters()).device).eval()


def score(bench: Bench, settings: ProbeSettings, seed: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The columns of the table for one source of features under one seed, and how it was probed.

    Both are empty on ranks other than the first.
    """
    scores: dict[str, list[float]] = {}
    places = places_of(bench.source, settings)
    about: dict[str, Any] = {"features": words(places)}
    if settings.protocol is not None:
        result = linear_probe(bench, settings, seed)
        if result is not None:
            name = settings.protocol.name
            column = LINEAR if name == "logreg" else f"linear ({name}), all labels"
            scores[column], about["linear"] = [result.score], result.about
            if result.held_out is not None:
                about["linear"]["right answers on training images held out"] = result.held_out
            if result.paper_rule is not None:
                scores[PAPER_RULE] = [result.paper_rule]
    few = settings.labels_per_class or settings.labels_percent
    if few or settings.neighbors:
        train, val = bench.of(bench.train, places), bench.of(bench.val, places)
        if is_first_rank():
            scores |= few_labels(train, val, bench, settings, seed) | neighbors(train, val, bench, settings)
    return scores, about


def few_labels(
    train: Features, val: Features, bench: Bench, settings: ProbeSettings, seed: int
) -> dict[str, list[float]]:
    """Logistic regression on random draws of a few labels, one score for each draw."""
    wanted = {}
    if settings.labels_per_class:
        wanted[f"linear, {settings.labels_per_class} per class"] = (settings.labels_per_class, None)
    if settings.labels_percent:
        wanted[f"linear, {settings.labels_percent:g} % of labels"] = (None, settings.labels_percent)
    scores = {}
    for column, (per_class, percent) in wanted.items():
        scores[column] = [
            fit_probe(train[draw_labels(train.labels, per_class, percent, number)], bench.classes, number).accuracy(val)
            for number in range(seed * settings.draws, (seed + 1) * settings.draws)
        ]
    return scores


def neighbors(train: Features, val: Features, bench: Bench, settings: ProbeSettings) -> dict[str, list[float]]:
    """The vote of the nearest training images, for each k that there are enough of."""
    ks = [k for k in settings.neighbors if k <= len(train)]
    if not ks:
        return {}
    found = knn_accuracies(train, val, bench.classes, ks, settings.temperature, bench.device)
    return {f"kNN, k = {k}": [value] for k, value in found.items()}


def open_labeled(settings: ProbeSettings) -> tuple[ShardIndex, ShardIndex]:
    """The two data sets of a probe, once they are known to fit together."""
    train, val = (open_shards(source) for source in (settings.train, settings.val))
    check_classes(train, val, settings)
    return train, val


def class_difference(train: ShardIndex, val: ShardIndex) -> str:
    """What differs between the classes of two data sets, in words."""
    missing = [
        f"{brief_names(sorted_names(set(one.classes) - set(other.classes)))} only in {one.location}"
        for one, other in ((train, val), (val, train))
        if set(one.classes) - set(other.classes)
    ]
    if missing:
        return "; ".join(missing)
    place = next(i for i, (one, other) in enumerate(zip(train.classes, val.classes, strict=True)) if one != other)
    return f"the same names in another order (number {place} is {train.classes[place]} and {val.classes[place]})"


def check_classes(train: ShardIndex, val: ShardIndex, settings: ProbeSettings) -> None:
    """Refuse data that cannot be probed before any feature is computed."""
    for index in (train, val):
        check_present(index, 0.0)
        index.labels_of(np.arange(0))  # refuses unlabeled data
    if train.classes != val.classes:
        raise ValueError(
            f"{train.location} and {val.location} have different classes: {class_difference(train, val)}. "
            "Pack both from one folder with --holdout."
        )
    counts = np.bincount(train.labels_of(slice(None)), minlength=len(train.classes))
    if settings.neighbors and min(settings.neighbors) > len(train):
        raise ValueError(f"--neighbors {min(settings.neighbors)}: there are only {len(train):,} training images.")
    few, smallest = settings.labels_per_class, train.classes[int(counts.argmin())]
    if few and counts.min() < few:
        raise ValueError(f"--labels-per-class {few}: class {brief(smallest)} has only {counts.min()} training images.")
    if settings.labels_percent and round(counts.min() * settings.labels_percent / 100) < 2:
        raise ValueError(
            f"--labels-percent {settings.labels_percent:g}: of class {brief(smallest)} ({counts.min()} training "
            "images) less than 2 would be drawn. Give a larger percentage, or --labels-per-class."
        )
