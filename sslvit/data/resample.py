"""A box of an image -> pixels of a view, antialiased."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_SIDE = 96  # images up to this side are kept decoded and resampled a batch at a time
AT_ONCE = 128  # images that are resampled together: what they need fits the processor's cache
FLOATS_AT_ONCE = 2**24  # pixels of images that are floats at the same time
TABLE_BYTES = 64 * 2**20  # boxes at whole pixels of small images have their weights in a table up to this size


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

    def reduced(self, reduction: int) -> Boxes:
        """The same boxes in an image whose sides were divided."""
        sides = (values / reduction for values in (self.top, self.left, self.height, self.width))
        return Boxes(*sides, self.is_mirrored)

    def zoom(self, size: list[int]) -> np.ndarray:
        """Image pixels per view pixel, along the axis where they are fewer."""
        return np.minimum(self.height / size[0], self.width / size[1])


def view_of_one(image: Tensor, box: Boxes, size: list[int], interpolation: str, reduction: int = 1) -> Tensor:
    """A view 'c h w' of one image 'c h w'.

    Args:
        image: uint8, or float in the same units.
        box: in pixels of the image before it was reduced.
        size: height and width of the view.
        interpolation: bilinear or bicubic.
        reduction: that the image was decoded at.
    """
    height, width = image.shape[1:]
    box = box.reduced(reduction)
    top, left, tall, wide = (int(values[0].round()) for values in (box.top, box.left, box.height, box.width))
    is_inside = top >= 0 and left >= 0 and top + tall <= height + 1 and left + wide <= width + 1  # 1: of rounding
    if max(height, width) <= SMALL_SIDE or not is_inside:  # small ones: the same arithmetic as for a whole batch
        return resample(image[None], box, size, interpolation)[0]
    part = image[None, :, top : top + tall, left : left + wide].contiguous(memory_format=torch.channels_last)
    view = F.interpolate(part, size=size, mode=interpolation, antialias=True)[0]
    if view.is_floating_point():
        view.clamp_(0, 255)  # bicubic weights overshoot
    return view.flip(2) if box.is_mirrored[0] else view


def resample(images: Tensor, boxes: Boxes, size: list[int], interpolation: str) -> Tensor:
    """Boxes of equally large images, as two matrix products per image.

    Resampling is separable and linear, so a box, its mirror image and the black around an image are all a matrix
    of rows and one of columns.

    Args:
        images: uint8, or float in the same units, 'b c h w'.
        boxes: one per image; pixels outside the image are black.
        size: of the result.
        interpolation: bilinear or bicubic.
    """
    b, c, h, w = images.shape
    rows = _weights(h, boxes.top, boxes.height, size[0], interpolation)
    columns = _weights(w, boxes.left, boxes.width, size[1], interpolation, boxes.is_mirrored)
    views = torch.empty(b, c, *size, dtype=images.dtype)
    for start in range(0, b, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        view = rows[some, None] @ _along_columns(images[some], columns[some])
        if images.dtype == torch.uint8:
            view = view.round_().to(torch.int16)  # twice as fast as from float to uint8 in one step
        views[some] = view.clamp_(0, 255)
    return views


def _along_columns(images: Tensor, columns: Tensor) -> Tensor:
    """Images 'b c h w' times 'b width w': 'b c h width'. A large image is turned to floats some rows at a time."""
    b, c, h, w = images.shape
    at_once = max(1, FLOATS_AT_ONCE // (b * c * w))
    parts = []
    for start in range(0, h, at_once):
        part = images[:, :, start : start + at_once].float()
        parts.append(torch.bmm(part.reshape(b, -1, w), columns.transpose(1, 2)).view(b, c, -1, columns.shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _weights(
    length: int, start: np.ndarray, extent: np.ndarray, out: int, interpolation: str,
    is_mirrored: np.ndarray | None = None,
) -> Tensor:  # fmt: skip
    """(b, out, length): how much of each input pixel goes into each output pixel, along one axis.

    Columns (`is_mirrored` given) lie transposed in memory: a batched product of a view that does not is ten times
    slower.
    """
    is_whole = length * (length + 1) // 2 * out * length * 4 <= TABLE_BYTES and bool(
        ((start >= 0) & (start + extent <= length) & (start % 1 == 0) & (extent % 1 == 0) & (extent >= 1)).all()
    )
    if is_whole:
        row = torch.from_numpy((start * (length + 1) + extent).astype(np.int64))
        if is_mirrored is None:
            places, table = _table(length, out, interpolation, False)
            return table.index_select(0, places[row])
        places, table = _table(length, out, interpolation, True)
        return table.index_select(0, places[row] * 2 + torch.from_numpy(is_mirrored)).transpose(1, 2)
    weights = _compute_weights(length, start, extent, out, interpolation)
    if is_mirrored is None:
        return weights
    chosen = torch.from_numpy(is_mirrored)
    weights[chosen] = weights[chosen].flip(1)
    return weights.transpose(1, 2).contiguous().transpose(1, 2)


@lru_cache(maxsize=8)
def _table(length: int, out: int, interpolation: str, is_columns: bool) -> tuple[Tensor, Tensor]:
    """Weights of every box at whole pixels: their row by start * (length + 1) + extent, and the weights.

    For columns each row is followed by its mirror image, and both are transposed.
    """
    starts, extents = (v.ravel() for v in np.meshgrid(np.arange(length), np.arange(1, length + 1), indexing="ij"))
    fits = starts + extents <= length
    starts, extents = starts[fits], extents[fits]
    places = torch.zeros(length * (length + 1) + 1, dtype=torch.int64)
    places[torch.from_numpy(starts * (length + 1) + extents)] = torch.arange(len(starts))
    table = _compute_weights(length, starts, extents, out, interpolation)
    if is_columns:
        table = torch.stack([table, table.flip(1)], 1).flatten(0, 1).transpose(1, 2).contiguous()
    return places, table


def _compute_weights(length: int, start: np.ndarray, extent: np.ndarray, out: int, interpolation: str) -> Tensor:
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
    """Pixels (0 to 255) -> float32 in units of the channel's deviation, on the view's device."""
    scale = 1 / (torch.tensor(std, device=view.device).view(-1, 1, 1) * 255)
    shift = -255 * torch.tensor(mean, device=view.device).view(-1, 1, 1) * scale
    return view.to(torch.float32, copy=True).mul_(scale).add_(shift)
