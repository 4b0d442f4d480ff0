"""The batch that every task and every probe receives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sslvit.data.packed import Packed


@dataclass
class Batch:
    """One rank's part of a (micro-)batch.

    Views, labels and colors move to the device; the other tensors are only read on the CPU and stay there.

    Args:
        views: Tensors 'b c h w': pixels 0 to 255 from the loader, normalized floats once on the device.
        labels: Class numbers 'b', or None for unlabeled data.
        samples: Number of each sample in its data set, 'b', on the CPU; the index maps it to a key.
        valid: False for filler rows (an unreadable sample, or padding in evaluation), 'b', on the CPU.
        epochs: Epoch of each sample in its data set, 'b', on the CPU.
        first_row: Index of the first row in the global batch; with the step, it is the key of all random numbers.
        unreadable: Sample key -> reason why it could not be read.
        colors: Color changes that are still to be applied, one tensor 'b columns' per view, or None.
    """

    views: list[Tensor]
    labels: Tensor | None
    samples: Tensor
    valid: Tensor
    epochs: Tensor
    first_row: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    colors: list[Tensor] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device, moved there in one copy; called by Lightning."""
        device, tensors = torch.device(device), self._moving()
        if device.type == "cpu" or all(tensor.device == device for tensor in tensors):
            return self._with([tensor.to(device) for tensor in tensors])
        return self._with(Packed.of(tensors).to(device).tensors())

    def rows(self, is_kept: Tensor) -> Batch:
        """Select the rows where `is_kept` ('b', on the CPU) is True."""
        moving = self._with([tensor[is_kept] for tensor in self._moving()])
        host = {name: getattr(self, name)[is_kept] for name in ("samples", "valid", "epochs")}
        return replace(moving, **host)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, in one piece; called by the DataLoader."""
        return self._with(Packed.of(self._moving()).pin_memory().tensors())

    def _moving(self) -> list[Tensor]:
        """The tensors that move to the device: views, labels and colors."""
        return [*self.views, *([] if self.labels is None else [self.labels]), *(self.colors or [])]

    def _with(self, tensors: list[Tensor]) -> Batch:
        """A copy of the batch with `tensors` in place of those of `_moving`."""
        views, rest = tensors[: len(self.views)], tensors[len(self.views) :]
        labels = None if self.labels is None else rest.pop(0)
        return replace(self, views=views, labels=labels, colors=self.colors and rest)

    def __len__(self) -> int:
        return len(self.samples)
