"""The tables of a bench as Markdown, CSV, JSON and an HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslvit.evaluate.probe import SAME_DATA
from sslvit.evaluate.scores import (
    Scores,
    columns_of,
    csv_text,
    interval,
    intervals,
    markdown_table,
    markdown_text,
    mean,
    means,
    sampling_interval,
)
from sslvit.evaluate.sources import LabeledSet
from sslvit.figures import plot_bars
from sslvit.files import printable, to_json, write_atomically
from sslvit.pages.page import heading, picture, table, text, text_rows, write_page
from sslvit.settings.bench import BenchSettings, ProbeColumn

CSV_COLUMNS = ("data", "row", "column", "mean", "interval", "values", "seconds")


@dataclass
class Measurement:
    """One entry of a table, with the scores of all its encoders and seeds."""

    data: str
    row: str
    column: str
    values: list[float]
    seconds: float
    key: str
    about: dict[str, Any]


def write_tables(
    settings: BenchSettings, sets: dict[str, tuple[LabeledSet, LabeledSet]], tables: dict[str, Scores],
    results: list[Measurement],
) -> list[Path]:  # fmt: skip
    """Write all tables into the folder of a bench, and return the files."""
    folder = Path(settings.out or "")
    markdown: list[str] = []
    content: list[str] = []
    for data, rows in tables.items():
        train, val = sets[data]
        note = (
            f"Top-1 accuracy (%) on {val.count_text} of {settings.data[data].val}; heads and fine-tuning on "
            f"{train.count_text} of {settings.data[data].train}. ± is half the 95 % interval of a mean over runs, "
            "seeds or, with one seed, draws of labels; the sampling error of an accuracy on so many images is up to "
            f"± {sampling_interval(val.images):.1f}. The reported images select nothing."
        )
        if train.index.fingerprint() == val.index.fingerprint():
            note += f" {SAME_DATA.capitalize()}."
        markdown += [f"## {markdown_text(data)}", "", markdown_table(rows), "", markdown_text(note), ""]
        content += [heading(data), table(rows), text(note)]
        if columns_of(rows):
            file = folder / f"{printable(data)}.png"
            bars = plot_bars(file, means(rows), "top-1 accuracy (%)", data, intervals(rows))
            content.append(picture(bars, "The same as bars, with the intervals."))
    spent: dict[str, float] = {}
    for result in {result.key: result for result in results}.values():  # rows may share a fine-tuning run
        spent[result.column] = spent.get(result.column, 0.0) + result.seconds
    notes = [
        f"{name}: the paper selected on the images that it reports ({column.protocol.chosen_by_paper}); not so here."
        for name, column in settings.columns.items()
        if isinstance(column, ProbeColumn) and column.kind == "linear" and column.protocol.chosen_by_paper
    ]
    notes.append("Minutes per column: " + "; ".join(f"{name} {s / 60:.1f}" for name, s in spent.items()) + ".")
    markdown += [line for note in notes for line in (markdown_text(note), "")]
    content += [heading("Cost and settings"), *(text(note) for note in notes)]
    rows_about = [
        [result.data, result.row, result.column, f"{result.seconds / 60:.1f}", _about_in_words(result.about)]
        for result in results
    ]
    content.append(text_rows(["data", "row", "column", "minutes", "how"], rows_about))
    cells = [asdict(one) | {"mean": mean(one.values), "interval": interval(one.values)} for one in results]
    lines = (cell | {"values": len(cell["values"])} for cell in cells)  # the CSV has the number of values
    files = {
        "table.md": "\n".join(markdown),
        "table.csv": csv_text(CSV_COLUMNS, ([line[key] for key in CSV_COLUMNS] for line in lines)),
        "table.json": to_json({"cells": cells, "settings": asdict(settings)}, indent=1) + "\n",
    }  # fmt: skip
    for name, written in files.items():
        write_atomically(folder / name, written)
    page = write_page(folder / "report.html", "sslvit bench", content, "bench")
    return [page, *(folder / name for name in files)]


def _about_in_words(about: dict[str, Any]) -> str:
    """Format the details of a score, without unset ones and with few digits."""
    said = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in about.items()}
    return "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in said.items() if value not in (None, {}, []))
