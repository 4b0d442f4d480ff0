"""Samples from images in an array, and the conversion of their values to pixels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from sslvit.data.header import MODES, BadImage
from sslvit.data.labels import NO_LABEL
from sslvit.data.plan import evenly_spaced
from sslvit.data.sources import Sample
from sslvit.files import brief

# name -> (description of the values, conversion to pixels)
CONVERSIONS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "unit": ("from 0 to 1, times 255", lambda values: (values.astype(np.float32) * 255).round().astype(np.uint8)),
    "signed": (
        "from -1 to 1, to 0 to 255",
        lambda values: ((values.astype(np.float32) + 1) * 127.5).round().astype(np.uint8),
    ),
    "byte": ("from 0 to 255, rounded", lambda values: values.round().astype(np.uint8)),
    "deep": ("from 0 to 65,535, rounded", lambda values: values.round().astype(np.uint16)),
}
RANGES = {"unit": (0.0, 1.0), "signed": (-1.0, 1.0), "byte": (0.0, 255.0), "deep": (0.0, 65535.0)}


class ArrayImages:
    """Images in memory or in a memory-mapped file; the item is an index.

    Args:
        images: 'n h w' or 'n h w c'.
        convert: One of CONVERSIONS, to 8 or 16 bits; None for arrays of uint8 or uint16.
    """

    def __init__(self, images: np.ndarray, convert: str | None = None) -> None:
        self.images, self.convert = images, convert
        channels = images.shape[3] if images.ndim == 4 else 1
        is_deep = convert == "deep" or images.dtype == np.uint16
        self.suffix = ".png" if channels == 1 or (channels in MODES and not is_deep) else ".npy"

    def digest(self) -> str:
        """Return a digest of up to 1,024 evenly spaced images."""
        subset = evenly_spaced(len(self.images), 1024)
        return hashlib.sha256(b"".join(self.images[item].tobytes() for item in subset)).hexdigest()

    def read(self, item: int) -> bytes:
        """Return an image, encoded as PNG or .npy."""
        image, buffer = np.ascontiguousarray(self.images[item]), io.BytesIO()
        if self.convert is not None:
            low, high = RANGES[self.convert]
            if not (np.isfinite(image).all() and low <= image.min() and image.max() <= high):
                raise BadImage(f"values outside {low:g} to {high:g}, which --convert {self.convert} takes")
            image = CONVERSIONS[self.convert][1](image)
        if self.suffix == ".npy":
            np.save(buffer, image)
        else:
            Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).save(buffer, "PNG")
        return buffer.getvalue()


def array_samples(
    images: np.ndarray,
    labels: Iterable[int] | None = None,
    numbers: Iterable[int] | None = None,
    convert: str | None = None,
) -> list[Sample]:
    """Make samples of an array 'n h w' or 'n h w c', named by `numbers` (None: 0, 1, ...).

    Raises:
        ValueError: the dtype needs a conversion and none is given, the shape is wrong, or the labels do not match.
    """
    if (
        images.ndim not in (3, 4)
        or 0 in images.shape
        or (convert is None and images.dtype not in (np.uint8, np.uint16))
    ):
        raise ValueError(
            f"an array of {images.dtype} and shape {brief(images.shape)}; images are uint8 or uint16, 'n h w' or "
            "'n h w c'."
        )
    labels = None if labels is None else list(labels)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images.")
    source = ArrayImages(images, convert)
    labels = [NO_LABEL] * len(images) if labels is None else labels
    numbers = range(len(images)) if numbers is None else numbers
    size = int(np.prod(images.shape[1:])) * (2 if convert == "deep" else 1 if convert else images.itemsize)
    return [
        Sample(f"{number:06d}", source.suffix, source, item, int(label), size)
        for item, (number, label) in enumerate(zip(numbers, labels, strict=True))
    ]
