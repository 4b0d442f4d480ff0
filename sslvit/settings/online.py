"""What labels say about an encoder while it is pretrained without them."""

from __future__ import annotations

from dataclasses import dataclass

from sslvit.files import expand_path


@dataclass
class OnlineSettings:
    """Nearest neighbors and a linear probe on frozen features, every so many steps; training does not feel them.

    Args:
        train: labeled shards that neighbors and head come from; null for no such looks.
        val: labeled shards that are scored.
        every: steps between two looks, rounded up to lines of metrics.jsonl.
        images: of each of the two sets that are used, spread evenly over it.
        neighbors: k of the vote.
    """

    train: str | None = None
    val: str | None = None
    every: int = 1000
    images: int = 5000
    neighbors: int = 20

    def __post_init__(self) -> None:
        if (self.train is None) != (self.val is None):
            raise ValueError("online.train and online.val belong together: give both, or neither.")
        self.train, self.val = (part and expand_path(part) for part in (self.train, self.val))
        for key in ("every", "images", "neighbors"):
            if getattr(self, key) < 1:
                raise ValueError(f"online.{key}: {getattr(self, key)} must be 1 or more.")
