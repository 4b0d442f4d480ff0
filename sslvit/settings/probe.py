"""How a frozen encoder is scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sslvit.files import brief, expand_path
from sslvit.settings.choices import checked
from sslvit.settings.protocols import LogregSettings, ProtocolSettings

POOLINGS = ("class", "mean", "class+mean", "attention")


@dataclass
@checked("--")
class ProbeSettings:
    """A linear probe and nearest neighbors on frozen features.

    Args:
        train: labeled shards (or an image folder) that the heads are fitted on.
        val: labeled shards that are reported, and never used to choose anything.
        protocol: of the linear probe; null leaves it out.
        labels_per_class: also fit logistic regression on this many labels of each class.
        labels_percent: also fit logistic regression on this percentage of each class's labels.
        draws: how many random choices of those labels are averaged.
        layer: block that is probed; null for the encoder's own choice.
        blocks: how many blocks that end there are put side by side.
        pooling: class, mean, class+mean or attention; null for the encoder's own choice.
        neighbors: each k of the k-nearest-neighbor vote.
        temperature: of the vote.
        max_unreadable_fraction: share of a data set's images that may be unreadable; they are left out and counted.
        batch: images per forward pass.
        workers: loader processes.
        baselines: also score raw pixels and the same encoder with untrained weights.
        seeds: how many times everything by chance is drawn anew: untrained weights, folds, draws of labels and
            the steps of a head.
        seed: the first of them.
        device: that runs the encoder and fits the heads; auto is a GPU where there is one.
        cache: folder that keeps features; null for none.
        cache_gb: size that this folder is kept within.
    """

    train: str
    val: str
    protocol: ProtocolSettings | None = field(default_factory=LogregSettings)
    labels_per_class: int | None = None
    labels_percent: float | None = None
    draws: int = 5
    layer: int | None = None
    blocks: int = 1
    pooling: str | None = None
    neighbors: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07
    max_unreadable_fraction: float = 0.01
    batch: int = 256
    workers: int = 0
    baselines: bool = True
    seeds: int = 1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: str | None = "~/.cache/sslvit-features"
    cache_gb: float = 20.0

    def __post_init__(self) -> None:
        self.train, self.val = expand_path(self.train), expand_path(self.val)
        if self.labels_per_class == 1:
            raise ValueError("--labels-per-class 1: the strength is chosen on held-out labels; use 2 or more.")
        for key in ("labels_per_class", "draws", "layer", "blocks", "batch", "seeds"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be 1 or more.")
        for key in ("seed", "workers"):
            if getattr(self, key) < 0:
                raise ValueError(f"--{key} {getattr(self, key)}: must be 0 or more.")
        if self.labels_percent is not None and not 0 < self.labels_percent < 100:
            raise ValueError(f"--labels-percent {self.labels_percent:g}: must be between 0 and 100.")
        if any(k < 1 for k in self.neighbors) or len(set(self.neighbors)) != len(self.neighbors):
            raise ValueError(f"--neighbors {brief(self.neighbors)}: expected different numbers from 1.")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(f"--pooling {brief(self.pooling)}: not one of {', '.join(POOLINGS)}.")
        if not 0 <= self.max_unreadable_fraction < 1:
            raise ValueError(f"--max-unreadable-fraction {self.max_unreadable_fraction}: must be from 0 to below 1.")
        for key in ("temperature", "cache_gb"):
            if not getattr(self, key) > 0:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(self, key)}: must be above zero.")
