"""Tensors in one block of memory, so that one copy moves them to a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; each tensor begins at a multiple


@dataclass(frozen=True)
class Packed:
    """Tensors of any dtypes and shapes, one after the other in a buffer.

    Args:
        buffer: The bytes of all tensors.
        layout: First byte, dtype and shape of each tensor.
    """

    buffer: Tensor
    layout: tuple[tuple[int, torch.dtype, torch.Size], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Packed:
        """Pack tensors of one device; tensors that are already packed are not copied."""
        layout, end = [], 0
        for tensor in tensors:
            layout.append((end, tensor.dtype, tensor.shape))
            end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        storage = tensors[0].untyped_storage()
        is_packed = storage.nbytes() == end and all(
            tensor.untyped_storage().data_ptr() == storage.data_ptr()
            and tensor.storage_offset() * tensor.itemsize == start
            and tensor.is_contiguous()
            for tensor, (start, *_) in zip(tensors, layout, strict=True)
        )
        buffer = torch.empty(0 if is_packed else end, dtype=torch.uint8, device=tensors[0].device)
        packed = cls(buffer.set_(storage) if is_packed else buffer, tuple(layout))
        if not is_packed:
            for view, tensor in zip(packed.tensors(), tensors, strict=True):
                view.copy_(tensor)
        return packed

    def tensors(self) -> list[Tensor]:
        """The tensors, which share the buffer's memory."""
        ends = [start + math.prod(shape) * dtype.itemsize for start, dtype, shape in self.layout]
        return [
            self.buffer[start:end].view(dtype).view(shape)
            for end, (start, dtype, shape) in zip(ends, self.layout, strict=True)
        ]

    def pin_memory(self) -> Packed:
        """Copy to page-locked memory, from which copies to a GPU do not block."""
        return Packed(self.buffer.pin_memory(), self.layout)

    def send(self, device: torch.device) -> Packed:
        """Copy to a device; for a GPU, through page-locked memory."""
        return (self.pin_memory() if device.type == "cuda" else self).to(device)

    def to(self, device: torch.device) -> Packed:
        """Copy to a device in one piece; does not block if the memory is page-locked."""
        return Packed(self.buffer.to(device, non_blocking=device.type == "cuda"), self.layout)
