"""Images with segmentation masks: a class number for every pixel, and class frequencies for every patch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sslvit.data.decode import decode_pixels
from sslvit.data.header import BadImage, read_header
from sslvit.data.overlap import stored_files
from sslvit.data.views import center_crops
from sslvit.files import printable
from sslvit.progress import track
from sslvit.settings import EncoderSettings

logger = logging.getLogger(__name__)

IGNORED = 255  # in a mask: a pixel without a label
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # by which PIL multiplies the numbers of PNGs with 2 and 4 bits per pixel
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass
class MaskedImages:
    """Images with a class number for every pixel: images/ and masks/ in a folder."""

    folder: Path
    images: list[Path]
    masks: list[Path]

    @classmethod
    def open(cls, folder: str | Path) -> MaskedImages:
        """Find the pairs in a folder: images/NAME.jpg (or .png, .webp, .bmp) with masks/NAME.png.

        Raises:
            FileNotFoundError: no such folders.
            ValueError: no images, or images without a mask.
        """
        folder = Path(folder)
        for name in ("images", "masks"):
            if not (folder / name).is_dir():
                raise FileNotFoundError(
                    f"{folder / name}: no such folder. Put NAME.jpg in images/, NAME.png in masks/."
                )
        images = sorted(file for file in (folder / "images").iterdir() if file.suffix.lower() in SUFFIXES)
        masks = [folder / "masks" / f"{file.stem}.png" for file in images]
        if not images:
            raise ValueError(f"{folder / 'images'}: holds no images ({', '.join(SUFFIXES)}).")
        missing = [mask.name for mask in masks if not mask.is_file()]
        if missing:
            raise ValueError(f"{folder / 'masks'}: {len(missing)} masks are missing, the first: {missing[0]}.")
        alone = sorted(set((folder / "masks").glob("*.png")) - set(masks))
        if alone:
            logger.warning(
                f"{folder / 'masks'}: {len(alone)} masks have no image in images/ ({', '.join(SUFFIXES)}) and are left "
                f"out, the first: {printable(alone[0].name)}"
            )
        return cls(folder, images, masks)

    def __len__(self) -> int:
        return len(self.images)

    def is_same(self, other: MaskedImages) -> bool:
        """Whether all images have the same bytes, in the same order."""
        one, two = stored_files(self.images), stored_files(other.images)
        return np.array_equal(one.sizes, two.sizes) and all(one.read(n) == two.read(n) for n in range(len(self)))

    def read(self, number: int, settings: EncoderSettings) -> tuple[Tensor, np.ndarray]:
        """The encoder's view of an image ('c h w', uint8) and of its mask ('h w'), at the encoder's size."""
        size = (settings.image_size[1], settings.image_size[0])
        mask = self._mask(number)
        box = view_box(mask, settings)
        pixels = self._image(number, mask.size, settings.channels).resize(size, RESAMPLING[settings.interpolation], box)
        classes = np.array(mask.resize(size, Image.Resampling.NEAREST, box))
        values = np.atleast_3d(np.asarray(pixels))
        return torch.from_numpy(values.copy()).permute(2, 0, 1), classes.astype(np.int64)

    def count_labeled(self, number: int, settings: EncoderSettings) -> tuple[int, int]:
        """Number of labeled pixels of a mask: those in the encoder's view, and all."""
        mask = self._mask(number)
        left, top, right, bottom = view_box(mask, settings)
        is_labeled = np.array(mask) != IGNORED
        rows, columns = (np.arange(length) + 0.5 for length in is_labeled.shape)
        is_seen = np.outer((rows > top) & (rows < bottom), (columns > left) & (columns < right))
        return int((is_labeled & is_seen).sum()), int(is_labeled.sum())

    def _mask(self, number: int) -> Image.Image:
        try:
            with Image.open(self.masks[number], formats=("PNG",)) as mask:
                if mask.mode not in ("L", "P", "1", "I;16", "I"):
                    raise ValueError(
                        f"{self.masks[number]}: a mask of mode {mask.mode}. Expected one number per pixel."
                    )
                step = next((GRAY_STEPS.get(str(tile[3]), 1) for tile in mask.tile), 1)
                mask.load()
                return mask if step == 1 else mask.point([value // step for value in range(256)])
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.masks[number]}: unreadable ({error}).") from error

    def _image(self, number: int, size: tuple[int, int], channels: int) -> Image.Image:
        """An image, upright or as stored, whichever has the size of its mask."""
        content = self.images[number].read_bytes()
        try:
            headers = [read_header(content, upright=upright) for upright in (True, False)]
            header = next((header for header in headers if (header.width, header.height) == size), None)
            if header is None:
                sides = (headers[0].width, headers[0].height)
                raise ValueError(f"{self.masks[number]}: {size} pixels, but its image has {sides}.")
            pixels = decode_pixels(content, channels, header=header)
        except BadImage as error:
            raise ValueError(f"{self.images[number]}: unreadable ({error}).") from error
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def view_box(image: Image.Image, settings: EncoderSettings) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the encoder's view of an image, in pixels of the image."""
    crop = center_crops(settings.crop_fraction, settings.crop_mode)
    box = crop(np.empty((1, 0)), np.array([image.height]), np.array([image.width]), settings.image_size)
    left, top = float(box.left[0]), float(box.top[0])
    right, bottom = min(left + float(box.width[0]), image.width), min(top + float(box.height[0]), image.height)
    return max(left, 0.0), max(top, 0.0), right, bottom


@dataclass
class MaskSummary:
    """Classes and labeled pixels of a folder's masks in the encoder's views.

    Args:
        classes: class numbers that occur, sorted.
        labeled: numbers of the images with labeled pixels.
        coverage: fraction of all labeled pixels that lie in the views.
    """

    classes: np.ndarray
    labeled: np.ndarray
    coverage: float


def summarize_masks(data: MaskedImages, settings: EncoderSettings) -> MaskSummary:
    """Read every image and mask once, so that all are known to be readable."""
    classes: set[int] = set()
    labeled, seen, total = [], 0, 0
    for number in track(range(len(data)), "reading masks", len(data)):
        of_image = set(np.unique(data.read(number, settings)[1]).tolist()) - {IGNORED}
        labeled += [number] if of_image else []
        classes |= of_image
        counts = data.count_labeled(number, settings)
        seen, total = seen + counts[0], total + counts[1]
    return MaskSummary(np.array(sorted(classes)), np.array(labeled, int), seen / max(total, 1))


def class_indices(masks: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Indices into the list of classes for every pixel of a mask; -1 for pixels without a label."""
    index = np.searchsorted(classes, masks).clip(max=len(classes) - 1)
    return np.where(classes[index] == masks, index, -1)


def patch_targets(
    masks: np.ndarray, classes: np.ndarray, grid: tuple[int, int]
) -> tuple[Float[Tensor, "n classes"], Float[Tensor, "n"]]:
    """For every patch the class frequencies of its labeled pixels, and the fraction of its pixels that are labeled."""
    indices = torch.from_numpy(class_indices(masks, classes))
    one_hot = torch.stack([(indices == i).float() for i in range(len(classes))], 1)  # b classes h w
    counts = rearrange(F.adaptive_avg_pool2d(one_hot, grid), "b classes rows columns -> (b rows columns) classes")
    labeled = counts.sum(1)
    return counts / labeled.clamp(min=1e-12)[:, None], labeled
