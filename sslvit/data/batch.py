"""What every task and every probe receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """One rank's part of a (micro-)batch.

    Args:
        views: list of 'b c h w': pixels 0 to 255 as they leave the loader, normalized floats once on the device.
        labels: class numbers 'b', or None for unlabeled data.
        samples: number of each sample in its data set, 'b'; the index turns it into a key.
        valid: False where a row only fills up (an unreadable sample, or padding in evaluation), 'b'.
        epochs: the pass over its data set that each sample is in, 'b'.
        first_row: index of the first row within the global batch; with the step it keys every chance draw.
        unreadable: Reason why a sample could not be read, by its key.
        colors: changes of color still to be made, one 'b columns' per view, or None.
    """

    views: list[Tensor]
    labels: Tensor | None
    samples: Tensor
    valid: Tensor
    epochs: Tensor
    first_row: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    colors: list[Tensor] | None = None

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Return the batch on another device; called by Lightning."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def rows(self, is_kept: Tensor) -> Batch:
        """The rows where `is_kept` ('b') is True."""
        return replace(self._map(lambda tensor: tensor[is_kept]), epochs=self.epochs[is_kept.cpu()])

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; called by the DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            views=[change(view) for view in self.views],
            labels=None if self.labels is None else change(self.labels),
            samples=change(self.samples),
            valid=change(self.valid),
            colors=None if self.colors is None else [change(draws) for draws in self.colors],
        )

    def __len__(self) -> int:
        return len(self.samples)
