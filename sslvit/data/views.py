"""Image -> view: which box of the image is seen, and the box resampled to the encoder's size.

A view is a box in pixels of its image (it may reach outside: black) and whether it is mirrored. Boxes are drawn
for a whole batch at once from uniform numbers keyed by (seed, epoch, sample), so a sample's view does not depend
on who loads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslvit.chance import uniform_at
from sslvit.settings import ViewSettings

SMALL_SIDE = 96  # images up to this side are kept decoded and resampled a batch at a time
TRIES = 10  # boxes drawn before the fallback, as in torchvision's RandomResizedCrop


@dataclass
class Boxes:
    """What is seen of each image, in its pixels; all arrays have one entry per image."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    is_mirrored: np.ndarray

    def __getitem__(self, i: int) -> Boxes:
        return Boxes(*(values[i : i + 1] for values in vars(self).values()))


class View:
    """One view per image, all of one size.

    Args:
        settings: how boxes are drawn.
        size: height and width of the view.
        interpolation: bilinear or bicubic, always antialiased.
        seed: of the draws.
    """

    def __init__(self, settings: ViewSettings, size: list[int], interpolation: str, seed: int = 0) -> None:
        self.settings, self.size, self.interpolation, self.seed = settings, size, interpolation, seed
        self.draw = {"crop": random_crops, "centre": centre_crops, "canvas": canvas_places}[settings.kind]

    def __call__(self, images: Tensor | list[Tensor], samples: np.ndarray, epoch: int) -> Tensor:
        """uint8 'b c h w' of the view's size."""
        if isinstance(images, Tensor):
            sides = np.tile(images.shape[2:], (len(images), 1))
        else:
            sides = np.array([image.shape[1:] for image in images])
        uniform = uniform_at((self.seed, epoch, "view"), samples, 2 * TRIES + 3)
        boxes = self.draw(self.settings, uniform, sides[:, 0], sides[:, 1], self.size)
        if isinstance(images, Tensor):
            return resample(images, boxes, self.size, self.interpolation)
        return torch.cat([self._one(image, boxes[i]) for i, image in enumerate(images)])

    def _one(self, image: Tensor, box: Boxes) -> Tensor:
        top, left, height, width = (
            int(values[0]) for values in (box.top.round(), box.left.round(), box.height.round(), box.width.round())
        )
        is_small = max(image.shape[1:]) <= SMALL_SIDE  # the same arithmetic as for a whole batch of them
        if is_small or top < 0 or left < 0 or top + height > image.shape[1] or left + width > image.shape[2]:
            return resample(image[None], box, self.size, self.interpolation)
        part = image[None, :, top : top + height, left : left + width]
        view = F.interpolate(part, size=self.size, mode=self.interpolation, antialias=True)
        return view.flip(3) if box.is_mirrored[0] else view


def random_crops(
    settings: ViewSettings, uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]
) -> Boxes:
    """Random resized crop (Szegedy et al. 2015), with torchvision's rules: the first of ten boxes that fits."""
    area = np.interp(uniform[:, :TRIES], [0, 1], settings.scale) * (heights * widths)[:, None]
    ratio = np.exp(np.interp(uniform[:, TRIES : 2 * TRIES], [0, 1], np.log(settings.ratio)))
    width = np.round(np.sqrt(area * ratio))
    height = np.round(np.sqrt(area / ratio))
    fits = (width >= 1) & (height >= 1) & (width <= widths[:, None]) & (height <= heights[:, None])
    first = np.arange(len(fits)), fits.argmax(1)
    # none fits: the largest centred box whose ratio is allowed
    wide = widths / heights
    fallback_width = np.where(wide > settings.ratio[1], np.round(heights * settings.ratio[1]), widths)
    fallback_height = np.where(wide < settings.ratio[0], np.round(widths / settings.ratio[0]), heights)
    none = ~fits.any(1)
    width = np.where(none, fallback_width, width[first])
    height = np.where(none, fallback_height, height[first])
    place = uniform[:, 2 * TRIES :]
    top = np.where(none, (heights - height) // 2, np.floor(place[:, 0] * (heights - height + 1)))
    left = np.where(none, (widths - width) // 2, np.floor(place[:, 1] * (widths - width + 1)))
    return Boxes(top, left, height, width, place[:, 2] < settings.flip)


def centre_crops(
    settings: ViewSettings, uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]
) -> Boxes:
    """The largest centred box of the view's shape, shrunk to centre_fraction of its sides."""
    scale = np.minimum(heights / size[0], widths / size[1]) * settings.centre_fraction
    height, width = scale * size[0], scale * size[1]
    return Boxes((heights - height) / 2, (widths - width) / 2, height, width, np.zeros(len(heights), bool))


def canvas_places(
    settings: ViewSettings, uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: list[int]
) -> Boxes:
    """The whole image at a random size (whole pixels) and place on a black canvas."""
    least, most = (np.round(side * min(size)) for side in settings.scale)
    side = least + np.floor(uniform[:, 0] * (most - least + 1))
    zoom = np.maximum(heights, widths) / side  # image pixels per canvas pixel
    room = [np.round(length - pixels / zoom) for length, pixels in zip(size, (heights, widths), strict=True)]
    top, left = (np.floor(uniform[:, i + 1] * (room[i] + 1)) for i in (0, 1))
    is_mirrored = uniform[:, 3] < settings.flip
    return Boxes(-top * zoom, -left * zoom, size[0] * zoom, size[1] * zoom, is_mirrored)


def resample(images: Tensor, boxes: Boxes, size: list[int], interpolation: str) -> Tensor:
    """Boxes of equally large images, antialiased, as two matrix products per image.

    Resampling is separable and linear, so a box, its mirror image and the black around an image are all a matrix
    of rows and one of columns.

    Args:
        images: uint8 'b c h w'.
        boxes: one per image; pixels outside the image are black.
        size: of the result.
        interpolation: bilinear or bicubic.
    """
    rows = _weights(images.shape[2], boxes.top, boxes.height, size[0], interpolation)
    columns = _weights(images.shape[3], boxes.left, boxes.width, size[1], interpolation)
    is_mirrored = torch.from_numpy(boxes.is_mirrored)
    columns[is_mirrored] = columns[is_mirrored].flip(1)
    pixels = rearrange(images.float(), "b c h w -> b h (c w)")
    pixels = rearrange(rows @ pixels, "b rows (c w) -> b (rows c) w", c=images.shape[1])
    pixels = pixels @ columns.transpose(1, 2).contiguous()  # a batched product of a transposed view is 10x slower
    views = rearrange(pixels, "b (rows c) cols -> b c rows cols", c=images.shape[1])
    return views.round_().clamp_(0, 255).to(torch.uint8).contiguous()


def _weights(length: int, start: np.ndarray, extent: np.ndarray, out: int, interpolation: str) -> Tensor:
    """(b, out, length): how much of each input pixel goes into each output pixel, along one axis."""
    start, extent = (torch.from_numpy(np.asarray(v, np.float32))[:, None, None] for v in (start, extent))
    scale = extent / out
    centre = start + (torch.arange(out)[:, None] + 0.5) * scale
    pixel = torch.arange(length) + 0.5
    distance = (pixel - centre).abs_() / scale.clamp(min=1)  # shrinking widens the filter: antialiasing
    if interpolation == "bilinear":
        weight = 1 - distance.clamp_(max=1)
    else:  # Keys' cubic with a = -0.5, the antialiased one of PIL and torch
        distance.clamp_(max=2)
        near = ((1.5 * distance - 2.5) * distance * distance).add_(1)
        far = (((2.5 - 0.5 * distance) * distance - 4) * distance).add_(2)
        weight = torch.where(distance < 1, near, far)
    # only pixels of the box take part, as if it had been cut out first
    weight *= (pixel > start) & (pixel < start + extent)
    total = weight.sum(2, keepdim=True)
    is_black = (centre < 0) | (centre > length) | (total == 0)
    return (weight / total).masked_fill_(is_black, 0)


def normalise(view: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 -> float32 in units of the channel's deviation, on the view's device."""
    centre = torch.tensor(mean, device=view.device).view(-1, 1, 1) * 255
    spread = torch.tensor(std, device=view.device).view(-1, 1, 1) * 255
    return (view.float() - centre) / spread
