"""Scores, their intervals and their tables, in which names from users and files are escaped."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sslvit.files import printable
from sslvit.results import MAX_CHARACTERS, Result, text_table

Scores = dict[str, dict[str, list[float]]]  # row -> column -> one score for each draw or seed
MAX_DECIMALS = 9  # that a table shows
STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a cell that starts so is a formula, unless it is a number
MARKDOWN_SIGNS = re.compile(r"[\\`*\[\]$~#|!]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is plain text
MARKDOWN_STARTS = re.compile(r"^(\s*)([-+=]|\d+(?=[.)](?:\s|$)))")  # a list, or a line's underline


def markdown_text(text: object) -> str:
    """Untrusted text as one line of Markdown, escaped so that nothing is a tag, a link, math or a cell border."""
    line = html.escape(printable(text, MAX_CHARACTERS), quote=False)
    line = MARKDOWN_SIGNS.sub(lambda sign: f"\\{sign[0]}", line)
    return MARKDOWN_STARTS.sub(lambda start: f"{start[1]}&#{ord(start[2][0])};{start[2][1:]}", line)


def spreadsheet_cell(value: object) -> object:
    """A value for a CSV file: text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(value, str) or not value.startswith(STARTS_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def csv_text(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """The content of a CSV file; a cell of None is empty."""
    lines = io.StringIO()
    # text is quoted, since some programs split cells at semicolons, and a name may contain one
    writer = csv.writer(lines, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(titles)
    writer.writerows([spreadsheet_cell(value) for value in row] for row in rows)
    return lines.getvalue()


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def means(rows: Scores) -> dict[str, dict[str, float]]:
    """The mean of each score."""
    return {row: {column: mean(values) for column, values in of.items()} for row, of in rows.items()}


def independent(by_seed: list[list[float]]) -> list[float]:
    """The independent values behind a mean: one mean per seed, or the draws of a single seed.

    Draws of labels under one seed share what the seed decides, such as an untrained network's weights, so draws of
    several seeds are not independent of each other.
    """
    return by_seed[0] if len(by_seed) == 1 else [mean(values) for values in by_seed]


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None if all values are the same."""
    if len(set(values)) < 2:
        return None
    from scipy.stats import t  # takes a second to import, and most tables do not need it

    average = mean(values)
    deviation = math.sqrt(sum((value - average) ** 2 for value in values) / (len(values) - 1))
    return float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def intervals(rows: Scores) -> dict[str, dict[str, float | None]]:
    """Half the width of each score's interval."""
    return {row: {column: interval(values) for column, values in of.items()} for row, of in rows.items()}


def sampling_interval(images: int) -> float:
    """Largest possible half width of the 95 % interval of a percentage measured on this many images."""
    return 100 * 1.96 * math.sqrt(0.25 / images)


def format_score(values: list[float] | None, decimals: int = 1) -> str:
    """A score as text: "63.2", or "63.2 ± 1.4" for several values, or a dash if there are none."""
    if not values:
        return "–"
    half = interval(values)
    text = f"{mean(values):.{decimals}f}"
    return text if half is None else f"{text} ± {half:.{decimals}f}"


def columns_of(rows: Scores) -> list[str]:
    """All columns, in the order in which they first appear."""
    return list(dict.fromkeys(column for scores in rows.values() for column in scores))


def read_scores(rows: Any) -> Scores:
    """Row -> column -> scores, from a file's `rows` or `draws`, without those that are null; empty for another form."""
    if not isinstance(rows, dict) or not all(isinstance(of, dict) for of in rows.values()):
        return {}
    found = {
        row: {
            column: values if isinstance(values, list) else [values]
            for column, values in of.items()
            if values is not None
        }
        for row, of in rows.items()
    }
    scores = [values for of in found.values() for values in of.values()]
    is_sound = all(isinstance(one, (int, float)) and math.isfinite(one) for values in scores for one in values)
    return found if scores and all(scores) and is_sound else {}


def read_decimals(content: dict[str, Any]) -> int | None:
    """Decimals of the measures in a file; None for percentages, of which more is better."""
    decimals = content.get("decimals")
    return decimals if isinstance(decimals, int) and 0 <= decimals <= MAX_DECIMALS else None


def scored_data(content: dict[str, Any]) -> tuple[Any, Any]:
    """The location of the images that a file's scores or measures are of, and their number; None if it has none."""
    about = content.get("about")
    about = about if isinstance(about, dict) else {}
    return about.get("val", about.get("data")), about.get("val_images", about.get("images"))


def format_table(rows: Scores, decimals: int = 1) -> str:
    """A table in plain text."""
    return text_table(*score_cells(rows, decimals))


def score_cells(rows: Scores, decimals: int = 1) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
    """The titles and rows of a table whose cells are scores as text."""
    columns = columns_of(rows)
    lines = [[name, *(format_score(of.get(column), decimals) for column in columns)] for name, of in rows.items()]
    return ["", *columns], lines


@dataclass(repr=False)
class MeasureTable(Result):
    """A table of single numbers.

    Args:
        rows: Row -> column -> number.
        heading: Text above the table, with everything a reader needs to quote the numbers.
        decimals: Number of decimals to show.
        about: The content of the heading as plain values, by name.
    """

    rows: dict[str, dict[str, float]]
    heading: str
    decimals: int
    about: dict[str, Any]

    @property
    def scores(self) -> Scores:
        """Every number as a list of one score."""
        return {row: {column: [value] for column, value in of.items()} for row, of in self.rows.items()}

    def text(self) -> str:
        """The heading and the table."""
        return f"{self.heading}\n\n{format_table(self.scores, self.decimals)}"

    def to_dict(self) -> dict[str, Any]:
        """The rows, and everything a reader needs to quote them."""
        return {"rows": self.rows, "decimals": self.decimals, "about": self.about}

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """The titles and rows of the table."""
        return score_cells(self.scores, self.decimals)


def markdown_table(rows: Scores, decimals: int = 1) -> str:
    """A table in Markdown."""
    (_, *columns), lines = score_cells(rows, decimals)
    made = [f"| | {' | '.join(map(markdown_text, columns))} |", "|---" * (len(columns) + 1) + "|"]
    for name, *cells in lines:
        made.append(f"| {markdown_text(name)} | {' | '.join(map(str, cells))} |")
    return "\n".join(made)
