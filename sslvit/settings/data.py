"""Which images, in which batches, seen how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ViewSettings:
    """How one image becomes one view of encoder.image_size.

    Args:
        kind: crop (a random part, resized), centre (the middle part), or canvas (the whole image, drawn at a
            random size and place on black).
        scale: for crop the smallest and largest share of the image's area (MAE, appendix A.1: 0.2 to 1); for
            canvas the smallest and largest side of the drawing as a share of the canvas.
        ratio: for crop the smallest and largest width over height.
        flip: probability of a horizontal flip.
        centre_fraction: for centre the share of the shorter side that is kept (224 of 256: 0.875).
    """

    kind: Literal["crop", "centre", "canvas"] = "crop"
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    flip: float = 0.5
    centre_fraction: float = 1.0

    def __post_init__(self) -> None:
        for key in ("scale", "ratio"):
            values = getattr(self, key)
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                raise ValueError(f"data.view.{key}: {values} is not [smallest, largest] with 0 < smallest.")
        if self.scale[1] > 1:
            raise ValueError(f"data.view.scale: {self.scale[1]} is more than the whole image (1.0).")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.view.flip: {self.flip} is not a probability.")
        if not 0 < self.centre_fraction <= 1:
            raise ValueError(f"data.view.centre_fraction: {self.centre_fraction} is not in (0, 1].")


@dataclass
class DataSettings:
    """The stream of batches.

    Args:
        shards: a folder of shards with index.json, or an image folder (packed first, beside the run).
        view: how an image is seen.
        global_batch: images per optimiser step, over all ranks and micro-batches.
        workers: loader processes per rank; the order of the data does not depend on it.
        memory_limit_mb: a data set of small equal images is decoded once and kept in memory up to this size.
        bad_limit: share of unreadable samples above which the run stops.
    """

    shards: str | None = None
    view: ViewSettings = field(default_factory=ViewSettings)
    global_batch: int = 4096
    workers: int = 4
    memory_limit_mb: int = 1024
    bad_limit: float = 0.01

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise ValueError(f"data.global_batch: {self.global_batch} is less than one image.")
        if self.workers < 0:
            raise ValueError(f"data.workers: {self.workers} is negative. Use 0 to load in the main process.")
