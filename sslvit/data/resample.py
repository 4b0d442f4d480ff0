"""A box of an image -> pixels of a view, antialiased."""

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

SMALL_SIDE = 96  # images up to this side are decoded once and resampled a batch at a time
CHUNK_IMAGES = 128  # images that are resampled together: what they need fits the processor's cache
CHUNK_FLOATS = 2**24  # pixels of images that are floats at the same time
SUPPORT = {"bilinear": 1, "bicubic": 2}  # pixels that a filter reaches to either side
MAX_TABLE_BYTES = 64 * 2**20  # boxes at whole pixels of small images have their weights in a table up to this size
MAX_TABLES_BYTES = 512 * 2**20  # of all cached tables; the least recently used go first


@dataclass
class Boxes:
    """What is seen of each image, in its pixels; all arrays have one entry per image.

    Args:
        top: first row; may lie between pixels, as the other sides may.
        left: first column.
        height: number of rows.
        width: number of columns.
        is_mirrored: Whether left and right change places.
        is_cut: pixels outside of a box do not count in its view, as if it had been cut out first (random crops);
            otherwise they smooth its border, as in PIL's resize with a box (center views).
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
        """The same boxes in an image whose sides were divided."""
        sides = {name: getattr(self, name) / reduction for name in ("top", "left", "height", "width")}
        return replace(self, **sides)

    def placed(self, sides: Sequence[int], size: list[int]) -> PlacedBoxes:
        """The same boxes for a device that is to make views of a size of images with these sides, height and width."""
        numbers = np.stack([self.top, self.left, self.height, self.width, self.is_mirrored]).astype(np.float32)
        spans = ((self.top, self.height), (self.left, self.width))
        in_table = tuple(
            length * (length + 1) // 2 * out * length * 4 <= MAX_TABLE_BYTES and self._is_whole(start, extent, length)
            for (start, extent), length, out in zip(spans, sides, size, strict=True)
        )
        return PlacedBoxes(torch.from_numpy(numbers), self.is_cut, in_table)

    def _is_whole(self, start: np.ndarray, extent: np.ndarray, length: int) -> bool:
        """Whether all boxes lie at whole pixels inside of the images, along one axis."""
        is_inside = (start >= 0) & (start + extent <= length) & (start % 1 == 0) & (extent % 1 == 0) & (extent >= 1)
        return bool(is_inside.all() and (self.is_cut or (extent == length).all()))

    def zoom(self, size: list[int]) -> np.ndarray:
        """Image pixels per view pixel, along the axis where they are fewer."""
        return np.minimum(self.height / size[0], self.width / size[1])


@dataclass
class PlacedBoxes:
    """Boxes as the device needs them.

    Args:
        numbers: float32 '5 b': top, left, height, width, and 1 where left and right change places.
        is_cut: As in `Boxes`.
        in_table: Whether the weights of all boxes stand in a table, along the rows and along the columns.
    """

    numbers: Tensor
    is_cut: bool
    in_table: tuple[bool, ...]


class WeightTables:
    """Weights of every box at whole pixels of small images, kept on one device.

    A batch of each of several resolutions asks for two others. The least recently used go first.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.kept: dict[tuple, tuple[Tensor, ...]] = {}  # by what _make_table takes; the one used last stands last

    def get(self, length: int, out: int, interpolation: str, is_columns: bool) -> tuple[Tensor, ...]:
        """The rows of boxes in the table, and the table; see `_make_table`."""
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
    """A view 'c h w' of one image 'c h w'.

    Args:
        image: uint8, or float in the same units.
        box: Box in pixels of the image before it was reduced.
        size: height and width of the view.
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
    """A box inside of a large image 'c h w' whose sides lie anywhere, through PIL.

    An axis that is seen from end to end goes through torch before, which is faster and gives the same.

    `sides` are top, left, height and width, in pixels or between them.
    """
    starts, ends, hull = sides[:2], [sides[axis] + sides[2 + axis] for axis in (0, 1)], []
    for axis in (0, 1):
        length = image.shape[1 + axis]
        starts[axis], ends[axis] = max(starts[axis], 0.0), min(ends[axis], length)  # of rounding
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
    planes = [pixels] if is_color else pixels.unbind(2)  # PIL has no other images of several channels
    box, resampling = (starts[1], starts[0], ends[1], ends[0]), Image.Resampling[interpolation.upper()]
    seen = [Image.fromarray(plane.contiguous().numpy()).resize((size[1], size[0]), resampling, box) for plane in planes]
    view = np.array(seen[0]) if is_color else np.stack([np.asarray(plane) for plane in seen], 2)
    return torch.from_numpy(view).permute(2, 0, 1)


def resample(images: Tensor, boxes: Boxes, size: list[int], interpolation: str) -> Tensor:
    """Boxes of equally large images 'b c h w' on the CPU (uint8, or float in the same units); see `resample_placed`."""
    return resample_placed(images, boxes.placed(images.shape[2:], size), size, interpolation, _tables)


def resample_placed(
    images: Tensor, boxes: PlacedBoxes, size: list[int], interpolation: str, tables: WeightTables
) -> Tensor:
    """Boxes of equally large images 'b c h w', as two matrix products per image, on the device of all that is given.

    Resampling is separable and linear, so a box, its mirror image and the black around an image are all a matrix
    of rows and one of columns.

    What lies outside an image is black.
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
            view = view.round_().to(torch.int16)  # twice as fast as from float to uint8 in one step
        views[rows_now] = view.clamp_(0, 255)
    return views


def _along_columns(images: Tensor, columns: Tensor) -> Tensor:
    """Images 'b c h w' times 'b width w': 'b c h width'. A large image is turned to floats some rows at a time."""
    b, c, h, w = images.shape
    at_once = max(1, CHUNK_FLOATS // (b * c * w))
    chunks = []
    for start in range(0, h, at_once):
        chunk = images[:, :, start : start + at_once].float()
        chunks.append(torch.bmm(chunk.reshape(b, -1, w), columns.transpose(1, 2)).view(b, c, -1, columns.shape[1]))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)


def _weights(length: int, boxes: PlacedBoxes, axis: int, out: int, interpolation: str, tables: WeightTables) -> Tensor:
    """(b, out, length): how much of each input pixel goes into each output pixel, along one axis.

    Columns lie transposed in memory: a batched product of a view that does not is ten times slower.
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
    """Weights of every box at whole pixels: their row by start * (length + 1) + extent, and the weights.

    For columns each row is followed by its mirror image, and both are transposed.
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
    distance = (pixel - center).abs_() / scale.clamp(min=1)  # shrinking widens the filter: antialiasing
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
    """Pixels (0 to 255), 'b c h w' or 'c h w' -> float32 in units of the channel's deviation, on their device.

    Args:
        view: The pixels.
        mean: Mean of each channel, of pixels from 0 to 1.
        std: Standard deviation of each.
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), view.device)
    return view.to(torch.float32, copy=True).mul_(scale).add_(shift)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Constants that stay on the device of the pixels, sent there in one copy."""
    scale = 1 / (torch.tensor(std).view(-1, 1, 1) * 255)
    return torch.stack([scale, -255 * torch.tensor(mean).view(-1, 1, 1) * scale]).to(device).unbind()
