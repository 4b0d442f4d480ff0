"""Views made by a user's own function, instead of sampled boxes and colors.

The function is called with a PIL image, or, for images that PIL does not support (16 bits, or other than 1, 3 or 4
channels), with a tensor 'c h w' like that of torchvision's ToTensor. It returns one or several tensors 'c h w', of
uint8 or of floating-point values from 0 to 1; the encoder's own normalization follows. Random number generators are
seeded for each call, so a resume is exact and results do not depend on the workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvit import rng
from sslvit.data.decode import decode
from sslvit.data.header import MODES, BadImage
from sslvit.data.index import ShardIndex
from sslvit.data.mixture import JoinedIndex
from sslvit.data.reader import ShardReader
from sslvit.data.views import Views
from sslvit.files import printable
from sslvit.settings import EncoderSettings
from sslvit.settings.views import TransformSettings

Function = Callable[[Any], Any]
OVERSHOOT = 0.25  # tolerance around [0, 1], since bicubic resizing overshoots; values are then clipped
TRIED = 64  # images to try, until one is readable, for a call of the function before the run

_given: dict[str, Function] = {}  # by description, only during the call that was given them


@contextmanager
def named_function(function: Function | None) -> Iterator[dict[str, str]]:
    """Register a function within the block and yield the settings of its view; no settings for no function.

    Raises:
        ValueError: the object is not callable.
    """
    if function is None:
        yield {}
        return
    if not callable(function):
        raise ValueError(f"transform: a {type(function).__name__}, which cannot be called with an image.")
    kind: Any = function if hasattr(function, "__qualname__") else type(function)
    words = f"{printable(kind.__qualname__)} of {printable(kind.__module__)} given from Python"
    outer, _given[words] = _given.get(words), function
    try:
        yield {"data.view.kind": "transform", "data.view.function": words}
    finally:
        if outer is None:
            del _given[words]
        else:  # from an outer call
            _given[words] = outer


def function_of(settings: TransformSettings) -> Function:
    """Look up the function of a view.

    Raises:
        ValueError: no running call was given this function.
    """
    if settings.function not in _given:
        raise ValueError(
            "data.view.kind: transform takes a function, which no file holds. Give it from Python: "
            "sslvit.pretrain(..., transform=FUNCTION)"
        )
    return _given[settings.function]


@dataclass
class Keys:
    """Keys of the random numbers of each image, in place of boxes."""

    samples: np.ndarray
    epochs: np.ndarray

    def zoom(self, size: list[int]) -> np.ndarray:
        """Return 1 for every image: the zoom is unknown, so images are not reduced."""
        return np.ones(len(self.samples))


class TransformViews(Views):
    """Views made by a function; same arguments as Views."""

    settings: TransformSettings

    def __init__(
        self, settings: Any, size: list[int], interpolation: str, seed: int = 0, color_here: bool = True,
        fill: list[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(settings, size, interpolation, seed, color_here, fill)
        self.function = function_of(settings)

    @property
    def is_exact(self) -> bool:
        """True, since the function needs images at full resolution."""
        return True

    @property
    def augments(self) -> bool:
        """True, since the function is called image by image, on the CPU."""
        return True

    def sample_boxes(
        self, sides: np.ndarray, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None = None
    ) -> list[tuple[list[int], Any]]:
        """(size, keys) of each view."""
        return [(size_of_view, Keys(samples, epochs)) for size_of_view in self.settings.sizes]

    def crop_batch(
        self, images: Tensor, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None = None
    ) -> list[Tensor]:
        """Make views 'b c h w' of images 'b c h w'."""
        made = [self.call(image, *key) for image, *key in zip(images, samples.tolist(), epochs.tolist(), strict=True)]
        return [torch.stack(views) for views in zip(*made, strict=True)]

    def crop_image(
        self, image: Tensor, crops: list[tuple[list[int], Any]], row: int, reduction: int = 1
    ) -> list[Tensor]:
        """Make views 'c h w' of an image."""
        keys = crops[0][1]
        return self.call(image, int(keys.samples[row]), int(keys.epochs[row]))

    def call(self, image: Tensor, sample: int, epoch: int) -> list[Tensor]:
        """Views 'c h w' of an image 'c h w', in its type and units.

        Raises:
            ValueError: the views differ in number or size from those of the first call, or have invalid values.
            RuntimeError: the function raised an exception.
        """
        with rng.all_seeded(self.seed, epoch, "transform", sample):
            try:
                made = self.function(as_given(image))
            except Exception as error:
                raise RuntimeError(
                    f"transform: it failed on sample {sample} in epoch {epoch} ({type(error).__name__}: {error})"
                ) from error
        views = list(made) if isinstance(made, (list, tuple)) else [made]
        expected = [[image.shape[0], *size] for size in self.settings.sizes]
        shapes = [list(view.shape) if isinstance(view, Tensor) else type(view).__name__ for view in views]
        if self.settings.sizes and shapes != expected:
            raise ValueError(
                f"transform: sample {sample} gives views of {in_words(shapes)}, and the first image gave "
                f"{in_words(expected)}. Every image must give as many views of the same sizes."
            )
        return [in_units(view, image.dtype, sample) for view in views]


def as_given(image: Tensor) -> Image.Image | Tensor:
    """Convert an image 'c h w' to the form passed to the function."""
    if image.dtype != torch.uint8:
        return image / 255
    if image.shape[0] not in MODES:
        return image.clone() / 255
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if image.shape[0] == 1 else pixels))


def in_units(view: Any, dtype: torch.dtype, sample: int) -> Tensor:
    """Convert a view to the dtype of the data set, with values from 0 to 255."""
    if not isinstance(view, Tensor):
        raise ValueError(f"transform: it gives a {type(view).__name__}. Let it end with a tensor 'c h w' (ToTensor).")
    if view.dtype == torch.uint8:
        return view.to(dtype)
    low, high = float(view.min()), float(view.max())
    if not (view.is_floating_point() and low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise ValueError(
            f"transform: sample {sample} gives {view.dtype} from {low:.3g} to {high:.3g}, and pixels are uint8 or "
            "floating-point numbers from 0 to 1. Leave a normalization out: the encoder's own is encoder.mean and "
            "encoder.std."
        )
    pixels = view.clamp(0, 1) * 255
    return pixels.round().to(dtype) if dtype == torch.uint8 else pixels.to(dtype)


def in_words(shapes: list[Any]) -> str:
    """Format shapes for a message."""
    return ", ".join(shape if isinstance(shape, str) else " x ".join(map(str, shape)) for shape in shapes) or "nothing"


def first_call(
    settings: TransformSettings, encoder: EncoderSettings, index: ShardIndex | JoinedIndex, seed: int
) -> TransformSettings:
    """Call the function on the first readable image, and return the settings with the sizes and digest of its views.

    Raises:
        ValueError: the function gives no valid views, or is not deterministic given the seeds.
    """
    views = TransformViews(replace(settings, sizes=[], digest=None), encoder.image_size, encoder.interpolation, seed)
    reader = ShardReader(index, encoder.channels, memory_limit_mb=0)
    for sample in range(min(TRIED, len(index))):
        try:
            content = reader.read(sample)
            image = decode(content, encoder.channels, index.bits, header=reader.header(content))
        except BadImage:
            continue
        made, again = views.call(image, sample, 0), views.call(image, sample, 0)
        if len(made) != len(again) or not all(map(torch.equal, made, again)):
            raise ValueError(
                "transform: it gives other views of one image from the same random numbers, so a run could not be "
                "resumed exactly. Let it draw from torch's, numpy's or Python's own generator (torch.rand, "
                "numpy.random.rand, random.random), which are seeded for each call."
            )
        wrong = [view for view in made if view.ndim != 3 or view.shape[0] != encoder.channels]
        if wrong or not made:
            raise ValueError(
                f"transform: it gives {in_words([list(view.shape) for view in wrong])}, and a view is a tensor 'c h w' "
                f"of {encoder.channels} channels (encoder.channels)."
            )
        digest = hashlib.sha256(b"".join(view.numpy().tobytes() for view in made)).hexdigest()
        return replace(settings, sizes=[list(view.shape[1:]) for view in made], digest=digest[:16])
    raise ValueError(f"{index.location}: none of the first {TRIED} images can be read.")
