"""Resample boxes of images to views, with antialiasing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SMALL_SIDE = 96  # images up to this side are decoded once and resampled in batches
CHUNK_IMAGES = 128  # images resampled together, so that the working set fits the CPU cache
CHUNK_FLOATS = 2**24  # pixels converted to floats at a time
SUPPORT = {"bilinear": 1, "bicubic": 2}  # filter radius in pixels
MAX_TABLE_BYTES = 64 * 2**20  # maximum size of a table of weights for boxes at whole pixels of small images
MAX_TABLES_BYTES = 512 * 2**20  # of all cached tables; the least recently used are dropped first


@dataclass
class Boxes:
    """The box of each image that a view shows, in pixels; all arrays have one entry per image.

    Args:
        top: First row. Boxes need not be aligned to whole pixels.
        left: First column.
        height: Number of rows.
        width: Number of columns.
        is_mirrored: Whether left and right are swapped.
        is_cut: Whether pixels outside a box are ignored, as if it had been cropped first (random crops); otherwise
            they contribute at its border, as in PIL's resize with a box (center views).
    """

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    is_mirrored: np.ndarray
    is_cut: bool = True

    def __getitem__(self, i: int) -> Boxes:
        one = slice(i, i + 1)
        return Boxes(
            self.top[one], self.left[one], self.height[one], self.width[one], self.is_mirrored[one], self.is_cut
        )

    def reduced(self, reduction: int) -> Boxes:
        """The same boxes for an image whose sides were divided by `reduction`."""
        sides = {name: getattr(self, name) / reduction for name in ("top", "left", "height", "width")}
        return replace(self, **sides)

    def placed(self, sides: Sequence[int], size: list[int]) -> PlacedBoxes:
        """Convert the boxes for a device, for views of `size` from images with these `sides` (height, width)."""
        numbers = np.stack([self.top, self.left, self.height, self.width, self.is_mirrored]).astype(np.float32)
        spans = ((self.top, self.height), (self.left, self.width))
        in_table = tuple(
            length * (length + 1) // 2 * out * length * 4 <= MAX_TABLE_BYTES and self._is_whole(start, extent, length)
            for (start, extent), length, out in zip(spans, sides, size, strict=True)
        )
        return PlacedBoxes(torch.from_numpy(numbers), self.is_cut, in_table)

    def _is_whole(self, start: np.ndarray, extent: np.ndarray, length: int) -> bool:
        """Whether all boxes are aligned to whole pixels and lie inside the images, along one axis."""
        is_inside = (start >= 0) & (start + extent <= length) & (start % 1 == 0) & (extent % 1 == 0) & (extent >= 1)
        return bool(is_inside.all() and (self.is_cut or (extent == length).all()))

    def zoom(self, size: list[int]) -> np.ndarray:
        """Image pixels per view pixel, the minimum over both axes."""
        return np.minimum(self.height / size[0], self.width / size[1])


@dataclass
class PlacedBoxes:
    """Boxes in the form that the device needs.

    Args:
        numbers: float32 '5 b': top, left, height, width, and 1 for mirrored boxes.
        is_cut: As in `Boxes`.
        in_table: Whether the weights of all boxes can be taken from a table, for rows and for columns.
    """

    numbers: Tensor
    is_cut: bool
    in_table: tuple[bool, ...]


class WeightTables:
    """Cached weights of all boxes at whole pixels of small images, on one device.

    Each resolution of the views needs two tables. The least recently used are dropped first.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.kept: dict[tuple, tuple[Tensor, ...]] = {}  # by arguments of _make_table, least recently used first

    def get(self, length: int, out: int, interpolation: str, is_columns: bool) -> tuple[Tensor, ...]:
        """The index of boxes in the table, and the table; see `_make_table`."""
        key = (length, out, interpolation, is_columns)
        tables = self.kept.pop(key, None) or tuple(made.to(self.device) for made in _make_table(*key))
        self.kept[key] = tables
        while len(self.kept) > 1 and self.nbytes > MAX_TABLES_BYTES:
            del self.kept[next(iter(self.kept))]
        return tables

    @property
    def nbytes(self) -> int:
        """Size of all tables."""
        return sum(table.nbytes for tables in self.kept.values() for table in tables)


_tables = WeightTables()


def crop_and_resize(image: Tensor, box: Boxes, size: list[int], interpolation: str, reduction: int = 1) -> Tensor:
    """Make a view 'c h w' of one image 'c h w'.

    Args:
        image: uint8, or float in the same units.
        box: Box in pixels of the image at full resolution.
        size: Height and width of the view.
        interpolation: bilinear or bicubic.
        reduction: Reduction at which the image was decoded.
    """
    height, width = image.shape[1:]
    box = box.reduced(reduction)
    if max(height, width) <= SMALL_SIDE:  # the same arithmetic as for a whole batch
        return resample(image[None], box, size, interpolation)[0]
    sides = [float(values[0]) for values in (box.top, box.left, box.height, box.width)]
    top, left, tall, wide = (round(side) for side in sides)
    is_inside = min(sides[:2]) > -1e-6 and sides[0] + sides[2] < height + 1e-6 and sides[1] + sides[3] < width + 1e-6
    is_between_pixels = max(abs(side - round(side)) for side in sides) > 1e-6
    if not is_inside:
        return resample(image[None], box, size, interpolation)[0]
    if is_between_pixels or not (box.is_cut or (tall, wide) == (height, width)):
        view = _resize_by_pil(image, sides, box.is_cut, size, interpolation)
    else:
        view = _resize_by_torch(image[:, top : top + tall, left : left + wide], size, interpolation)
    if view.is_floating_point():
        view.clamp_(0, 255)  # bicubic weights overshoot
    return view.flip(2) if box.is_mirrored[0] else view


def _resize_by_torch(image: Tensor, size: list[int], interpolation: str) -> Tensor:
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=size, mode=interpolation, antialias=True)[0]


def _resize_by_pil(image: Tensor, sides: list[float], is_cut: bool, size: list[int], interpolation: str) -> Tensor:
    """Resize a box inside a large image 'c h w', at any position, with PIL.

    An axis that the box covers completely is resized by torch first, which is faster and gives the same result.

    `sides` are top, left, height and width, in pixels or between them.
    """
    starts, ends, hull = sides[:2], [sides[axis] + sides[2 + axis] for axis in (0, 1)], []
    for axis in (0, 1):
        length = image.shape[1 + axis]
        starts[axis], ends[axis] = max(starts[axis], 0.0), min(ends[axis], length)  # rounding errors
        if starts[axis] < 1e-6 and ends[axis] > length - 1e-6:
            between = list(image.shape[1:])
            between[axis] = size[axis]
            image = _resize_by_torch(image, between, interpolation)
            starts[axis], ends[axis] = 0.0, float(size[axis])
        margin = 0 if is_cut else SUPPORT[interpolation] * max((ends[axis] - starts[axis]) / size[axis], 1) + 1
        first = max(math.floor(starts[axis] - margin), 0)
        hull.append(slice(first, min(math.ceil(ends[axis] + margin), image.shape[1 + axis])))
        starts[axis], ends[axis] = starts[axis] - first, ends[axis] - first
    pixels = image[:, hull[0], hull[1]].permute(1, 2, 0)
    is_color = pixels.shape[2] == 3 and pixels.dtype == torch.uint8
    planes = [pixels] if is_color else pixels.unbind(2)  # other multi-channel images are resized by channel
    box, resampling = (starts[1], starts[0], ends[1], ends[0]), Image.Resampling[interpolation.upper()]
    seen = [Image.fromarray(plane.contiguous().numpy()).resize((size[1], size[0]), resampling, box) for plane in planes]
    view = np.array(seen[0]) if is_color else np.stack([np.asarray(plane) for plane in seen], 2)
    return torch.from_numpy(view).permute(2, 0, 1)


def resample(images: Tensor, boxes: Boxes, size: list[int], interpolation: str) -> Tensor:
    """Resample boxes of images 'b c h w' on the CPU (uint8, or float in the same units); see `resample_placed`."""
    return resample_placed(images, boxes.placed(images.shape[2:], size), size, interpolation, _tables)


def resample_placed(
    images: Tensor, boxes: PlacedBoxes, size: list[int], interpolation: str, tables: WeightTables
) -> Tensor:
    """Resample boxes of images 'b c h w', with two matrix products per image, on the device of the arguments.

    Resampling is separable and linear, so one matrix for the rows and one for the columns describe a box, including
    mirroring and the black area outside the image.
    """
    b, c, h, w = images.shape
    rows = _weights(h, boxes, 0, size[0], interpolation, tables)
    columns = _weights(w, boxes, 1, size[1], interpolation, tables)
    views = torch.empty(b, c, *size, dtype=images.dtype, device=images.device)
    at_once = CHUNK_IMAGES if images.device.type == "cpu" else max(1, CHUNK_FLOATS // (c * h * w))
    for start in range(0, b, at_once):
        rows_now = slice(start, start + at_once)
        view = rows[rows_now, None] @ _along_columns(images[rows_now], columns[rows_now])
        if images.dtype == torch.uint8:
            view = view.round_().to(torch.int16)  # twice as fast as direct conversion to uint8
        views[rows_now] = view.clamp_(0, 255)
    return views


def _along_columns(images: Tensor, columns: Tensor) -> Tensor:
    """Images 'b c h w' times 'b width w': 'b c h width'. Large images are converted to floats in chunks of rows."""
    b, c, h, w = images.shape
    at_once = max(1, CHUNK_FLOATS // (b * c * w))
    chunks = []
    for start in range(0, h, at_once):
        chunk = images[:, :, start : start + at_once].float()
        chunks.append(torch.bmm(chunk.reshape(b, -1, w), columns.transpose(1, 2)).view(b, c, -1, columns.shape[1]))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)


def _weights(length: int, boxes: PlacedBoxes, axis: int, out: int, interpolation: str, tables: WeightTables) -> Tensor:
    """(b, out, length): weight of each input pixel in each output pixel, along one axis.

    The weights of columns are transposed in memory, which makes the batched product ten times as fast.
    """
    start, extent, is_mirrored = boxes.numbers[axis], boxes.numbers[2 + axis], boxes.numbers[4]
    if boxes.in_table[axis]:
        box = (start * (length + 1) + extent).long()
        row_of_box, table = tables.get(length, out, interpolation, is_columns=axis == 1)
        row = row_of_box.index_select(0, box)
        if axis == 0:
            return table.index_select(0, row)
        return table.index_select(0, row * 2 + is_mirrored.long()).transpose(1, 2)
    if axis == 0:
        return _compute_weights(length, start, extent, out, interpolation, boxes.is_cut)
    weights = _compute_weights(length, start, extent, out, interpolation, boxes.is_cut, is_mirrored)
    return weights.transpose(1, 2).contiguous().transpose(1, 2)


def _make_table(length: int, out: int, interpolation: str, is_columns: bool) -> tuple[Tensor, Tensor]:
    """Weights of every box at whole pixels: the row of each box, by start * (length + 1) + extent, and the weights.

    For columns, each row is followed by its mirror image, and both are transposed.
    """
    starts, extents = (v.ravel() for v in np.meshgrid(np.arange(length), np.arange(1, length + 1), indexing="ij"))
    fits = starts + extents <= length
    starts, extents = starts[fits], extents[fits]
    row_of_box = torch.zeros(length * (length + 1) + 1, dtype=torch.int64)
    row_of_box[torch.from_numpy(starts * (length + 1) + extents)] = torch.arange(len(starts))
    start, extent = (torch.from_numpy(v.astype(np.float32)) for v in (starts, extents))
    table = _compute_weights(length, start, extent, out, interpolation)
    if is_columns:
        table = torch.stack([table, table.flip(1)], 1).flatten(0, 1).transpose(1, 2).contiguous()
    return row_of_box, table


def _compute_weights(
    length: int, start: Tensor, extent: Tensor, out: int, interpolation: str, is_cut: bool = True,
    is_mirrored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    first, size = start[:, None, None], extent[:, None, None]
    scale = size / out
    position = torch.arange(out, device=start.device)[:, None]
    if is_mirrored is not None:
        position = torch.where(is_mirrored[:, None, None] > 0, out - 1 - position, position)
    center = first + (position + 0.5) * scale
    pixel = torch.arange(length, device=start.device) + 0.5
    distance = (pixel - center).abs_() / scale.clamp(min=1)  # a wider filter for downsampling (antialiasing)
    if interpolation == "bilinear":
        weight = 1 - distance.clamp_(max=1)
    else:  # Keys' cubic with a = -0.5, the antialiased one of PIL and torch
        distance.clamp_(max=2)
        near = ((1.5 * distance - 2.5) * distance * distance).add_(1)
        far = (((2.5 - 0.5 * distance) * distance - 4) * distance).add_(2)
        weight = torch.where(distance < 1, near, far)
    if is_cut:
        weight *= (pixel > first) & (pixel < first + size)
    total = weight.sum(2, keepdim=True)
    is_black = (center < 0) | (center > length) | (total == 0)
    return (weight / total).masked_fill_(is_black, 0)


def normalize(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize pixels (0 to 255), 'b c h w' or 'c h w', to float32 by the mean and standard deviation per channel.

    Args:
        view: The pixels.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), view.device)
    return view.to(torch.float32, copy=True).mul_(scale).add_(shift)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Constants of normalization, cached on the device of the pixels and sent there in one copy."""
    scale = 1 / (torch.tensor(std).view(-1, 1, 1) * 255)
    return torch.stack([scale, -255 * torch.tensor(mean).view(-1, 1, 1) * scale]).to(device).unbind()
