"""Scores, their intervals and their tables."""

from __future__ import annotations

import math

Draws = dict[str, dict[str, list[float]]]  # row -> column -> one score for each draw or seed


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None of a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # a second; most tables need none

    average = mean(values)
    deviation = math.sqrt(sum((value - average) ** 2 for value in values) / (len(values) - 1))
    return float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def sampling_interval(images: int) -> float:
    """The most that half a 95 % interval of one percentage can be, from having seen only so many images."""
    return 100 * 1.96 * math.sqrt(0.25 / images)


def shown(values: list[float] | None, decimals: int = 1) -> str:
    """ "63.2", or with several values "63.2 ± 1.4"; a dash for none."""
    if not values:
        return "–"
    half = interval(values)
    text = f"{mean(values):.{decimals}f}"
    return text if half is None else f"{text} ± {half:.{decimals}f}"


def columns_of(rows: Draws) -> list[str]:
    """All columns, in the order in which they first appear."""
    return list(dict.fromkeys(column for scores in rows.values() for column in scores))


def format_table(rows: Draws, decimals: int = 1) -> str:
    """Rows and columns in plain text."""
    columns = columns_of(rows)
    first = max(len(name) for name in rows)
    cells = {name: [shown(scores.get(column), decimals) for column in columns] for name, scores in rows.items()}
    widths = [max([len(column), *(len(line[i]) for line in cells.values())]) for i, column in enumerate(columns)]
    lines = ["  ".join([" " * first, *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))])]
    for name, line in cells.items():
        lines.append("  ".join([f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(line, widths, strict=True))]))
    return "\n".join(lines)


def markdown_table(rows: Draws, decimals: int = 1) -> str:
    """The same for a README."""
    columns = columns_of(rows)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in rows.items():
        cells = [shown(scores.get(column), decimals) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
