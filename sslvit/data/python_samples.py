"""Images (decoded or not) and labels from the samples of a data set given from Python.

An image is a PIL image, an array 'h w' or 'h w c', or a tensor 'h w' or 'c h w', with 8 or 16 bits or with
floating-point values from 0 to 1, which are rounded to 8 bits. A sample is an image, a tuple (image, label, ...) or a
dict.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvit.data.array_images import CONVERSIONS
from sslvit.data.header import MAX_AXIS_OF_CHANNELS, MODES, BadImage, Content, is_channels_first
from sslvit.data.labels import LABEL_NAMES
from sslvit.files import brief, printable

IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values", "pixels")  # keys of the image in a dict
FLOAT_MARGIN = 1e-3  # tolerance around [0, 1], for float32 rounding errors


class Samples:
    """Reads the samples of a data set by number.

    Args:
        dataset: The user's map-style data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.kind = dataset, type(dataset).__name__

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, item: int) -> tuple[Content, Any]:
        """Return the image of a sample, and its label or None.

        Raises:
            BadImage: the data set raises an exception or gives something that is not an image.
        """
        try:
            sample = self.dataset[item]
        except MemoryError:
            raise  # a problem of the machine, not of the sample
        except Exception as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
        image, label = image_and_label(sample)
        return as_content(image), label


def image_and_label(sample: Any) -> tuple[Any, Any]:
    """The image of a sample, and its label or None.

    Raises:
        BadImage: a dict without an image.
    """
    if isinstance(sample, Mapping):
        image = next((name for name in IMAGE_NAMES if name in sample), None)
        image = image or next((name for name, value in sample.items() if is_image(value)), None)
        if image is None:
            raise BadImage(f"a dict without an image (it has {', '.join(map(str, sample))}; name it image)")
        label = next((name for name in LABEL_NAMES if name in sample), None)
        return sample[image], None if label is None else sample[label]
    if isinstance(sample, (tuple, list)) and sample:
        return sample[0], sample[1] if len(sample) > 1 else None
    return sample, None


def is_image(value: Any) -> bool:
    """Whether a value in a dict may be the image."""
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim in (2, 3))


def as_content(image: Any) -> Content:
    """Convert an image to a form that `read_header` and `decode` accept.

    Raises:
        BadImage: not an image, or its values are not valid pixels.
    """
    if isinstance(image, Image.Image):
        try:
            image.load()  # this rotates a TIFF upright and updates its orientation
        except MemoryError:
            raise
        except Exception as error:  # PIL raises whatever its format plugins raise
            raise BadImage(f"damaged image ({error})") from error
        return image
    if isinstance(image, Mapping) and {"bytes", "path"} <= image.keys():  # an undecoded Hugging Face image
        return image["bytes"] if image["bytes"] is not None else read_file(image["path"])
    if isinstance(image, Tensor):
        return of_array(pixels_of_tensor(image))
    if isinstance(image, np.ndarray):
        return of_array(pixels_of_array(image))
    raise BadImage(f"a {type(image).__name__}, and not an image: a PIL image, an array 'h w c' or a tensor 'c h w'")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of an image file.

    Raises:
        BadImage: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{printable(path)}: {error.strerror or error}") from error


def pixels_of_tensor(image: Tensor) -> np.ndarray:
    """Convert a tensor 'h w' or 'c h w' to an array 'h w' or 'h w c' of 8 or 16 bits."""
    image = image.detach().cpu()
    shape = tuple(image.shape)
    if len(shape) == 3 and shape[2] <= MAX_AXIS_OF_CHANNELS < min(shape[:2]):
        raise BadImage(f"a tensor of shape {brief(shape)}: a tensor is 'c h w', an array is 'h w c'")
    if image.dtype in (torch.bfloat16, torch.float16):
        image = image.float()
    array = image.numpy()
    return in_pixels(array.transpose(1, 2, 0) if array.ndim == 3 else array, f"a tensor of {image.dtype}", shape)


def pixels_of_array(image: np.ndarray) -> np.ndarray:
    """Convert an array 'h w' or 'h w c' to 8 or 16 bits."""
    shape = image.shape
    if len(shape) == 3 and is_channels_first(shape):
        raise BadImage(f"an array of shape {brief(shape)}: an array is 'h w c', a tensor is 'c h w'")
    return in_pixels(image, f"an array of {image.dtype}", shape)


def in_pixels(image: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Check pixels of 8 or 16 bits, and convert floating-point values from 0 to 1 to 8 bits.

    Raises:
        BadImage: wrong shape or dtype, or floating-point values outside [0, 1].
    """
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise BadImage(f"{kind} and shape {brief(shape)}; an image has two or three axes")
    if image.dtype in (np.uint8, np.uint16):
        return image
    if image.dtype.kind != "f":
        raise BadImage(f"{kind}; pixels are uint8, uint16, or floating-point numbers from 0 to 1")
    low, high = float(image.min()), float(image.max())
    if not (low >= -FLOAT_MARGIN and high <= 1 + FLOAT_MARGIN):  # also true for NaN
        raise BadImage(
            f"{kind} with values from {low:.3g} to {high:.3g}; floating-point pixels are from 0 to 1 (leave a "
            "normalization out: the encoder's own is encoder.mean and encoder.std)"
        )
    return CONVERSIONS["unit"][1](image.clip(0, 1))


def of_array(image: np.ndarray) -> Content:
    """Convert pixels 'h w' or 'h w c' to a PIL image if possible, otherwise copy the array, as packing does."""
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim == 2 or (image.shape[2] in MODES and image.dtype == np.uint8):
        return Image.fromarray(np.ascontiguousarray(image))
    return np.array(image)  # copied, since the user's array may change later or be read-only
