"""What a call from Python gives back: text in a terminal, a table in a notebook, plain values for programs."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence
from typing import Any

from sslvit.files import printable

NUMBERS = ("-", "–", "nan", "inf")  # with what a cell of numbers begins that does not begin with a digit
MAX_CHARACTERS = 10_000  # largest length of an untrusted text in a table or a page


FAR_OFF = 1e6  # from which on decimals say nothing


class Result:
    """A result that shows itself as the command prints it.

    Its classes are dataclasses, made with repr=False.
    """

    def text(self) -> str:
        """What the command prints."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with --json."""
        raise NotImplementedError

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """The titles and rows of its table in a notebook; names and values unless a class has a table of its own."""
        return ("", ""), self.to_dict().items()

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_table(*self.cells())


def decimals(value: float, places: int = 4) -> str:
    """A number with so many decimals, or two digits of one that has gone far off."""
    return f"{value:.{places}f}" if abs(value) < FAR_OFF or value != value else f"{value:.2g}"


def text_table(titles: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in plain text, its untrusted cells made printable; columns of numbers are aligned to the right."""
    lines = [[printable(cell) for cell in line] for line in (titles, *rows)]
    columns = []
    for title, *cells in zip(*lines, strict=True):
        width = max(map(len, (title, *cells)))
        side = ">" if all(cell[:1].isdigit() or cell.startswith(NUMBERS) for cell in cells) else "<"
        columns.append([f"{cell:{side}{width}}" for cell in (title, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def html_text(text: object) -> str:
    """Untrusted text for a page."""
    return html.escape(printable(text, MAX_CHARACTERS))


def html_table(titles: Sequence[object], rows: Iterable[Sequence[object]], changed: Container[int] = ()) -> str:
    """A plain table for a page or a notebook, its untrusted cells escaped; `changed` are the numbers of marked rows."""
    head = "".join(f"<th>{html_text(title)}</th>" for title in titles)
    lines = []
    for number, row in enumerate(rows):
        mark = ' class="changed"' if number in changed else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>")
    body = "\n".join(lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
