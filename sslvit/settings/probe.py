"""How a frozen encoder is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ProbeSettings:
    """Logistic regression and nearest neighbours on frozen features.

    Args:
        train: labelled shards (or an image folder) that the heads are fitted on.
        val: labelled shards that are reported, and never used to choose anything.
        labels_per_class: also fit on this many labels of each class; null leaves that column out.
        draws: how many random choices of those labels are averaged.
        layer: blocks that an image passes before it is probed; null for the encoder's own choice.
        pooling: class, mean or attention; null for the encoder's own choice.
        neighbours: k of the k-nearest-neighbour vote.
        temperature: of the vote.
        batch: images per forward pass.
        workers: loader processes.
        baselines: also score raw pixels and the same encoder with untrained weights.
        seed: of the folds that pick the regularisation, of the draws and of the untrained weights.
        device: that runs the encoder; auto is a GPU where there is one.
    """

    train: str
    val: str
    labels_per_class: int | None = None
    draws: int = 5
    layer: int | None = None
    pooling: str | None = None
    neighbours: int = 20
    temperature: float = 0.07
    batch: int = 256
    workers: int = 0
    baselines: bool = True
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.labels_per_class == 1:
            raise ValueError("--labels-per-class 1: the strength is chosen on held-out labels; use 2 or more.")
        for key in ("labels_per_class", "draws", "layer", "neighbours", "batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be 1 or more.")
