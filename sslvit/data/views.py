"""Make the views of images: sample their boxes, sizes and colors.

A view is a box in pixels of its image, which may be mirrored and may extend beyond the image (black). Boxes are sampled
for a whole batch at once from uniform numbers keyed by (seed, epoch, sample), so a sample's views do not depend on the
process that loads it. An image is decoded once, at the resolution that its most magnified view needs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslvit import rng
from sslvit.data.augment import augment_image, sample_operations
from sslvit.data.color import color_jitter, sample_colors
from sslvit.data.resample import Boxes, crop_and_resize, resample
from sslvit.settings import RunSettings
from sslvit.settings.views import (
    AugmentSettings,
    CanvasSettings,
    CenterSettings,
    CropSettings,
    MultiCropSettings,
    SquareSettings,
    TransformSettings,
    ViewSettings,
)

ATTEMPTS = 10  # boxes to try before the fallback, as in torchvision's RandomResizedCrop
# (uniform numbers 'b columns', heights, widths, size of the view) -> boxes
BoxSampler = Callable[[np.ndarray, np.ndarray, np.ndarray, list[int]], Boxes]


class Views:
    """All views of a batch of images.

    Args:
        settings: Kind of the views and distribution of their boxes.
        size: Height and width of the encoder's input.
        interpolation: bilinear or bicubic, always antialiased.
        seed: Seed of the random numbers.
        color_here: Whether colors are changed here, in the loader; otherwise on the training device (data.color_on).
        fill: Value of each channel, from 0 to 1, for pixels from outside the image in RandAugment; None for gray.
    """

    def __init__(
        self, settings: ViewSettings, size: list[int], interpolation: str, seed: int = 0, color_here: bool = True,
        fill: list[float] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.size, self.interpolation, self.seed = settings, size, interpolation, seed
        self.color_here, self.fill = color_here, fill

    @property
    def is_exact(self) -> bool:
        """Whether images are decoded at full resolution; center views are, to match other libraries."""
        return isinstance(self.settings, CenterSettings)

    @property
    def augments(self) -> bool:
        """Whether images are augmented one by one (RandAugment)."""
        return isinstance(self.settings, AugmentSettings) and self.settings.operations > 0

    def specs(self, size: list[int] | None = None) -> list[tuple[list[int], BoxSampler]]:
        """Size and box sampler of each view; `size` replaces the encoder's size for the main views."""
        settings, size = self.settings, size or self.size
        match settings:
            case CropSettings() | AugmentSettings():
                return [(size, random_crops(settings.scale, settings.ratio, settings.flip))]
            case SquareSettings():
                return [(size, random_squares(settings.resize, settings.crop, settings.flip))]
            case CanvasSettings():
                return [(size, canvas_boxes(settings.side, settings.flip))]
            case CenterSettings():
                return [(size, center_crops(settings.fraction, settings.mode))]
            case MultiCropSettings():
                large = (size, random_crops(settings.global_scale, settings.ratio, settings.flip))
                crops = random_crops(settings.local_scale, settings.ratio, settings.flip)
                small = ([settings.local_size] * 2, crops)
                return [large, large] + [small] * settings.local_crops
            case TransformSettings():  # makes views without boxes (transform.py); sizes are known after a call
                return [(list(side), center_crops(1.0)) for side in settings.sizes]
        return settings.specs(size)  # a view from outside the package

    def sample_boxes(
        self, sides: np.ndarray, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None = None
    ) -> list[tuple[list[int], Boxes]]:
        """Sample (size, boxes) of each view of images with these heights and widths ('b 2')."""

        def uniform(key: str) -> np.ndarray:
            return by_epoch(lambda e, rows: rng.uniform((self.seed, e, key), rows, 2 * ATTEMPTS + 3), samples, epochs)

        return [
            (view_size, sample(uniform(f"view {i}" if i else "view"), sides[:, 0], sides[:, 1], view_size))
            for i, (view_size, sample) in enumerate(self.specs(size))
        ]

    def sample_colors(self, samples: np.ndarray, epochs: np.ndarray) -> list[Tensor] | None:
        """Sample the color changes of each view; None if there are none."""
        settings = self.settings
        if not isinstance(settings, MultiCropSettings):
            return None

        def colors(view: int) -> np.ndarray:
            return by_epoch(lambda e, rows: sample_colors(settings, view, (self.seed, e), rows), samples, epochs)

        return [torch.from_numpy(colors(view)) for view in range(2 + settings.local_crops)]

    def augment(self, views: list[Tensor], samples: np.ndarray, epochs: np.ndarray) -> list[Tensor]:
        """Apply RandAugment to each image, sampled from (seed, epoch, sample)."""
        settings = self.settings
        if not (isinstance(settings, AugmentSettings) and self.augments):
            return views
        operations = by_epoch(
            lambda epoch, rows: sample_operations(settings, (self.seed, epoch), rows), samples, epochs
        )
        for view in views:
            fill = self.fill or [0.5] * view.shape[1]
            for row, image in enumerate(view):
                view[row] = augment_image(image, operations[row], fill, self.interpolation)
        return views

    def crop_batch(
        self, images: Tensor, samples: np.ndarray, epochs: np.ndarray, size: list[int] | None = None
    ) -> list[Tensor]:
        """Crop views 'b c h w' of images 'b c h w', before their colors change."""
        sides = np.tile(images.shape[2:], (len(images), 1))
        return [
            resample(images, boxes, size_of_view, self.interpolation)
            for size_of_view, boxes in self.sample_boxes(sides, samples, epochs, size)
        ]

    def crop_image(
        self, image: Tensor, crops: list[tuple[list[int], Boxes]], row: int, reduction: int = 1
    ) -> list[Tensor]:
        """Crop views 'c h w' of the image in one row of the boxes sampled for a batch."""
        return [crop_and_resize(image, boxes[row], size, self.interpolation, reduction) for size, boxes in crops]


def by_epoch(make: Callable[[int, np.ndarray], np.ndarray], samples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Call make(epoch, samples) for each epoch in a batch (sources of a mixture differ); keeps the order of rows."""
    rows_of_epoch = {int(epoch): epochs == epoch for epoch in np.unique(epochs)}
    made = [(rows, make(epoch, samples[rows])) for epoch, rows in rows_of_epoch.items()]
    whole = np.empty((len(samples), *made[0][1].shape[1:]), made[0][1].dtype)
    for rows, values in made:
        whole[rows] = values
    return whole


def random_crops(scale: list[float], ratio: list[float], flip: float) -> BoxSampler:
    """Random resized crop (Szegedy et al. 2015), with torchvision's rules: the first of ten boxes that fits.

    If the largest area exceeds the image's, boxes need not fit: the area outside the image is black.
    """

    def sample(uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]) -> Boxes:
        area = np.interp(uniform[:, :ATTEMPTS], [0, 1], scale) * (heights * widths)[:, None]
        ratios = np.exp(np.interp(uniform[:, ATTEMPTS : 2 * ATTEMPTS], [0, 1], np.log(ratio)))
        width = np.round(np.sqrt(area * ratios))
        height = np.round(np.sqrt(area / ratios))
        fits = (width >= 1) & (height >= 1)
        if scale[1] <= 1:  # otherwise a box may reach outside
            fits &= (width <= widths[:, None]) & (height <= heights[:, None])
        first = np.arange(len(fits)), fits.argmax(1)
        # fallback if none fits: the largest centered box with an allowed ratio
        wide = widths / heights
        fallback_width = np.where(wide > ratio[1], np.round(heights * ratio[1]), widths)
        fallback_height = np.where(wide < ratio[0], np.round(widths / ratio[0]), heights)
        none = ~fits.any(1)
        width = np.where(none, fallback_width, width[first])
        height = np.where(none, fallback_height, height[first])
        position = uniform[:, 2 * ATTEMPTS :]
        rooms = [heights - height, widths - width]  # negative if the image is smaller than the box and moves inside it
        top, left = (
            np.where(none, room // 2, np.sign(room) * np.floor(position[:, i] * (np.abs(room) + 1)))
            for i, room in enumerate(rooms)
        )
        return Boxes(top, left, height, width, position[:, 2] < flip)

    return sample


def random_squares(resize: list[int], crop: int, flip: float) -> BoxSampler:
    """Resize the shorter side to a random length and take a random crop with the proportions of the view."""

    def sample(uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]) -> Boxes:
        resized = resize[0] + np.floor(uniform[:, 0] * (resize[1] - resize[0] + 1))
        scale = np.minimum(heights / size[0], widths / size[1]) * crop / resized
        height, width = (np.maximum(1, np.round(scale * length)) for length in size)
        top = np.floor(uniform[:, 1] * (heights - height + 1))
        left = np.floor(uniform[:, 2] * (widths - width + 1))
        return Boxes(top, left, height, width, uniform[:, 3] < flip)

    return sample


def center_crops(fraction: float, mode: str = "center") -> BoxSampler:
    """The largest centered box with the view's proportions, or the whole image, with its sides scaled by a fraction."""

    def sample(uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]) -> Boxes:
        if mode == "squash":
            height, width = heights * fraction, widths * fraction
        else:
            scale = np.minimum(heights / size[0], widths / size[1]) * fraction
            height, width = scale * size[0], scale * size[1]
        return Boxes(
            (heights - height) / 2, (widths - width) / 2, height, width, np.zeros(len(heights), bool), is_cut=False
        )

    return sample


def canvas_boxes(side: list[float], flip: float) -> BoxSampler:
    """Place the whole image on a black canvas, at a random size (in whole pixels) and position."""

    def sample(uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]) -> Boxes:
        smallest, largest = (np.round(fraction * min(size)) for fraction in side)
        length = smallest + np.floor(uniform[:, 0] * (largest - smallest + 1))
        zoom = np.maximum(heights, widths) / length  # image pixels per canvas pixel
        room = [np.round(total - pixels / zoom) for total, pixels in zip(size, (heights, widths), strict=True)]
        top, left = (np.floor(uniform[:, i + 1] * (room[i] + 1)) for i in (0, 1))
        return Boxes(-top * zoom, -left * zoom, size[0] * zoom, size[1] * zoom, uniform[:, 3] < flip)

    return sample


def jitter_views(
    views: list[Tensor], colors: list[Tensor] | None, finish: Callable[[Tensor], Tensor] = lambda pixels: pixels
) -> list[Tensor]:
    """Apply color changes, if any, and `finish` to every view; consecutive views of one size are processed together."""
    draws: list[Any] = [None] * len(views) if colors is None else colors
    changed: list[Tensor] = []
    for _, pairs in groupby(zip(views, draws, strict=True), key=lambda pair: pair[0].shape):
        same_size, theirs = zip(*pairs, strict=True)
        pixels = torch.cat(same_size) if len(same_size) > 1 else same_size[0]
        pixels = pixels if colors is None else color_jitter(pixels, torch.cat(theirs))
        changed += finish(pixels).chunk(len(same_size))
    return changed


def view_sizes(settings: RunSettings, side: int | None = None) -> list[tuple[int, int]]:
    """Height and width of each view in a run; `side` replaces the encoder's size for the main views."""
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation)
    return [(height, width) for (height, width), _ in views.specs([side] * 2 if side else None)]
