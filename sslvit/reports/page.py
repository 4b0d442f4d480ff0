"""One self-contained HTML page: pictures are embedded, and nothing is fetched."""

from __future__ import annotations

import base64
from pathlib import Path

from sslvit.evaluate.scores import Scores, score_cells
from sslvit.files import write_atomically
from sslvit.results import html_table, html_text

STYLE = """
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; font-weight: 600; }
tbody tr:last-child { font-weight: 600; } tbody td { border-bottom: 1px solid #ddd; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
"""


def write_page(path: Path, title: str, parts: list[str]) -> Path:
    """Write a page of parts, top to bottom: what `text`, `heading`, `table` and `picture` return."""
    body = "\n".join(parts)
    write_atomically(
        path,
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html_text(title)}</h1>\n{body}\n</html>\n",
    )
    return path


def text(content: str) -> str:
    """A paragraph."""
    return f"<p>{html_text(content)}</p>"


def heading(content: str) -> str:
    """The heading of a section."""
    return f"<h2>{html_text(content)}</h2>"


def table(rows: Scores) -> str:
    """A table of scores."""
    return html_table(*score_cells(rows))


def picture(path: Path, caption: str) -> str:
    """A PNG, which the page embeds, with a caption."""
    data, words = base64.b64encode(path.read_bytes()).decode(), html_text(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{words}"><figcaption>{words}</figcaption></figure>'
