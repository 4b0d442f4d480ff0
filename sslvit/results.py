"""Results of the Python API: text in a terminal, a table in a notebook, plain values for programs."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence
from typing import Any

from sslvit.files import printable

NUMBERS = ("-", "–", "nan", "inf")  # beginnings of numeric cells, besides digits
MAX_CHARACTERS = 10_000  # largest length of untrusted text in a table or a page


FAR_OFF = 1e6  # values from here on are printed without decimals


class Result:
    """Base class of results, which print like the output of the command.

    Subclasses are dataclasses with repr=False.
    """

    def text(self) -> str:
        """The text that the command prints."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The content that the command prints with --json."""
        raise NotImplementedError

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """Titles and rows of the table shown in a notebook; by default the names and values of `to_dict`."""
        return ("", ""), self.to_dict().items()

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_table(*self.cells())


def decimals(value: float, places: int = 4) -> str:
    """Format a number with a fixed number of decimals, or with two digits if it is huge."""
    return f"{value:.{places}f}" if abs(value) < FAR_OFF or value != value else f"{value:.2g}"


def text_table(titles: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Format a plain-text table; cells are made printable, and columns of numbers are right-aligned."""
    lines = [[printable(cell) for cell in line] for line in (titles, *rows)]
    columns = []
    for title, *cells in zip(*lines, strict=True):
        width = max(map(len, (title, *cells)))
        side = ">" if all(cell[:1].isdigit() or cell.startswith(NUMBERS) for cell in cells) else "<"
        columns.append([f"{cell:{side}{width}}" for cell in (title, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def html_text(text: object) -> str:
    """Escape untrusted text for HTML."""
    return html.escape(printable(text, MAX_CHARACTERS))


def html_table(titles: Sequence[object], rows: Iterable[Sequence[object]], changed: Container[int] = ()) -> str:
    """Format an HTML table with escaped cells; `changed` contains the indices of rows to highlight."""
    head = "".join(f"<th>{html_text(title)}</th>" for title in titles)
    lines = []
    for number, row in enumerate(rows):
        mark = ' class="changed"' if number in changed else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>")
    body = "\n".join(lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
