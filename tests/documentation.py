"""Code blocks of the README and of docs/, and the cells of its notebooks, as a reader sees them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("notebooks/*.ipynb"))]
COMMAND = re.compile(r"(?:[A-Z]+=\S+ )?(?:sslvit|torchrun|sbatch|python|pip|make|git|cat) ")
PROMPT = "$ "


@dataclass(frozen=True)
class Snippet:
    """A command or a block of Python, as it is typed.

    Attributes:
        page: Name of the file.
        line: Number of its first line there; of a notebook's code cells, which one.
        text: A command without its comment, or Python.
        is_python: Whether it is Python.
    """

    page: str
    line: int
    text: str
    is_python: bool


def snippets_of(page: Path) -> list[Snippet]:
    """Commands and Python of a page, in their order; blocks that are neither (output, trees, YAML) are left out."""
    text, found = page.read_text(), []
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [
            Snippet(page.name, number, "".join(cell["source"]) + "\n", True) for number, cell in enumerate(cells, 1)
        ]
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        language, body = block.groups()
        first = text.count("\n", 0, block.start()) + 2
        if language == "python":
            found.append(Snippet(page.name, first, body, is_python=True))
        elif language in ("", "sh") and COMMAND.match(body.removeprefix(PROMPT)):
            found += _commands(page.name, first, body)
    return found


def _commands(page: str, first: int, body: str) -> list[Snippet]:
    found, parts, start = [], [], first
    is_transcript = body.startswith(PROMPT)  # with what the commands print
    for number, line in enumerate(body.splitlines(), first):
        if is_transcript and not line.startswith(PROMPT):
            continue
        parts.append(line.removeprefix(PROMPT).removesuffix("\\"))
        if line.endswith("\\"):
            continue
        command = re.sub(r"\s+# .*$", "", "".join(parts)).strip()
        if command and not command.startswith("#"):
            found.append(Snippet(page, start, command, is_python=False))
        parts, start = [], number + 1
    return found
