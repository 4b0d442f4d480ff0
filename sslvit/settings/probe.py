"""Settings for evaluating a frozen encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from sslvit.files import brief, expand_path
from sslvit.settings.choices import Arg, check_bounds, checked
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.protocols import PROTOCOL_CHOICE, LogregSettings, ProtocolSettings

Pooling = Literal["class", "mean", "class+mean", "attention"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bf16"]


def read_size(size: int | str | Sequence[int], settings: EncoderSettings) -> list[int]:
    """Read an input size as height and width.

    Args:
        size: One side, both as 48x64, or both in a sequence.
        settings: Settings of the encoder, whose patch must divide the sides.

    Raises:
        ValueError: Not a size, or the encoder does not accept it; the message gives the nearest valid sizes.
    """
    text = "x".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size)
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip().lower())
    if not match or not all(int(side) for side in match.groups(match[1])):
        raise ValueError(f"--size {brief(text)}: expected a side in pixels, such as 64, or both, such as 48x64.")
    sides = [int(side) for side in match.groups(match[1])]
    if settings.has_fixed_size and sides != settings.image_size:
        trained_size = "x".join(map(str, settings.image_size))
        raise ValueError(
            f"--size {text}: a pixel sequence with encoder.pos_embed {settings.pos_embed} is tied to its size "
            f"({trained_size}). Omit the option."
        )
    patch = settings.patch
    if any(side % patch for side in sides):
        near = [sorted({max(side // patch, 1) * patch, -(-side // patch) * patch}) for side in sides]
        pairs = near if len(set(sides)) > 1 else near[:1]
        nearest = " x ".join(" or ".join(map(str, one)) for one in pairs)
        raise ValueError(f"--size {text}: cannot be cut into patches of {patch} pixels. The nearest sides: {nearest}.")
    return sides


@dataclass(kw_only=True)
@checked("--")
class Readout:
    """How features are taken from an encoder."""

    layer: int | None = None
    """Number of the block whose output is used; null for the encoder's own."""
    pooling: Pooling | None = None
    """Pooling of the tokens; null for the encoder's own."""


@dataclass(kw_only=True)
class BlocksReadout(Readout):
    """How features are taken from one or several blocks of an encoder."""

    blocks: int = 1
    """Number of consecutive blocks whose features are concatenated, ending with that of layer."""


@dataclass(kw_only=True)
class FewLabels:
    """Number of labels for logistic regression on few labels."""

    labels_per_class: int | None = None
    """Number of labels per class for logistic regression on few labels."""
    labels_percent: float | None = None
    """Percentage of each class's labels for logistic regression on few labels."""
    draws: int = 5
    """Number of random subsets of the labels to average over."""


@dataclass(kw_only=True)
@checked("--")
class ForwardPasses:
    """Forward passes of images."""

    batch: int = 256
    """Number of images per forward pass."""
    device: Device = "auto"
    """Device of the encoder and the fitted heads; auto is a GPU if there is one."""

    def __post_init__(self) -> None:
        check_bounds(self, "--", "0 or more", "workers", "seed")
        check_bounds(self, "--", "1 or more", "batch", "layer", "blocks", "seeds", "draws", "labels_per_class")
        check_bounds(self, "--", "in [0, 1)", "max_unreadable_fraction")


@dataclass(kw_only=True)
class Passes(ForwardPasses):
    """Forward passes of an encoder, with loader processes."""

    workers: int | None = None
    """Number of loader processes, which are not needed for images kept in memory; null for one per CPU core minus one,
    up to 16, if the encoder is on a GPU, and none if it is on a CPU.
    """
    precision: Precision = "float32"
    """Precision of the encoder's forward passes. bf16 is faster, but features differ by up to 1.3 % of their norm;
    accuracies were up to 4 points lower for features that vary little between images. Heads and neighbors are computed
    in float32 and float64.
    """


@dataclass(kw_only=True)
class UnreadableImages:
    """Handling of images that cannot be read."""

    max_unreadable_fraction: float = 0.01
    """Maximum fraction of unreadable images in a data set; these are skipped and counted."""


@dataclass
@checked("--")
class KNNSettings(Passes, UnreadableImages, BlocksReadout):
    """Nearest neighbors on frozen features."""

    train: Annotated[str, Arg("SHARDS")]
    """Labeled shards (or a folder of images) that the heads are fitted on."""
    val: Annotated[str, Arg("SHARDS")]
    """Labeled shards for evaluation, which are never used to choose anything."""
    _: KW_ONLY
    neighbors: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers k of neighbors that vote."""
    temperature: float = 0.07
    """Temperature of the neighbors' vote."""
    whiten: bool = False
    """Whiten features before the neighbor search, by mean and covariance of the training features. This helps encoders
    such as MAE's, whose cosine similarities are dominated by a few directions that all images share."""
    baselines: bool = True
    """Also score raw pixels and the same architecture with untrained weights."""
    seeds: int = 1
    """Number of seeds for everything random: untrained weights, folds, subsets of labels and the steps of a head."""
    seed: int = 0
    """First seed."""
    allow_same_data: bool = False
    """Allow the same images for training and validation, although the scores then say nothing about other images."""
    cache: Annotated[str | None, Arg("FOLDER")] = "~/.cache/sslvit-features"
    """Folder in which features are cached; none for no cache."""
    cache_gb: float = 20.0
    """Maximum size of that folder in GB."""

    def __post_init__(self) -> None:
        self.train, self.val = expand_path(self.train), expand_path(self.val)
        super().__post_init__()
        if any(k < 1 for k in self.neighbors) or len(set(self.neighbors)) != len(self.neighbors):
            raise ValueError(f"--neighbors {brief(self.neighbors)}: must be different numbers from 1.")
        for key in ("temperature", "cache_gb"):
            if not getattr(self, key) > 0:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(self, key)}: must be positive.")


@dataclass
@checked("--")
class ProbeSettings(FewLabels, KNNSettings):
    """A linear probe and nearest neighbors on frozen features."""

    protocol: Annotated[ProtocolSettings | None, PROTOCOL_CHOICE] = field(default_factory=LogregSettings)
    """Protocol of the linear probe; its settings are --protocol.KEY VALUE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels_percent is not None and not 0 < self.labels_percent < 100:
            raise ValueError(f"--labels-percent {self.labels_percent:g}: must be in (0, 100).")
