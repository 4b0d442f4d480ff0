"""Linear probes by name: their features, heads and settings, and the information reported with each score."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, repeat
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sslvit.environment import limited_steps
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.linear import FIXED_L2, L2_GRID, fit_probe, percent, shuffled_classes
from sslvit.evaluate.sgd_probe import HeadGrid, fit_batch_norm_head, iterate_batches
from sslvit.evaluate.sources import (
    OUTPUT,
    Features,
    FeatureTable,
    FrozenBackbone,
    LabeledSet,
    Readout,
    Source,
    full_float32,
)
from sslvit.optim import cosine, warmup_cosine
from sslvit.progress import duration, track_counter
from sslvit.ranks import broadcast_from_rank0, is_first_rank
from sslvit.settings import ProbeSettings
from sslvit.settings.protocols import (
    DINOProbeSettings,
    DINOv2ProbeSettings,
    IGPTProbeSettings,
    MAEProbeSettings,
    ProtocolSettings,
    SGDProbeSettings,
)
from sslvit.settings.views import CropSettings

logger = logging.getLogger(__name__)

HELD_OUT_ACCURACY = "top-1 accuracy on held-out training images"
LONG_SECONDS = 120  # a protocol that takes longer is announced with an estimate
WIDE = 768  # from this width on (ViT-B), DINO's probe uses the last block's class token and patch mean


@dataclass
class LinearResult:
    """The result of a linear probe of one source.

    Args:
        score: top-1 accuracy in percent on the reported images.
        about: all settings in force, the effective learning rate, and what was selected; top-1 accuracy in percent on
            held-out training images, where some were held out.
        paper_rule: the score if the choice were made on the reported images, as the paper did; None if it did not.
        is_right: whether each reported image is recognized, 'n'; None for heads trained by SGD or LARS.
    """

    score: float
    about: dict[str, Any]
    paper_rule: float | None = None
    is_right: Tensor | None = None


@dataclass
class ProbeContext:
    """A source and the two data sets it is probed on."""

    source: Source
    train: LabeledSet
    val: LabeledSet
    extractor: FeatureExtractor
    device: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    def features(self, data: LabeledSet, readouts: list[Readout], fraction: float | None = None) -> Features:
        """Features of the center views of a data set at some readouts; empty on ranks other than the first."""
        return self.extractor.features(self.source, data, readouts, fraction).at(readouts)


def linear_probe(context: ProbeContext, settings: ProbeSettings, seed: int) -> LinearResult | None:
    """The linear probe that the settings name; None on ranks other than the first."""
    match settings.protocol:
        case MAEProbeSettings() as protocol:
            return _mae(context, settings, protocol, seed)
        case DINOProbeSettings() as protocol:
            return _dino(context, settings, protocol, seed)
        case DINOv2ProbeSettings() as protocol:
            return _dinov2(context, settings, protocol, seed)
        case None:
            raise ValueError("the settings name no protocol of a linear probe.")
        case protocol:
            return _logistic(context, settings, protocol, seed)


def choose_readouts(source: Source, settings: ProbeSettings) -> list[Readout]:
    """The readouts of logistic regression and kNN: the settings' choice, or else the protocol's or the encoder's."""
    layer, pooling = settings.layer, settings.pooling
    if isinstance(settings.protocol, IGPTProbeSettings):
        layer = layer or source.settings.feature_layer or max(1, source.depth // 2)
        pooling = pooling or "mean"
    return source.readouts(layer, settings.blocks, pooling)


def check_readouts(source: Source, settings: ProbeSettings) -> None:
    """Refuse, before any pass, layers and poolings that the source does not have."""
    choose_readouts(source, settings)
    match settings.protocol:
        case (DINOProbeSettings() | DINOv2ProbeSettings()) as protocol if settings.blocks != 1:
            raise ValueError(f"--blocks {settings.blocks}: {protocol.name} has --protocol.blocks.")
        case DINOProbeSettings() as protocol:
            _dino_readouts(source, settings, protocol)
        case DINOv2ProbeSettings() as protocol:
            _dinov2_features(source, settings, protocol)
        case MAEProbeSettings():
            _mae_readouts(source, settings)


def _mae_readouts(source: Source, settings: ProbeSettings) -> list[Readout]:
    pooling = settings.pooling or ("class" if source.settings.class_token else None)
    return source.readouts(settings.layer, settings.blocks, pooling)


def _dino_readouts(source: Source, settings: ProbeSettings, protocol: DINOProbeSettings) -> list[Readout]:
    if isinstance(source, FrozenBackbone):
        return source.readouts(settings.layer, protocol.blocks or 1, settings.pooling)
    is_wide = source.settings.width >= WIDE
    last = settings.layer or source.depth
    pooling = settings.pooling or _with_class(source, "class+mean" if is_wide else "class")
    return source.readouts(last, protocol.blocks or min(1 if is_wide else 4, last), pooling)


def _dinov2_features(source: Source, settings: ProbeSettings, protocol: DINOv2ProbeSettings) -> list[list[Readout]]:
    if isinstance(source, FrozenBackbone):
        return [source.readouts(settings.layer, 1, settings.pooling)]
    last = settings.layer or source.depth
    usual = [_with_class(source, pooling) for pooling in ("class", "class+mean")]
    features: list[list[Readout]] = []
    for blocks in protocol.blocks:
        for pooling in [settings.pooling] if settings.pooling else usual:
            readouts = source.readouts(last, min(blocks, last), pooling)
            if readouts not in features:
                features.append(readouts)
    return features


def _logistic(
    context: ProbeContext, settings: ProbeSettings, protocol: ProtocolSettings, seed: int
) -> LinearResult | None:
    readouts = choose_readouts(context.source, settings)
    train, val = context.features(context.train, readouts), context.features(context.val, readouts)
    if not is_first_rank():
        return None
    head = fit_probe(train, context.classes, seed, context.device)
    about: dict[str, Any] = {"features": describe_readouts(readouts), "l2": head.l2}
    if head.held_out is None:
        about["l2 chosen on"] = f"nothing: {FIXED_L2}"
    else:
        about |= {
            "l2 compared": f"{L2_GRID[0]:g} to {head.weakest_l2:g}", "l2 chosen on": "held-out training images",
            HELD_OUT_ACCURACY: head.held_out,
        }  # fmt: skip
    is_right = head.is_right(val).cpu()
    return LinearResult(percent(is_right), asdict(protocol) | about, is_right=is_right)


def _mae(context: ProbeContext, settings: ProbeSettings, protocol: MAEProbeSettings, seed: int) -> LinearResult | None:
    readouts = _mae_readouts(context.source, settings)
    val = context.features(context.val, readouts, protocol.fraction)
    run = _SGDRun.plan(context, protocol, readouts, None, seed)
    if run is None:
        return None
    peak, warmup = protocol.base_lr * run.batch / 256, protocol.warmup_epochs * run.per_epoch
    head = fit_batch_norm_head(
        run.batches, val.values.shape[1], context.classes,
        lambda step: warmup_cosine(step, peak, 0.0, warmup, run.steps), protocol.momentum, seed, context.device,
    )  # fmt: skip
    with torch.no_grad(), full_float32():
        guesses = head(val.values.to(context.device)).argmax(1).cpu()
    about = run.about() | {"effective lr": peak, "optimizer": "LARS", "weight decay": 0}
    return LinearResult(100 * float((guesses == val.labels).double().mean()), about)


def _dino(
    context: ProbeContext, settings: ProbeSettings, protocol: DINOProbeSettings, seed: int
) -> LinearResult | None:
    readouts = _dino_readouts(context.source, settings, protocol)
    val = context.features(context.val, readouts, protocol.fraction)
    run = _SGDRun.plan(context, protocol, readouts, None, seed)
    if run is None:
        return None
    lr = protocol.base_lr * run.batch / 256
    grid = HeadGrid([readouts], run.width(val), [lr], context.classes, seed, context.device)
    epochs, scores = run.steps / run.per_epoch, []
    for _ in range(math.ceil(epochs)):
        batches = islice(run.batches, run.per_epoch)
        # the rate changes by epoch, as in the released code
        grid.fit(batches, lambda step: cosine(step // run.per_epoch, 1.0, 0.0, epochs), protocol.momentum)
        scores.append(float(grid.accuracies(val)[0, 0]))
    about = run.about() | {"effective lr": lr, "optimizer": "SGD", "weight decay": 0, "reported": "the last epoch"}
    return LinearResult(scores[-1], about, paper_rule=max(scores))


def _dinov2(
    context: ProbeContext, settings: ProbeSettings, protocol: DINOv2ProbeSettings, seed: int
) -> LinearResult | None:
    features = _dinov2_features(context.source, settings, protocol)
    order = sorted({readout for readouts in features for readout in readouts})
    val = context.features(context.val, order, protocol.fraction)
    center = context.features(context.train, order, protocol.fraction)
    is_held_out = None
    if is_first_rank():
        is_held_out = sample_held_out(center.labels, protocol, seed)
        kept = center.labels[~is_held_out].unique()
        if len(kept) < len(center.labels.unique()):
            raise ValueError(f"--protocol.held_out {protocol.held_out:g}: leaves no image of some class to fit on.")
    run = _SGDRun.plan(context, protocol, order, is_held_out, seed)
    if run is None or is_held_out is None:
        return None
    factor = run.batch / 256
    lrs = [lr * factor for lr in protocol.lrs]
    grid = HeadGrid(features, run.width(val), lrs, context.classes, seed, context.device)
    grid.fit(run.batches, lambda step: cosine(step, 1.0, 0.0, run.steps), protocol.momentum)
    trial = grid.accuracies(center[is_held_out])
    best = divmod(int(trial.argmax()), len(lrs))
    scores = grid.accuracies(val)
    about = run.about() | {
        "effective lrs": lrs, "optimizer": "SGD", "weight decay": 0, "heads": len(features) * len(lrs),
        "chosen on": f"{int(is_held_out.sum()):,} held-out training images",
        "chosen features": describe_readouts(features[best[0]]), "chosen effective lr": lrs[best[1]],
        HELD_OUT_ACCURACY: float(trial[best]),
    }  # fmt: skip
    return LinearResult(float(scores[best]), about, paper_rule=float(scores.max()))


@dataclass
class _SGDRun:
    """The batches that a head is trained on."""

    protocol: SGDProbeSettings
    readouts: list[Readout]
    batch: int
    per_epoch: int
    steps: int
    batches: Iterator[tuple[int, Features]]

    @classmethod
    def plan(
        cls,
        context: ProbeContext,
        protocol: SGDProbeSettings,
        readouts: list[Readout],
        is_held_out: Tensor | None,
        seed: int,
    ) -> _SGDRun | None:
        """Prepare the batches; None on ranks other than the first, once they have taken part in all passes."""
        endless, start = cls._epochs(context, protocol, readouts, seed), time.monotonic()
        first = next(endless)  # tells how many images are readable
        seconds = time.monotonic() - start
        images = broadcast_from_rank0(
            len(first.labels) if is_held_out is None else len(is_held_out) - int(is_held_out.sum())
        )
        batch = min(protocol.batch, images)
        per_epoch = images // batch
        steps = limited_steps(protocol.steps(per_epoch), f"a head of the protocol {protocol.name}")
        passes = math.ceil(steps / per_epoch)
        if protocol.augment and seconds * passes > LONG_SECONDS and is_first_rank():
            logger.info(
                f"{protocol.name}: {passes:,} passes over {images:,} images, each with new crops, about "
                f"{duration(seconds * passes)} for each row of the table. Fewer --protocol.{protocol.length} make it "
                "shorter, and --protocol.augment false takes one pass"
            )
        epochs = chain([first], islice(endless, passes - 1))
        if not is_first_rank():
            for _ in epochs:
                pass
            return None
        rows = None if is_held_out is None else torch.nonzero(~is_held_out)[:, 0]
        batches = iterate_batches(epochs, readouts, rows, batch, steps, seed)
        return cls(
            protocol, readouts, batch, per_epoch, steps, track_steps(batches, protocol.name, steps, per_epoch, passes)
        )

    @staticmethod
    def _epochs(
        context: ProbeContext, protocol: SGDProbeSettings, readouts: list[Readout], seed: int
    ) -> Iterator[FeatureTable]:
        """The training images' features, epoch by epoch without end: new crops in each, or the same center views."""
        if not protocol.augment:
            yield from repeat(context.extractor.features(context.source, context.train, readouts, protocol.fraction))
        view = CropSettings(scale=protocol.scale, flip=protocol.flip)
        for epoch in count():
            yield context.extractor.run(context.source, context.train, readouts, view, epoch, seed)

    def width(self, features: Features) -> int:
        """Number of columns of each readout; all readouts of a source have the same width."""
        return features.values.shape[1] // len(self.readouts)

    def about(self) -> dict[str, Any]:
        """The settings in force."""
        features = describe_readouts(self.readouts)
        return asdict(self.protocol) | {"features": features, "steps": self.steps, "batch used": self.batch}


def track_steps(
    batches: Iterator[tuple[int, Features]], protocol: str, steps: int, per_epoch: int, passes: int
) -> Iterator[tuple[int, Features]]:
    """Yield the batches of a head's steps, and show progress: the step, and the pass over the images."""
    with track_counter(f"{protocol}: training the head", steps, "steps") as counter:
        counter.note = f"pass 1 of {passes:,}"
        for step, batch in batches:
            yield step, batch
            counter.tick()
            counter.note = f"pass {min((step + 1) // per_epoch + 1, passes):,} of {passes:,}"


def sample_held_out(labels: Int[Tensor, "n"], protocol: DINOv2ProbeSettings, seed: int) -> Bool[Tensor, "n"]:
    """True for the images, drawn at random from each class, that the protocol holds out."""
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for _, members in shuffled_classes(labels, seed, "held out"):
        is_held_out[members[: protocol.held_out_of(len(members))]] = True
    return is_held_out


def describe_readouts(readouts: list[Readout]) -> str:
    """Readouts in words: "layers 9 to 12, class pooling"."""
    by_pooling: dict[str, list[int]] = {}
    for layer, pooling in readouts:
        by_pooling.setdefault(pooling, []).append(layer)
    phrases = []
    for pooling, layers in by_pooling.items():
        if pooling == "pixels":
            phrases.append("pixels")
        elif pooling == OUTPUT:
            phrases.append("the network's output")
        else:
            where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
            phrases.append(f"{where}, {pooling} pooling")
    return " + ".join(phrases)


def _with_class(source: Source, pooling: str) -> str:
    """A paper's pooling, or the mean alone for an encoder without a class token."""
    return pooling if source.settings.class_token else "mean"
