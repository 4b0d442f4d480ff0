"""A self-contained page on a run and its results, or on several runs side by side."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslvit.files import expand_path, printable
from sslvit.messages import for_python
from sslvit.pages.page import heading, is_page, text, write_page
from sslvit.results import Result
from sslvit.train.folder import PAGE, RunFolder
from sslvit.train.report_sections import SECTIONS, RunFiles

# errors of reading the files of a run, which may be damaged, or written by another program or the user
DAMAGED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, OSError)
logger = logging.getLogger(__name__)


@dataclass(repr=False)
class Report(Result):
    """A page on some runs.

    Args:
        path: The HTML file.
        runs: The run folders that it shows.
    """

    path: Path
    runs: list[Path]

    def __fspath__(self) -> str:
        return str(self.path)

    def text(self) -> str:
        """The path of the page."""
        return str(self.path)

    def to_dict(self) -> dict[str, Any]:
        """The paths."""
        return {"path": str(self.path), "runs": [str(run) for run in self.runs]}

    def _repr_html_(self) -> str:
        """The page itself, in a sandboxed frame that cannot touch the notebook."""
        content = html.escape(self.path.read_text())
        return f'<iframe sandbox="allow-scripts" srcdoc="{content}" style="width:100%;height:40rem"></iframe>'


@for_python
def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Report:
    """Show runs on one self-contained page: settings, curves, time, data, pictures and scores.

    Args:
        runs: Run folder, or several, whose curves are plotted together.
        output: HTML file; None for report.html in the run's folder, or in the current one for several runs. Only an
            earlier page of this function is replaced.

    Returns:
        The page.

    Raises:
        ValueError: Not a run folder, the same one twice, or a file that is no page of this kind.

    Example:
        page = sslvit.report(["runs/mae", "runs/dino"], "compared.html")
        print(page)
    """
    given = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    if not given:
        raise ValueError("RUN: none given. Name one run folder or several.")
    folders = [RunFolder(expand_path(one)) for one in given]
    for folder in folders:
        if not folder.is_run:
            raise ValueError(f"{printable(folder.path)}: not a run folder (no config.yaml of a run).")
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise ValueError("RUN: the same folder twice. Name each run once.")
    path = folders[0].page if len(folders) == 1 else Path(folders[0].page.name)
    path = Path(expand_path(output)) if output else path
    if path.suffix != ".html":
        raise ValueError(f"{printable(path)}: a page is written as HTML. Choose a name that ends in .html.")
    if path.exists() and not is_page(path, PAGE):
        raise ValueError(
            f"{printable(path)}: already exists, and is no page that sslvit report wrote. Choose another file: -o FILE"
        )
    return write_report(folders, path)


def write_report(folders: Sequence[RunFolder], path: Path | None = None, state: str | None = None) -> Report:
    """Write the page of one run, or of several; the page lists what could not be read.

    Args:
        folders: The runs.
        path: HTML file; None for report.html in the folder of the first.
        state: State to show; None for that in their folders, where a run that is just ending still counts as running.

    Raises:
        WriteError: The page cannot be written.
    """
    path, problems = path or folders[0].page, []
    named: dict[str, RunFiles] = {}
    for name, folder in _names(folders).items():
        try:
            named[name] = RunFiles(folder, state)
        except DAMAGED as error:
            problems.append(text(f"{name}: cannot be read ({error})."))
    title = f"sslvit: {next(iter(named), 'no run')}" if len(folders) == 1 else f"sslvit: {len(folders)} runs"
    blocks = [heading("What ran"), *problems]
    for make in SECTIONS if named else ():
        try:
            blocks += make(named)
        except DAMAGED as error:
            blocks.append(text(f"A part of this page could not be made ({type(error).__name__}: {error})."))
    write_page(path, title, [block for block in blocks if block], PAGE)
    return Report(path, [folder.path for folder in folders])


def write_own_report(folder: RunFolder, state: str | None = None) -> Path | None:
    """Write the page of a run that is training or has just ended, without ever failing it; None if that failed."""
    try:
        if folder.page.exists() and not is_page(folder.page, PAGE):
            raise ValueError("a file of that name is there, and sslvit report did not write it")
        return write_report([folder], state=state).path
    except Exception as error:  # the run and its checkpoints are worth more than its page
        logger.warning(f"{printable(folder.page)}: not written ({printable(error)})")
        return None


def _names(folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """A short name for each run: the end of its path that distinguishes it from the others."""
    paths = [folder.path.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(names_of_path[-length:]) for names_of_path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))
