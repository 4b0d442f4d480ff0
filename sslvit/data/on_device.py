"""Batches made available on the device: prefetched, or cut from a small data set that is kept there.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sslvit.data.batch import Batch
from sslvit.data.loader import TrainingBatches, describe_rows
from sslvit.data.packed import Packed
from sslvit.data.resample import PlacedBoxes, WeightTables, resample_placed

BATCHES_AHEAD = 4  # whose boxes and colors a thread samples in advance


class Prefetcher:
    """A loader that copies the next batch to the GPU on a separate stream while a step computes.

    Args:
        loader: Loader of batches in page-locked memory.
        device: The GPU.
    """

    def __init__(self, loader: DataLoader[Batch], device: torch.device) -> None:
        self.loader, self.device, self.dataset = loader, device, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        ahead: tuple[Batch, torch.cuda.Event] | None = None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                moved = batch.to(self.device)
                arrived = torch.cuda.Event()
                arrived.record(stream)
            if ahead is not None:
                yield self._hand_over(*ahead)
            ahead = moved, arrived
        if ahead is not None:
            yield self._hand_over(*ahead)

    def _hand_over(self, batch: Batch, arrived: torch.cuda.Event) -> Batch:
        """Make the current stream wait for the copy, and keep the memory until that stream is done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        batch.views[0].record_stream(current)  # all of a batch lies in one piece of memory
        return batch


@dataclass
class Drawn:
    """The parts of a batch that the CPU samples when the pixels are on the device.

    Args:
        batch: The batch without its views; labels are in `packed`.
        packed: Sample numbers, boxes of each of `groups`, class numbers if any, and colors of each view.
        groups: Groups of views of one size, which are made together: size, number of views and boxes.
    """

    batch: Batch
    packed: Packed
    groups: list[tuple[list[int], int, PlacedBoxes]]


class DeviceBatches(TrainingBatches):
    """The micro-batches of a small data set that is kept on the device; see TrainingBatches.

    The CPU samples boxes and colors, which are sent in one copy; images are cropped on the device. Pixels differ from
    those of a loader by at most 1 of 255, since matrix products are rounded differently.

    Args:
        batches: The micro-batches; the data set of their reader is in memory.
        device: Device that holds the images.
    """

    def __init__(self, batches: TrainingBatches, device: torch.device) -> None:
        super().__init__(
            batches.reader, batches.views, batches.plan, batches.rank, batches.micro, batches.accumulation_steps,
            batches.resolutions,
        )  # fmt: skip
        assert self.reader.decoded is not None
        self.device, self.images, self.tables = device, self.reader.decoded.to(device), WeightTables(device)

    def __getitem__(self, number: int) -> Batch:
        return self.make(self.draw(number))

    def draw(self, number: int) -> Drawn:
        """Sample boxes and colors of a micro-batch on the CPU."""
        samples, epochs, first_row, size = self.rows(number)
        used, used_epochs = samples.copy(), epochs.copy()
        unreadable = self.reader.unreadable_rows(samples)
        for row in unreadable:
            readable = (found for found in self.substitutes(number, row) if found[0] not in self.reader.unreadable)
            used[row], used_epochs[row] = next(readable, (samples[row], epochs[row]))
        sides = self.images.shape[2:]
        crops = self.views.sample_boxes(np.tile(sides, (len(samples), 1)), used, used_epochs, size)
        placed = [(size_of_view, boxes.placed(sides, size_of_view)) for size_of_view, boxes in crops]
        groups = []
        for size_of_view, same in groupby(placed, key=lambda view: (view[0], view[1].is_cut, view[1].in_table)):
            boxes = [view for _, view in same]
            numbers = torch.cat([view.numbers for view in boxes], 1)
            groups.append((size_of_view[0], len(boxes), replace(boxes[0], numbers=numbers)))
        batch = describe_rows(self.reader, samples, epochs, used, unreadable, first_row=first_row)
        labels = [] if batch.labels is None else [batch.labels]
        colors = self.views.sample_colors(used, used_epochs) or []
        numbers_of_groups = [boxes.numbers for *_, boxes in groups]
        packed = Packed.of([torch.from_numpy(used), *numbers_of_groups, *labels, *colors])
        return Drawn(batch, packed, groups)

    def make(self, drawn: Drawn) -> Batch:
        """Make the views of a micro-batch on the device."""
        samples, *rest = drawn.packed.send(self.device).tensors()
        views: list[Tensor] = []
        for size, count, boxes in drawn.groups:
            here = replace(boxes, numbers=rest.pop(0))
            images = self.images.index_select(0, samples.repeat(count))
            views += resample_placed(images, here, size, self.views.interpolation, self.tables).chunk(count)
        labels = None if drawn.batch.labels is None else rest.pop(0)
        return replace(drawn.batch, views=views, labels=labels, colors=rest or None)


class DeviceLoader:
    """Batches of a data set on the device, in the order of a sampler; a thread samples boxes and colors in advance.

    Args:
        dataset: The batches.
        order: Sampler of their numbers.
    """

    def __init__(self, dataset: DeviceBatches, order: Sampler[int]) -> None:
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(cast(Sized, self.order))

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(1, "boxes")
        try:
            for number in self.order:
                ahead.append(pool.submit(self.dataset.draw, number))
                if len(ahead) > BATCHES_AHEAD:
                    yield self.dataset.make(ahead.popleft().result())
            while ahead:
                yield self.dataset.make(ahead.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
