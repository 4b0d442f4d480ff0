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
    """A linear probe and nearest neighbors on frozen features."""

    train: str
    """Labeled shards (or a folder of images) that the heads are fitted on."""
    val: str
    """Labeled shards that are scored, and never used to choose anything."""
    protocol: ProtocolSettings | None = field(default_factory=LogregSettings)
    """Protocol of the linear probe; null for none."""
    labels_per_class: int | None = None
    """Number of labels per class for an additional logistic regression on few labels."""
    labels_percent: float | None = None
    """Percentage of each class's labels for an additional logistic regression on few labels."""
    draws: int = 5
    """Number of random subsets of the labels that are averaged."""
    layer: int | None = None
    """Number of the block whose output is probed; null for the encoder's default."""
    blocks: int = 1
    """Number of consecutive blocks, ending with that one, whose features are concatenated."""
    pooling: str | None = None
    """Pooling of the tokens; null for the encoder's default."""
    neighbors: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers k of neighbors that vote."""
    temperature: float = 0.07
    """Temperature of the neighbors' vote."""
    max_unreadable_fraction: float = 0.01
    """Fraction of a data set's images that may be unreadable; these are skipped and counted."""
    batch: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Number of loader processes."""
    baselines: bool = True
    """Also score raw pixels and the same architecture with untrained weights."""
    seeds: int = 1
    """Number of seeds of everything random: untrained weights, folds, subsets of labels and the steps of a head."""
    seed: int = 0
    """First seed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoder and the heads; auto is a GPU where there is one."""
    cache: str | None = "~/.cache/sslvit-features"
    """Folder that keeps features; null for none."""
    cache_gb: float = 20.0
    """Maximum size of that folder in GB."""

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
