"""Preprocess images from Python (paths, PIL images, arrays) as evaluation does."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sslvit.data.array_images import ArrayImages
from sslvit.data.decode import as_uint16
from sslvit.data.header import BadImage
from sslvit.data.loader import normalize_view, view_of_image
from sslvit.files import brief, expand_path, printable
from sslvit.settings import EncoderSettings

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
AS_TIFF = {"CMYK", "YCbCr", "LAB"}  # modes that PNG does not support
AS_OTHER = {"HSV": "RGB", "RGBX": "RGB", "RGBa": "RGBA", "PA": "RGBA", "La": "LA"}  # modes that no file format supports
FLOATS = (
    "holds {}, and nothing says which value is white. Give 8 or 16 bits, such as (image * 255).round().astype('uint8') "
    "for values from 0 to 1."
)


def preprocess(images: ImageLike | Sequence[ImageLike], encoder: EncoderSettings) -> Tensor:
    """Preprocess images as evaluation does: upright, cropped, resized, in the encoder's channels, normalized.

    Args:
        images: One image or several: paths, PIL images, or arrays 'h w' or 'h w c' of 8 or 16 bits.
        encoder: Settings of the encoder.

    Returns:
        Images 'b c h w'.

    Raises:
        ValueError: not such an image, or floating-point values, whose range is unknown.
        FileNotFoundError: a file does not exist.
    """
    several = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    if not several:
        raise ValueError("no images given.")
    batch = []
    for number, image in enumerate(several):
        name = printable(image) if isinstance(image, (str, os.PathLike)) else f"image {number}"
        try:
            view = view_of_image(encoded(image), encoder)
        except BadImage as error:
            raise ValueError(f"{name}: {error}") from error
        batch.append(normalize_view(view[None], encoder))
    return torch.cat(batch)


def encoded(image: ImageLike) -> bytes:
    """Encode an image losslessly as the bytes of a file.

    Raises:
        BadImage: not a supported image.
    """
    if isinstance(image, (str, os.PathLike)):
        return Path(expand_path(image)).read_bytes()
    if isinstance(image, Image.Image):
        return _encoded_picture(image)
    if not isinstance(image, np.ndarray):
        raise BadImage(f"a {type(image).__name__}. Give a path, a PIL image or an array 'h w c' (tensor.numpy()).")
    if image.dtype.kind == "f":
        raise BadImage(FLOATS.format(f"{image.dtype} values"))
    if image.ndim not in (2, 3) or 0 in image.shape or image.dtype not in (np.uint8, np.uint16):
        raise BadImage(
            f"an array of {image.dtype} and shape {brief(image.shape)}; an image is uint8 or uint16, 'h w' or 'h w c', "
            "and several are a list."
        )
    return ArrayImages(image[None]).read(0)


def _encoded_picture(image: Image.Image) -> bytes:
    if image.mode == "F":
        raise BadImage(FLOATS.format("floating-point values (mode F)"))
    upright, buffer = ImageOps.exif_transpose(image), io.BytesIO()
    if upright.mode.startswith("I"):  # 16 bits, or 32-bit values that may fit 16 bits
        return ArrayImages(as_uint16(np.asarray(upright))[None]).read(0)
    if upright.mode in AS_OTHER:
        upright = upright.convert(AS_OTHER[upright.mode])
    if upright.mode in AS_TIFF:
        upright.save(buffer, "TIFF")
    else:
        upright.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
