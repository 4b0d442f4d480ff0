"""Linear probes by name: the evaluation protocols of several papers and their hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sslvit.files import brief
from sslvit.settings.choices import Choice, check_bounds, checked


@dataclass
class ProtocolSettings:
    """Base of the settings of all protocols."""

    name: str
    """Name of the protocol."""
    source: ClassVar[str]
    chosen_by_paper: ClassVar[str | None] = None  # what the paper selected on the set that it reports


@dataclass
@checked("--protocol.")
class LogregSettings(ProtocolSettings):
    """Logistic regression to convergence on standardized features of the center view."""

    name: Literal["logreg"] = "logreg"
    """Name of the protocol."""
    source: ClassVar[str] = "multinomial logistic regression by L-BFGS, to convergence"


@dataclass
@checked("--protocol.")
class IGPTProbeSettings(ProtocolSettings):
    """iGPT's probe: logistic regression on the mean over all pixels in the middle of the depth (Chen et al. 2020)."""

    name: Literal["igpt"] = "igpt"
    """Name of the protocol."""
    source: ClassVar[str] = "Chen et al. 2020, and its author in issue 12 of the released code"
    chosen_by_paper: ClassVar[str | None] = "the best layer; here it is the encoder's own, or the middle one"


@dataclass
class SGDProbeSettings(ProtocolSettings):
    """A head trained step by step on random crops through the frozen encoder."""

    name: str
    """Name of the protocol."""
    batch: int = 1024
    """Number of images per step; all images if there are fewer."""
    momentum: float = 0.9
    """Momentum of the optimizer."""
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest fraction of the image's area in a crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    fraction: float = 0.875
    """Fraction of the shorter side kept by the center crop of validation images (224 of 256: 0.875)."""
    length: ClassVar[str] = "epochs"  # the key that sets the length of training
    augment: bool = True
    """Use new random crops in every epoch, each in a pass through the encoder; false uses center crops once."""

    def __post_init__(self) -> None:
        check_bounds(self, "--protocol.", "2 or more", "batch")
        check_bounds(self, "--protocol.", "in [0, 1]", "momentum", "flip")
        check_bounds(self, "--protocol.", "in (0, 1]", "fraction")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"--protocol.scale {brief(self.scale)}: must be [smallest, largest] fraction of the area.")
        check_bounds(self, "--protocol.", "positive", "epochs", "base_lr")

    def steps(self, per_epoch: int) -> int:
        """Number of steps in total, for `per_epoch` steps per epoch."""
        return max(1, round(getattr(self, self.length) * per_epoch))


@dataclass
@checked("--protocol.")
class MAEProbeSettings(SGDProbeSettings):
    """MAE's linear probe (He et al. 2022, appendix A.1): batch norm without affine, LARS."""

    name: Literal["mae"] = "mae"
    """Name of the protocol."""
    epochs: float = 90.0
    """Passes over the training images (90 for ViT-B, 50 for ViT-L and ViT-H)."""
    batch: int = 16384
    """Number of images per step; all images if there are fewer."""
    base_lr: float = 0.1
    """Learning rate at a batch size of 256; the actual learning rate is base_lr x batch / 256."""
    warmup_epochs: float = 10.0
    """Epochs of linear learning rate warm-up from zero."""
    source: ClassVar[str] = "He et al. 2022, appendix A.1; released main_linprobe.py"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"--protocol.warmup_epochs {self.warmup_epochs:g}: must be below --protocol.epochs ({self.epochs:g})."
            )


@dataclass
@checked("--protocol.")
class DINOProbeSettings(SGDProbeSettings):
    """DINO's linear probe (Caron et al. 2021): SGD on the last blocks' class tokens."""

    name: Literal["dino"] = "dino"
    """Name of the protocol."""
    blocks: int | None = None
    """Number of last blocks whose class tokens are concatenated; null for 4, or, for an encoder as wide as ViT-B, for 1
    together with the mean over the patches.
    """
    epochs: float = 100.0
    """Passes over the training images."""
    base_lr: float = 1e-3
    """Learning rate at a batch size of 256; the actual learning rate is base_lr x batch / 256."""
    source: ClassVar[str] = "Caron et al. 2021, released eval_linear.py"
    chosen_by_paper: ClassVar[str | None] = "the best epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "--protocol.", "1 or more", "blocks")


@dataclass
@checked("--protocol.")
class DINOv2ProbeSettings(SGDProbeSettings):
    """DINOv2's linear probe (Oquab et al. 2024): 13 learning rates x 4 features, trained in parallel."""

    name: Literal["dinov2"] = "dinov2"
    """Name of the protocol."""
    lrs: list[float] = field(
        default_factory=lambda: [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    )
    """Learning rates at a batch size of 256; a head is trained with each."""
    blocks: list[int] = field(default_factory=lambda: [1, 4])
    """Numbers of last blocks whose class tokens are concatenated; heads are trained for each, with and without the mean
    over the patches.
    """
    length: ClassVar[str] = "iterations"
    iterations: int = 12_500
    """Number of steps."""
    held_out: float = 0.1
    """Fraction of the training images held out to choose the best head."""
    source: ClassVar[str] = "Oquab et al. 2024, released eval/linear.py"
    chosen_by_paper: ClassVar[str | None] = "the best of the heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lrs or not all(0 < rate < float("inf") for rate in self.lrs):
            raise ValueError(f"--protocol.lrs {brief(self.lrs)}: must be positive learning rates.")
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"--protocol.blocks {brief(self.blocks)}: must be numbers of blocks from 1.")
        if self.iterations < 1 or not 0 < self.held_out < 1:
            raise ValueError("--protocol.iterations must be 1 or more, and --protocol.held_out in (0, 1).")

    def held_out_of(self, images: int) -> int:
        """Number of images that are held out of a class of so many; at least one."""
        return max(1, round(self.held_out * images))

    def steps(self, per_epoch: int) -> int:
        """Number of steps in total, which does not depend on `per_epoch`."""
        return self.iterations


PROTOCOLS: dict[str, type[ProtocolSettings]] = {
    "logreg": LogregSettings, "mae": MAEProbeSettings, "dino": DINOProbeSettings, "dinov2": DINOv2ProbeSettings,
    "igpt": IGPTProbeSettings,
}  # fmt: skip
PROTOCOL_CHOICE = Choice("name", "logreg", PROTOCOLS)
