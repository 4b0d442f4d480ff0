"""Settings of the views of an image; `data.view.kind` selects one of these dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Literal, cast, get_args

from sslvit.files import brief
from sslvit.plugins import find_plugin
from sslvit.settings.choices import Choice, check_bounds, checked

MAX_MAGNITUDE = 10  # of RandAugment's operations
MAX_GLOBAL_SCALE = 16.0  # largest area of a crop relative to the image


@dataclass
@checked("data.view.")
class CropSettings:
    """A random part of the image, resized (Szegedy et al. 2015): MAE's view."""

    kind: Literal["crop"] = "crop"
    """Name of the view."""
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Smallest and largest fraction of the image's area in the crop (MAE, appendix A.1: 0.2 to 1)."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest aspect ratio, width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        check_range("scale", self.scale, maximum=1.0)
        check_range("ratio", self.ratio)
        check_bounds(self, "data.view.", "a probability in [0, 1]", "flip")


@dataclass
@checked("data.view.")
class SquareSettings:
    """A random square of nearly the whole image, resized to few pixels: iGPT's view.

    The paper (section 3.1) resizes the shorter side to a length sampled uniformly from 256 to 384 pixels and crops 224,
    which is 0.71 of the shorter side on average. Here both are one step.
    """

    kind: Literal["square"] = "square"
    """Name of the view."""
    resize: list[int] = field(default_factory=lambda: [256, 384])
    """Smallest and largest length of the shorter side after resizing, in pixels."""
    crop: int = 224
    """Side of the square crop, in pixels."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        if len(self.resize) != 2 or not 0 < self.resize[0] <= self.resize[1]:
            raise ValueError(f"data.view.resize: {brief(self.resize)} must be [smallest, largest] with 0 < smallest.")
        if not 0 < self.crop <= self.resize[0]:
            raise ValueError(
                f"data.view.crop: {self.crop} must be in [1, {self.resize[0]}], up to the smallest shorter side "
                "(data.view.resize)."
            )
        check_bounds(self, "data.view.", "a probability in [0, 1]", "flip")


@dataclass
@checked("data.view.")
class CenterSettings:
    """The center of the image, the same in every epoch: the view of probes."""

    kind: Literal["center"] = "center"
    """Name of the view."""
    fraction: float = 1.0
    """Fraction of the box's sides to keep (224 of 256: 0.875)."""
    mode: Literal["center", "squash"] = "center"
    """Box to use: center (the largest box with the proportions of the encoder's input) or squash (the whole image).
    """

    def __post_init__(self) -> None:
        check_range("fraction", [self.fraction, 1.0])


@dataclass
@checked("data.view.")
class CanvasSettings:
    """The whole image at a random size and position on a black canvas."""

    kind: Literal["canvas"] = "canvas"
    """Name of the view."""
    side: list[float] = field(default_factory=lambda: [2 / 3, 1.0])
    """Smallest and largest side of the image, as a fraction of the canvas."""
    flip: float = 0.0
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        check_range("side", self.side, maximum=1.0)
        check_bounds(self, "data.view.", "a probability in [0, 1]", "flip")


@dataclass
@checked("data.view.")
class MultiCropSettings:
    """Two large crops and several small ones, with changed colors: DINO's views (Caron et al. 2021, section 3.1).

    The defaults are those of the released recipes for vision transformers. A list with three entries gives the
    first global crop, the second, and the local ones.
    """

    kind: Literal["multi_crop"] = "multi_crop"
    """Name of the view."""
    global_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    """Smallest and largest fraction of the image's area in a global crop, which is resized to encoder.image_size; above
    1, crops may extend beyond the image, and the area outside is black.
    """
    local_crops: int = 8
    """Number of local crops."""
    local_size: int = 96
    """Side of a local crop in pixels."""
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.25])
    """Smallest and largest fraction of the image's area in a local crop."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest aspect ratio, width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of color jitter: changes of brightness, contrast, saturation and hue."""
    brightness: float = 0.4
    """Largest relative change of brightness."""
    contrast: float = 0.4
    """Largest relative change of contrast."""
    saturation: float = 0.2
    """Largest relative change of saturation."""
    hue: float = 0.1
    """Largest shift of the hue, as a fraction of the color circle."""
    gray: float = 0.2
    """Probability of conversion to grayscale."""
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    """Probabilities of Gaussian blur in the first global crop, the second, and local crops."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Smallest and largest standard deviation of the blur in pixels."""
    solarize: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.0])
    """Probabilities of solarization (pixels from 128 on are inverted) in the first global crop, the second, and local
    crops.
    """

    def __post_init__(self) -> None:
        check_range("global_scale", self.global_scale, maximum=MAX_GLOBAL_SCALE)
        check_range("local_scale", self.local_scale, maximum=1.0)
        check_range("ratio", self.ratio)
        check_range("blur_sigma", self.blur_sigma)
        for key in ("blur", "solarize"):
            values = getattr(self, key)
            if len(values) != 3:
                raise ValueError(
                    f"data.view.{key}: {brief(values)} must be [first global, second global, local crops]."
                )
        check_bounds(self, "data.view.", "a probability in [0, 1]", "flip", "jitter", "gray", "blur", "solarize")
        check_bounds(self, "data.view.", "in [0, 1]", "brightness", "contrast", "saturation")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"data.view.hue: {self.hue} must be in [0, 0.5].")
        if self.local_crops < 0 or self.local_size < 1:
            raise ValueError("data.view: local_crops must be 0 or more, and local_size at least one pixel.")


@dataclass
@checked("data.view.")
class AugmentSettings:
    """A random part of the image, augmented by RandAugment (Cubuk et al. 2020): the view of supervised training.

    The defaults are MAE's fine-tuning: timm's rand-m9-mstd0.5-inc1.
    """

    kind: Literal["augment"] = "augment"
    """Name of the view."""
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest fraction of the image's area in the crop."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest aspect ratio, width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    operations: int = 2
    """Number of RandAugment operations per image; 0 for none."""
    probability: float = 0.5
    """Probability that a selected operation is applied."""
    magnitude: float = 9.0
    """Mean magnitude of the operations, from 0 to 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the magnitude."""

    def __post_init__(self) -> None:
        check_range("scale", self.scale, maximum=1.0)
        check_range("ratio", self.ratio)
        check_bounds(self, "data.view.", "a probability in [0, 1]", "flip", "probability")
        check_bounds(self, "data.view.", "0 or more", "operations")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"data.view.magnitude: {self.magnitude} must be in [0, {MAX_MAGNITUDE}].")
        check_bounds(self, "data.view.", "0 or more", "magnitude_std")


@dataclass
@checked("data.view.")
class TransformSettings:
    """Views made by your own function, given from Python: sslvit.pretrain(..., transform=FUNCTION).

    MAE and iGPT need one view of the encoder's size. DINO needs two views of that size, the global ones, followed by
    any number of local ones.
    """

    kind: Literal["transform"] = "transform"
    """Name of the view."""
    function: str = ""
    """Description of the function."""
    sizes: list[list[int]] = field(default_factory=list)
    """Height and width of each view in the function's first call."""
    digest: str | None = None
    """Digest of the views of that call, by which a resume detects a different function."""


ViewSettings = (
    AugmentSettings
    | CropSettings
    | SquareSettings
    | CenterSettings
    | CanvasSettings
    | MultiCropSettings
    | TransformSettings
)
VIEW_SETTINGS: dict[str, type] = {view.kind: view for view in get_args(ViewSettings)}


def find_view(kind: str) -> type | None:
    """The settings dataclass of a plugin's view; None for an unknown name."""
    found = find_plugin("data.view.kind", kind)
    if found is not None and not (is_dataclass(found) and hasattr(found, "specs")):
        raise ValueError(f"data.view.kind: {brief(kind)} is no view. It must be a dataclass with specs(size).")
    return cast("type | None", found)


VIEW_CHOICE = Choice("kind", "crop", VIEW_SETTINGS, find_view)


def check_range(key: str, values: list[float], maximum: float = float("inf")) -> None:
    """Raise ValueError unless values are [smallest, largest] with 0 < smallest and largest <= maximum."""
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ValueError(f"data.view.{key}: {brief(values)} must be [smallest, largest] with 0 < smallest.")
    if values[1] > maximum:
        raise ValueError(f"data.view.{key}: {values[1]} must be at most {maximum:g}, where 1 is the whole image.")
