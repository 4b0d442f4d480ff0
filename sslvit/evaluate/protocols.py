"""Linear probes by name: which features, which head, which settings; and what to say beside the number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, repeat
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sslvit import rng
from sslvit.evaluate.features import Pass
from sslvit.evaluate.linear import STRENGTHS, fit_probe
from sslvit.evaluate.sources import Features, FeatureTable, LabeledSet, Place, Source
from sslvit.evaluate.stepped import HeadGrid, fit_batch_norm_head, in_batches
from sslvit.optim import cosine, warmup_cosine
from sslvit.ranks import broadcast_from_rank0, is_first_rank
from sslvit.settings import ProbeSettings
from sslvit.settings.protocols import (
    DINOProbeSettings,
    DINOv2ProbeSettings,
    IGPTProbeSettings,
    MAEProbeSettings,
    SGDProbeSettings,
)
from sslvit.settings.views import CropSettings

WIDE = 768  # from this width on DINO's probe reads one block and the mean over its patches (ViT-B)


@dataclass
class LinearResult:
    """Of one probe of one source.

    Args:
        score: right answers in percent on the reported images.
        about: all settings in force, the effective learning rate, and what was chosen.
        paper_rule: the score if the choice were made on the reported images, as the paper did; None where it did not.
        held_out: right answers in percent on training images held out, where some were.
    """

    score: float
    about: dict[str, Any]
    paper_rule: float | None = None
    held_out: float | None = None


@dataclass
class Bench:
    """A source and the two data sets that it is probed on.

    Args:
        source: of the features.
        train: that heads are fitted on.
        val: that is reported.
        classes: how many there are.
        reading: how features are computed.
        device: that fits the heads.
    """

    source: Source
    train: LabeledSet
    val: LabeledSet
    classes: int
    reading: Pass
    device: str

    def of(self, data: LabeledSet, places: list[Place], fraction: float | None = None) -> Features:
        """Center views of a data set, with the encoder's own crop for None; empty on ranks other than the first."""
        return self.reading.features(self.source, data, places, fraction).at(places)


def linear_probe(bench: Bench, settings: ProbeSettings, seed: int) -> LinearResult | None:
    """The linear probe that the settings name; None on ranks other than the first."""
    match settings.protocol:
        case MAEProbeSettings():
            return _mae(bench, settings, seed)
        case DINOProbeSettings():
            return _dino(bench, settings, seed)
        case DINOv2ProbeSettings():
            return _dinov2(bench, settings, seed)
    return _logistic(bench, settings, seed)


def places_of(source: Source, settings: ProbeSettings) -> list[Place]:
    """What logistic regression and neighbors see: the settings' choice, or else the protocol's or the encoder's."""
    layer, pooling = settings.layer, settings.pooling
    if isinstance(settings.protocol, IGPTProbeSettings):
        layer = layer or source.settings.feature_layer or max(1, source.settings.depth // 2)
        pooling = pooling or "mean"
    return source.places(layer, settings.blocks, pooling)


def check_places(source: Source, settings: ProbeSettings) -> None:
    """Refuse, before any pass, layers and poolings that a probe could not read.

    Raises:
        ValueError: the source does not have them, or an option that the protocol decides itself.
    """
    places_of(source, settings)
    match settings.protocol:
        case DINOProbeSettings() | DINOv2ProbeSettings() if settings.blocks != 1:
            raise ValueError(f"--blocks {settings.blocks}: {settings.protocol.name} has --protocol.blocks.")
        case DINOProbeSettings():
            _dino_places(source, settings)
        case DINOv2ProbeSettings():
            _dinov2_features(source, settings)
        case MAEProbeSettings():
            _mae_places(source, settings)


def _mae_places(source: Source, settings: ProbeSettings) -> list[Place]:
    pooling = settings.pooling or ("class" if source.settings.class_token else None)
    return source.places(settings.layer, settings.blocks, pooling)


def _dino_places(source: Source, settings: ProbeSettings) -> list[Place]:
    is_wide = source.settings.width >= WIDE
    last = settings.layer or source.settings.depth
    pooling = settings.pooling or _with_class(source, "class+mean" if is_wide else "class")
    return source.places(last, settings.protocol.blocks or min(1 if is_wide else 4, last), pooling)


def _dinov2_features(source: Source, settings: ProbeSettings) -> list[list[Place]]:
    last = settings.layer or source.settings.depth
    usual = [_with_class(source, pooling) for pooling in ("class", "class+mean")]
    features: list[list[Place]] = []
    for blocks in settings.protocol.blocks:
        for pooling in [settings.pooling] if settings.pooling else usual:
            places = source.places(last, min(blocks, last), pooling)
            if places not in features:
                features.append(places)
    return features


def _logistic(bench: Bench, settings: ProbeSettings, seed: int) -> LinearResult | None:
    places = places_of(bench.source, settings)
    train, val = bench.of(bench.train, places), bench.of(bench.val, places)
    if not is_first_rank():
        return None
    head = fit_probe(train, bench.classes, seed, bench.device)
    about = {
        "features": words(places), "strength": head.strength,
        "strengths compared": f"{STRENGTHS[0]:g} to {head.weakest:g}", "strength chosen on": "training images held out",
    }  # fmt: skip
    return LinearResult(head.accuracy(val), asdict(settings.protocol) | about, held_out=head.held_out)


def _mae(bench: Bench, settings: ProbeSettings, seed: int) -> LinearResult | None:
    protocol, places = settings.protocol, _mae_places(bench.source, settings)
    val = bench.of(bench.val, places, protocol.fraction)
    run = _Stepped.plan(bench, protocol, places, None, seed)
    if run is None:
        return None
    peak, warmup = protocol.base_lr * run.batch / 256, protocol.warmup_epochs * run.per_epoch
    head = fit_batch_norm_head(
        run.batches, val.values.shape[1], bench.classes,
        lambda step: warmup_cosine(step, peak, 0.0, warmup, run.steps), protocol.momentum, seed, bench.device,
    )  # fmt: skip
    with torch.no_grad():
        guesses = head(val.values.to(bench.device)).argmax(1).cpu()
    about = run.about() | {"effective rate": peak, "optimizer": "LARS", "weight decay": 0}
    return LinearResult(100 * float((guesses == val.labels).double().mean()), about)


def _dino(bench: Bench, settings: ProbeSettings, seed: int) -> LinearResult | None:
    protocol, places = settings.protocol, _dino_places(bench.source, settings)
    val = bench.of(bench.val, places, protocol.fraction)
    run = _Stepped.plan(bench, protocol, places, None, seed)
    if run is None:
        return None
    rate = protocol.base_lr * run.batch / 256
    grid = HeadGrid.start([places], run.widths(val, [places]), [rate], bench.classes, seed, bench.device)
    scores = []
    for epoch in range(math.ceil(run.steps / run.per_epoch)):  # the rate changes by epoch, as in the released code
        factor = cosine(epoch, 1.0, 0.0, run.steps / run.per_epoch)
        grid.fit(islice(run.batches, run.per_epoch), lambda _, factor=factor: factor, protocol.momentum)
        scores.append(float(grid.accuracies(val)[0, 0]))
    about = run.about() | {"effective rate": rate, "optimizer": "SGD", "weight decay": 0, "reported": "the last epoch"}
    return LinearResult(scores[-1], about, paper_rule=max(scores))


def _dinov2(bench: Bench, settings: ProbeSettings, seed: int) -> LinearResult | None:
    protocol, features = settings.protocol, _dinov2_features(bench.source, settings)
    order = sorted({place for places in features for place in places})
    val = bench.of(bench.val, order, protocol.fraction)
    still = bench.of(bench.train, order, protocol.fraction)
    is_held = None
    if is_first_rank():
        is_held = held_out_rows(still.labels, protocol.held_out, seed)
        kept = still.labels[~is_held].unique()
        if len(kept) < len(still.labels.unique()):
            raise ValueError(f"--protocol.held_out {protocol.held_out:g}: leaves no image of some class to fit on.")
    run = _Stepped.plan(bench, protocol, order, is_held, seed)
    if run is None:
        return None
    factor = run.batch / 256
    rates = [rate * factor for rate in protocol.lrs]
    grid = HeadGrid.start(features, run.widths(val, features), rates, bench.classes, seed, bench.device)
    grid.fit(run.batches, lambda step: cosine(step, 1.0, 0.0, run.steps), protocol.momentum)
    trial = grid.accuracies(still[is_held])
    best = divmod(int(trial.argmax()), len(rates))
    scores = grid.accuracies(val)
    about = run.about() | {
        "effective rates": rates, "optimizer": "SGD", "weight decay": 0, "heads": len(features) * len(rates),
        "chosen on": f"{int(is_held.sum()):,} training images held out",
        "chosen features": words(features[best[0]]), "chosen effective rate": rates[best[1]],
    }  # fmt: skip
    return LinearResult(float(scores[best]), about, paper_rule=float(scores.max()), held_out=float(trial[best]))


@dataclass
class _Stepped:
    """The batches of a head that is trained step by step."""

    protocol: SGDProbeSettings
    places: list[Place]
    batch: int
    per_epoch: int
    steps: int
    batches: Iterator[tuple[int, Features]]

    @classmethod
    def plan(
        cls, bench: Bench, protocol: SGDProbeSettings, places: list[Place], is_held: Tensor | None, seed: int
    ) -> _Stepped | None:
        """None on ranks other than the first, once they have done their share of all passes."""
        endless = cls._epochs(bench, protocol, places, seed)
        first = next(endless)  # tells how many images are readable
        images = broadcast_from_rank0(len(first.labels) if is_held is None else len(is_held) - int(is_held.sum()))
        batch = min(protocol.batch, images)
        per_epoch = images // batch
        steps = protocol.steps(per_epoch)
        epochs = chain([first], islice(endless, math.ceil(steps / per_epoch) - 1))
        if not is_first_rank():
            for _ in epochs:
                pass
            return None
        rows = None if is_held is None else torch.nonzero(~is_held)[:, 0]
        return cls(protocol, places, batch, per_epoch, steps, in_batches(epochs, places, rows, batch, steps, seed))

    @staticmethod
    def _epochs(bench: Bench, protocol: SGDProbeSettings, places: list[Place], seed: int) -> Iterator[FeatureTable]:
        """The training images' features, epoch by epoch without end: new crops in each, or the same center views."""
        if not protocol.augment:
            yield from repeat(bench.reading.features(bench.source, bench.train, places, protocol.fraction))
        view = CropSettings(scale=protocol.scale, flip=protocol.flip)
        for epoch in count():
            yield bench.reading.run(bench.source, bench.train, places, view, epoch, seed)

    def widths(self, features: Features, of: list[list[Place]]) -> dict[Place, int]:
        """Columns of each place: all are as wide as the encoder, except raw pixels."""
        places = {place for places in of for place in places}
        return dict.fromkeys(places, features.values.shape[1] // len(places))

    def about(self) -> dict[str, Any]:
        said = {"features": words(self.places), "steps": self.steps, "batch used": self.batch}
        return asdict(self.protocol) | said


def held_out_rows(labels: Int[Tensor, "n"], share: float, seed: int) -> Bool[Tensor, "n"]:
    """True for a share of each class, drawn by seed."""
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label)[:, 0]
        order = torch.from_numpy(rng.generator(seed, label, "held out").permutation(len(members)))
        is_held[members[order[: max(1, round(share * len(members)))]]] = True
    return is_held


def words(places: list[Place]) -> str:
    """Features as a reader would name them: "layers 9 to 12, class"."""
    by_pooling: dict[str, list[int]] = {}
    for layer, pooling in places:
        by_pooling.setdefault(pooling, []).append(layer)
    parts = []
    for pooling, layers in by_pooling.items():
        if pooling == "pixels":
            parts.append("pixels")
        else:
            where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
            parts.append(f"{where}, {pooling} pooling")
    return " + ".join(parts)


def _with_class(source: Source, pooling: str) -> str:
    """A paper's pooling, or the mean alone for an encoder without a class token."""
    return pooling if source.settings.class_token else "mean"
