"""What labels say about an encoder while it is pretrained without them."""

from __future__ import annotations

from dataclasses import dataclass

from sslvit.files import expand_path
from sslvit.settings.choices import check_bounds, checked
from sslvit.settings.probe import Precision


@dataclass
@checked("online.")
class OnlineSettings:
    """Nearest neighbors and a linear probe on frozen features, every so many steps; training does not feel them."""

    train: str | None = None
    """Labeled shards that the neighbors and the linear probe are fitted on; null for no online evaluation."""
    val: str | None = None
    """Labeled shards that the online evaluation scores."""
    every: int = 1000
    """Steps between two online evaluations, rounded up to lines of metrics.jsonl."""
    images: int = 5000
    """Number of images used of each of the two sets, evenly spaced."""
    neighbors: int = 20
    """Number k of neighbors that vote."""
    precision: Precision = "float32"
    """Precision of the encoder's forward passes, as of `sslvit probe`: bf16 is faster and less exact."""

    def __post_init__(self) -> None:
        if (self.train is None) != (self.val is None):
            raise ValueError("online.train and online.val belong together: give both, or neither.")
        self.train, self.val = (part and expand_path(part) for part in (self.train, self.val))
        check_bounds(self, "online.", "1 or more", "every", "images", "neighbors")
