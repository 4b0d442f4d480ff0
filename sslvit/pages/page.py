"""Self-contained HTML pages with embedded pictures; nothing is fetched.

A page has a table of contents, follows the reader's light or dark scheme, and fits phones and paper. It works without
its script, which only shows the values of charts under the pointer.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from sslvit.evaluate.scores import Scores, columns_of, format_score, mean
from sslvit.files import write_atomically
from sslvit.pages.charts import SCRIPT
from sslvit.results import html_table, html_text

GENERATOR = '<meta name="generator" content="sslvit {}">'  # marks the kind of page
MAX_BYTES = 2**25  # largest file that a page embeds
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --ground: #fff; --raised: #f6f8fa;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #8a6d00; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --dim: #9198a1; --line: #3d444d; --ground: #0d1117;
  --raised: #151b23; --c0: #58a6ff; --c1: #f0883e; --c2: #3fb98f; --c3: #e59cc6; --c4: #d8b44a; --c5: #8fd3ff; } }
* { box-sizing: border-box; }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--ground); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
a { color: var(--c0); } nav ul { columns: 14rem; padding-left: 1.2rem; margin: .5rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; overflow-wrap: normal; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid var(--dim); font-weight: 600; }
.words th, .words td { text-align: left; overflow-wrap: anywhere; min-width: 7rem; }
.words td:first-child { white-space: nowrap; } .best { font-weight: 700; }
.changed td { background: var(--raised); font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; background: #fff; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1.5rem;
  align-items: start; } .beside figure { margin: .75rem 0; }
figcaption { color: var(--dim); font-size: .9rem; }
.chip { display: inline; width: 1.5rem; height: .5rem; margin-right: .4rem; vertical-align: middle; }
svg:not(.chip) { width: 100%; height: auto; display: block; touch-action: pan-y; }
svg text { fill: var(--dim); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--dim); stroke-dasharray: 3 3; } svg path { fill: none; }
.raw { opacity: .35; stroke-width: 1; } .smooth { stroke-width: 2; }
.key { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: 1.2rem; height: .25rem;
  margin-right: .4rem; vertical-align: middle; } output { display: block; min-height: 1.5em; color: var(--dim);
  font-size: .85rem; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { svg text { font-size: 19px; } }
@media print { body { max-width: none; margin: 0; } nav { display: none; } figure, table { break-inside: avoid; }
  output { display: none; } }
"""


def write_page(path: Path, title: str, blocks: list[str], kind: str) -> Path:
    """Write a page of blocks, which the functions below and those of `charts` make.

    Args:
        path: The HTML file.
        title: Title of the page.
        blocks: Content from top to bottom.
        kind: Kind of page, such as report, by which `is_page` recognizes pages that may be replaced.
    """
    contents, body, taken = [], [], set()
    for block in blocks:
        if found := re.fullmatch(r"<h2>(.*)</h2>", block, re.DOTALL):
            name = re.sub(r"[^a-z0-9]+", "-", found[1].lower()).strip("-") or "part"
            while name in taken:
                name += "-"
            taken.add(name)
            contents.append(f'<li><a href="#{name}">{found[1]}</a></li>')
            block = f'<h2 id="{name}">{found[1]}</h2>'
        body.append(block)
    listed = f"<nav><ul>{''.join(contents)}</ul></nav>\n" if len(contents) > 2 else ""
    write_atomically(
        path,
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{GENERATOR.format(kind)}\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html_text(title)}</h1>\n{listed}{chr(10).join(body)}\n"
        f"<script>{SCRIPT}</script>\n</html>\n",
    )
    return path


def is_page(path: Path, kind: str) -> bool:
    """Whether a file is a page of this kind that `write_page` wrote."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return GENERATOR.format(kind).encode() in file.read(200)


def is_plain(path: Path) -> bool:
    """Whether a file from a possibly untrusted folder is a regular file of a reasonable size, and not a link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_BYTES


def text(content: str) -> str:
    """Make a paragraph."""
    return f"<p>{html_text(content)}</p>"


def heading(content: str) -> str:
    """Make a section heading, which is also listed in the table of contents."""
    return f"<h2>{html_text(content)}</h2>"


def table(rows: Scores, decimals: int | None = None) -> str:
    """Make a table of percentages with the best of each column in bold, or of measures with that many decimals."""
    columns = columns_of(rows)
    best = {column: max(mean(of[column]) for of in rows.values() if of.get(column)) for column in columns}
    lines = []
    for name, of in rows.items():
        cells = [f"<td>{html_text(name)}</td>"]
        for column in columns:
            is_best = bool(of.get(column)) and mean(of[column]) == best[column]
            mark = ' class="best"' if is_best and len(rows) > 1 and decimals is None else ""
            shown = format_score(of.get(column), 1 if decimals is None else decimals)
            cells.append(f"<td{mark}>{html_text(shown)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html_text(column)}</th>" for column in ("", *columns))
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def text_rows(titles: Sequence[object], rows: Iterable[Sequence[object]], changed: Container[int] = ()) -> str:
    """Make a table of text; `changed` contains the indices of rows to highlight."""
    made = html_table(titles, rows, changed)
    return made.replace("<table>", '<div class="wide"><table class="words">') + "</div>"


def picture(path: Path, caption: str) -> str:
    """Embed a PNG with a caption.

    Raises:
        ValueError: Not a PNG file, too large, or a link, since an untrusted folder could link to private files.
    """
    content = path.read_bytes() if is_plain(path) else b""
    if not content.startswith(b"\x89PNG"):
        raise ValueError(f"{path}: not a picture that a page can show (a PNG of at most 32 MB).")
    data, said = base64.b64encode(content).decode(), html_text(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{said}"><figcaption>{said}</figcaption></figure>'


def figure_row(figures: list[str]) -> str:
    """Lay out figures side by side, as many in a row as fit."""
    return f'<div class="beside">{"".join(figures)}</div>'
