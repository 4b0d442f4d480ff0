"""How much better one encoder is than another on the same images and draws of labels, with an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from sslvit.evaluate.scores import interval, mean
from sslvit.files import printable

Right = dict[str, list[Bool[Tensor, "n"]]]  # column -> for each draw of labels, which images were recognized


@dataclass(frozen=True)
class Difference:
    """The score of one row minus that of another in one column.

    Args:
        row: The row that is judged.
        against: The row that it is compared with.
        column: The column of the table.
        points: Difference in percentage points.
        half: Half the width of its 95 % interval; 0 where both recognize the same images.
    """

    row: str
    against: str
    column: str
    points: float
    half: float

    @property
    def is_beyond(self) -> bool:
        """Whether the difference exceeds its interval."""
        return abs(self.points) > self.half

    def __str__(self) -> str:
        return f"{self.column} ({self.points:+.1f} ± {self.half:.1f})"


def difference(row: str, against: str, column: str, one: list[Tensor], other: list[Tensor]) -> Difference:
    """The difference of two rows, image by image and draw by draw.

    Both rows are scored on the same images, and on the same draws of labels, so whatever makes an image or a draw hard
    for both cancels in the difference. Its variance is that over images (of the mean over draws) plus that over draws.
    """
    paired = torch.stack([100 * (a.double() - b.double()) for a, b in zip(one, other, strict=True)])  # draws n
    over_images = paired.mean(0)
    of_images = 1.96 * float(over_images.std()) / math.sqrt(paired.shape[1]) if paired.shape[1] > 1 else math.inf
    of_draws = interval(paired.mean(1).tolist()) or 0.0
    return Difference(row, against, column, mean(over_images.tolist()), math.hypot(of_images, of_draws))


def differences(right: dict[str, Right]) -> list[Difference]:
    """The differences of every row against the first one, in the columns that both have."""
    first, *others = right
    return [
        difference(row, first, column, right[row][column], of_first)
        for row in others
        for column, of_first in right[first].items()
        if column in right[row]
    ]


def verdicts(found: list[Difference]) -> list[str]:
    """One sentence for each row: the columns in which it is better or worse by more than chance explains."""
    sentences = []
    for row in dict.fromkeys(one.row for one in found):
        of_row = [one for one in found if one.row == row]
        by_verdict = {
            "better in": [one for one in of_row if one.is_beyond and one.points > 0],
            "worse in": [one for one in of_row if one.is_beyond and one.points < 0],
            "no difference beyond its 95 % interval in": [one for one in of_row if not one.is_beyond],
        }
        said = "; ".join(f"{words} {', '.join(map(str, ones))}" for words, ones in by_verdict.items() if ones)
        sentences.append(f"{printable(row)} against {printable(of_row[0].against)}, image by image: {said}")
    return sentences
