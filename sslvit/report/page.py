"""One self-contained HTML page: pictures are embedded, and nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sslvit.evaluate.scores import Scores, columns_of, format_score, html_text
from sslvit.files import write_atomically

STYLE = """
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; font-weight: 600; }
tbody tr:last-child { font-weight: 600; } tbody td { border-bottom: 1px solid #ddd; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
"""


@dataclass
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        """The part as HTML."""
        return f"<p>{html_text(self.text)}</p>"


@dataclass
class Heading:
    """A heading of a section."""

    text: str

    def html(self) -> str:
        """The part as HTML."""
        return f"<h2>{html_text(self.text)}</h2>"


@dataclass
class Table:
    """A table of scores."""

    rows: Scores

    def html(self) -> str:
        """The part as HTML."""
        columns = columns_of(self.rows)
        head = "".join(f"<th>{html_text(column)}</th>" for column in ["", *columns])
        lines = [
            f"<tr><td>{html_text(name)}</td>"
            + "".join(f"<td>{format_score(scores.get(column))}</td>" for column in columns)
            + "</tr>"
            for name, scores in self.rows.items()
        ]
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


@dataclass
class Picture:
    """A PNG, which the page holds inside, with a caption."""

    path: Path
    caption: str

    def html(self) -> str:
        """The part as HTML."""
        data = base64.b64encode(self.path.read_bytes()).decode()
        text = html_text(self.caption)
        return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


Part = Text | Heading | Table | Picture


def write_page(path: Path, title: str, content: Sequence[Part]) -> Path:
    """Write a page of parts, top to bottom.

    Args:
        path: HTML file to write.
        title: title of the page.
        content: parts of the page.
    """
    body = "\n".join(part.html() for part in content)
    write_atomically(
        path,
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html_text(title)}</h1>\n{body}\n</html>\n",
    )
    return path
