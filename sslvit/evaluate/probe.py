"""One table of encoders, their untrained networks and raw pixels, all scored by the same probes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar, cast

import torch

from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.differences import Difference, Right, differences, verdicts
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.knn import recognized_by_neighbors
from sslvit.evaluate.labeled import open_labeled
from sslvit.evaluate.linear import FIXED_L2, fit_probe, percent, sample_labels
from sslvit.evaluate.protocols import ProbeContext, check_readouts, choose_readouts, describe_readouts, linear_probe
from sslvit.evaluate.scores import Scores, format_table, independent, intervals, means, sampling_interval, score_cells
from sslvit.evaluate.sources import (
    Features,
    FrozenBackbone,
    LabeledSet,
    RawPixels,
    Source,
    describe_views,
    frozen,
    heading_of_views,
    rows_by_value,
)
from sslvit.models import Backbone, Encoder, device_and_dtype, make_encoder
from sslvit.ranks import is_first_rank
from sslvit.results import Result
from sslvit.settings import EncoderSettings, ProbeSettings
from sslvit.settings.encoder import OWN

logger = logging.getLogger(__name__)
AnyEncoder = TypeVar("AnyEncoder", bound=Encoder)

LINEAR = "linear, all labels"
PAPER_RULE = "the paper's choice"
SAME_DATA = "the scored images are those that heads were fitted on: these scores say nothing of others"
FEW_STEPS = 1000  # the papers' learning rates are meant for several times as many


@dataclass(repr=False)
class ProbeTable(Result):
    """A table of scores in percent.

    Args:
        scores: row -> column -> independent scores: each seed's mean, or the draws of labels of a single seed.
        about: what a reader needs to quote them.
        differences: Differences of the other encoders from the first one.
    """

    scores: Scores
    about: dict[str, Any]
    differences: list[Difference] = field(default_factory=list, kw_only=True)

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """Means over draws of labels and seeds."""
        return means(self.scores)

    def skipped(self, split: str) -> str:
        """How many images of a data set cannot be read, in parentheses; empty if all can."""
        unreadable = self.about[f"{split}_unreadable"]
        return f" ({unreadable:,} cannot be read)" if unreadable else ""

    def heading(self) -> str:
        """The text above the table: data, views and protocol."""
        about = self.about
        last = list(about["probed"].values())[-1]
        linear = last.get("linear", {})
        has_protocol_views = "fraction" in linear  # a paper's protocol states its own below
        lines = [
            f"Top-1 accuracy (%) on {about['val_images']:,} images{self.skipped('val')} of {about['val']}",
            f"(heads fitted on {about['train_images']:,}{self.skipped('train')} of {about['train']})",
            *heading_of_views(
                f"each image{', of few labels and kNN' if has_protocol_views else ''}",
                about["views"],
                about["precision"],
            ),
        ]
        networks = {row: of["network"] for row, of in about["probed"].items() if "network" in of}
        lines += [f"{row}: {network}" for row, network in networks.items() if not row.startswith(network)]
        if about["protocol"]:
            lines.append(f"linear probe: {about['protocol']} ({about['source']})")
            lines.append("  " + "; ".join(in_words(key, value) for key, value in linear.items()))
        features = rows_by_value({row: of["features"] for row, of in about["probed"].items() if row != "raw pixels"})
        read = [of if len(features) == 1 else f"{of} ({', '.join(rows)})" for of, rows in features.items()]
        lines.append(f"few labels and kNN: {', '.join(read)}; temperature {about['temperature']}; seed {about['seed']}")
        return "\n".join(lines)

    def text(self) -> str:
        """The table for a terminal, with everything a reader needs to quote it above and notes below."""
        return f"{self.heading()}\n\n{format_table(self.scores)}\n\n{self.notes()}"

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """The scores."""
        return score_cells(self.scores)

    def notes(self) -> str:
        """How far the scores can be trusted, and what was left out."""
        images = self.about["val_images"]
        below = verdicts(self.differences)
        below += [f"sampling error of an accuracy on {images:,} images: up to ± {sampling_interval(images):.1f} (95 %)"]
        if any(half is not None for of in intervals(self.scores).values() for half in of.values()):
            over = (
                f"{self.about['seeds']} seeds" if self.about["seeds"] > 1 else f"{self.about['draws']} draws of labels"
            )
            below.append(f"± is half the 95 % interval of a mean over {over}")
        if len(set(self.about["fingerprints"].values())) == 1:
            below.append(SAME_DATA)
        if fixed := {column: None for of in self.about["probed"].values() for column in of.get("fixed l2", [])}:
            below.append(f"{', '.join(fixed)}: L2 penalty {FIXED_L2}")
        if paper := self.about.get("chosen_by_paper"):
            below.append(f"the paper selected on the images that it reports: {paper}")
        if any(k > self.about["train_images"] for k in self.about["neighbors"]):
            below.append(f"kNN with more neighbors than the {self.about['train_images']:,} training images is left out")
        if any(PAPER_RULE in scores for scores in self.scores.values()):
            below.append(f"{PAPER_RULE}: selected on the reported images, for comparison with published numbers only")
        steps = [of["linear"]["steps"] for of in self.about["probed"].values() if "steps" in of.get("linear", {})]
        if steps and min(steps) < FEW_STEPS:
            below.append(
                f"the head took {min(steps)} steps, and the paper's learning rate is meant for thousands: with so few "
                "images, raise --protocol.base_lr (dinov2: --protocol.iterations), or lower --protocol.batch"
            )
        return "\n".join(below)

    def to_dict(self) -> dict[str, Any]:
        """The table as it is written to JSON."""
        return {"rows": self.rows, "intervals": intervals(self.scores), "draws": self.scores,
                "differences": [asdict(one) for one in self.differences], "about": self.about}  # fmt: skip


def probe(encoders: Mapping[str, Encoder], settings: ProbeSettings) -> ProbeTable:
    """Score encoders on labeled shards.

    Several processes share the passes through the encoders; the first one fits the heads and gets the table.

    Args:
        encoders: encoders by row name; encoders of one architecture share one untrained baseline.
        settings: data and probes.

    Raises:
        ValueError: data without labels, classes that differ between train and val, too few labels, or encoders that
            take images of different channels.
        FileNotFoundError: no shards there.
    """
    if not (settings.protocol or settings.labels_per_class or settings.labels_percent or settings.neighbors):
        raise ValueError("--neighbors []: there is nothing to score by. Give numbers of neighbors, such as 10 20.")
    train_index, val_index = open_labeled(settings)
    device = pick_device(settings.device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    first = next(iter(encoders.values())).settings
    check_channels(encoders)
    limit = settings.max_unreadable_fraction
    train, val = (LabeledSet(index, first.channels, None, limit) for index in (train_index, val_index))
    rows: dict[str, list[tuple[Source, int]]] = {}  # each source with the seed it is scored under
    seeds = range(settings.seed, settings.seed + settings.seeds)
    if settings.baselines:
        rows["raw pixels"] = [(source, seed) for source in [RawPixels(first, device)] for seed in seeds]
    for name, encoder in encoders.items():
        if settings.baselines and (row := untrained_row(name, encoders)):
            rows[row] = [(frozen(untrained(encoder, seed), settings.precision), seed) for seed in seeds]
        rows[name] = [(source, seed) for source in [frozen(encoder, settings.precision)] for seed in seeds]
    for sources in rows.values():
        check_readouts(sources[0][0], settings)  # refuses what cannot be probed before the first pass
    cache = FeatureCache(settings.cache, settings.cache_gb) if settings.cache else None
    extractor = FeatureExtractor(settings.batch, settings.workers, cache)
    table: Scores = {}
    probed: dict[str, dict[str, Any]] = {}
    right: dict[str, Right] = {row: defaultdict(list) for row in rows}
    for row, sources in rows.items():
        logger.info(f"probing {row}")
        by_seed: dict[str, list[list[float]]] = defaultdict(list)
        for source, seed in sources:
            context = ProbeContext(source, train, val, extractor, device)
            is_same = source is sources[0][0] and seed != sources[0][1]
            of_seed = replace(settings, neighbors=[]) if is_same else settings
            scores, probed[row], recognized = score(context, of_seed, seed)
            for column, of_draws in recognized.items():
                right[row][column] += of_draws
            for column, values in scores.items():
                by_seed[column].append(values)
        table[row] = {column: independent(values) for column, values in by_seed.items()}
        probed[row] |= {"fingerprint": sources[-1][0].fingerprint(), "scores": dict(by_seed)}
        if row in encoders and isinstance(source, FrozenBackbone):
            probed[row]["network"] = source.backbone.name
    found = differences({name: right[name] for name in encoders}) if is_first_rank() else []
    views = {row: sources[0][0].settings for row, sources in rows.items()}
    return ProbeTable(table, describe(context, settings, probed, views), differences=found)


def check_channels(encoders: Mapping[str, Encoder]) -> None:
    """Refuse encoders that take different numbers of channels."""
    if len({encoder.settings.channels for encoder in encoders.values()}) > 1:
        raise ValueError(f"{', '.join(encoders)}: these encoders take images of different channels. Score each alone.")


def untrained_row(name: str, encoders: Mapping[str, Encoder]) -> str | None:
    """The row name of an encoder's untrained network; None if an earlier encoder of the same architecture has the row.

    A module from Python that cannot be reset has no such row.
    """
    encoder = encoders[name]
    alike = [other for other in encoders if encoders[other].settings == encoder.settings]
    if encoder.settings.backbone == OWN:
        alike = [name]  # equal settings do not mean equal modules
    if isinstance(encoder, Backbone) and (reason := encoder.why_no_twin):
        logger.info(f"{name}: no untrained row, since {reason}")
        return None
    if alike[0] != name:
        return None
    return f"{', '.join(alike)} untrained" if len(encoders) > 1 else "untrained encoder"


def in_words(key: str, value: Any) -> str:
    """A setting or a result of a probe, with no more digits than a reader needs."""
    if "accuracy" in key or "score" in key:
        return f"{key} {value:.1f} %"
    return f"{key.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"


def describe(
    context: ProbeContext, settings: ProbeSettings, probed: dict[str, dict[str, Any]],
    views: Mapping[str, EncoderSettings],
) -> dict[str, Any]:  # fmt: skip
    """What a reader needs to quote the scores; `views` has the settings of the view of each row."""
    train, val = context.train.index, context.val.index
    protocol = settings.protocol
    return {
        "train": train.location, "train_images": context.train.images, "train_unreadable": context.train.unreadable,
        "val": val.location, "val_images": context.val.images, "val_unreadable": context.val.unreadable,
        **describe_views(views), "precision": settings.precision,
        "classes": context.classes, "fingerprints": {"train": train.fingerprint(), "val": val.fingerprint()},
        "protocol": protocol.name if protocol else None, "source": protocol.source if protocol else None,
        "chosen_by_paper": protocol.chosen_by_paper if protocol else None, "probed": probed,
        "neighbors": settings.neighbors, "temperature": settings.temperature, "whiten": settings.whiten,
        "draws": settings.draws, "seeds": settings.seeds, "seed": settings.seed,
    }  # fmt: skip


def untrained(encoder: AnyEncoder, seed: int) -> AnyEncoder:
    """The same encoder with freshly initialized weights."""
    torch.manual_seed(seed)
    made = encoder.untrained() if isinstance(encoder, Backbone) else make_encoder(encoder.settings)
    return cast(AnyEncoder, made.to(device_and_dtype(encoder)[0]).eval())


def score(
    context: ProbeContext, settings: ProbeSettings, seed: int
) -> tuple[dict[str, list[float]], dict[str, Any], Right]:
    """The columns of the table for one source under one seed, how it was probed, and which images were recognized.

    Scores and recognized images are empty on ranks other than the first.
    """
    scores: dict[str, list[float]] = {}
    right: Right = {}
    readouts = choose_readouts(context.source, settings)
    about: dict[str, Any] = {"features": describe_readouts(readouts)}
    if settings.protocol is not None:
        result = linear_probe(context, settings, seed)
        if result is not None:
            name = settings.protocol.name
            column = LINEAR if name == "logreg" else f"linear ({name}), all labels"
            scores[column], about["linear"] = [result.score], result.about
            if result.is_right is not None:
                right[column] = [result.is_right]
            if result.paper_rule is not None:
                scores[PAPER_RULE] = [result.paper_rule]
    few = settings.labels_per_class or settings.labels_percent
    if few or settings.neighbors:
        train, val = context.features(context.train, readouts), context.features(context.val, readouts)
        if is_first_rank():
            by_labels, about["fixed l2"] = few_labels(train, val, context, settings, seed)
            found = by_labels | neighbors(train, val, context, settings)
            scores |= {column: [percent(is_right) for is_right in of_draws] for column, of_draws in found.items()}
            right |= found
    return scores, about, right


def few_labels(
    train: Features, val: Features, context: ProbeContext, settings: ProbeSettings, seed: int
) -> tuple[Right, list[str]]:
    """Logistic regression on random draws of a few labels: for each draw, which images it recognizes.

    The second result names the columns whose penalty is fixed, since no label could be held out to select it.
    """
    wanted: dict[str, tuple[int | None, float | None]] = {}
    if settings.labels_per_class:
        wanted[f"linear, {settings.labels_per_class} per class"] = (settings.labels_per_class, None)
    if settings.labels_percent:
        wanted[f"linear, {settings.labels_percent:g} % of labels"] = (None, settings.labels_percent)
    right: Right = {column: [] for column in wanted}
    fixed: list[str] = []
    for column, (per_class, of_labels) in wanted.items():
        for number in range(seed * settings.draws, (seed + 1) * settings.draws):
            drawn = train[sample_labels(train.labels, per_class, of_labels, number)]
            head = fit_probe(drawn, context.classes, number, context.device)
            right[column].append(head.is_right(val).cpu())
        fixed += [column] if head.held_out is None else []
    return right, fixed


def neighbors(train: Features, val: Features, context: ProbeContext, settings: ProbeSettings) -> Right:
    """kNN for each k that is no larger than the number of training images: which images it recognizes."""
    ks = [k for k in settings.neighbors if k <= len(train)]
    if not ks:
        return {}
    found = recognized_by_neighbors(
        train, val, context.classes, ks, settings.temperature, context.device, settings.whiten
    )
    what = "whitened kNN" if settings.whiten else "kNN"
    return {f"{what}, k = {k}": [is_right] for k, is_right in found.items()}
