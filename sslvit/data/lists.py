"""Samples from a list of image files (CSV, TSV, JSONL), with or without labels."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslvit.data.labels import LABEL_NAMES, NO_LABEL, NotClasses, Unlabeled, brief_names, number_labels
from sslvit.data.sources import FileImages, ImageSource, Sample
from sslvit.files import printable

PATH_COLUMNS = ("path", "file", "filename", "image", "filepath", "file_name", "image_path", "img")
LISTS = {".csv": ",", ".tsv": "\t", ".jsonl": None}


def list_source(path: Path, label_column: str | None = None) -> ImageSource:
    """Read a CSV, TSV or JSONL list with a column of paths, relative to the list, and an optional column of labels.

    Without `label_column`, labels come from the first column with a usual name.

    Raises:
        ValueError: a column is missing, or a line is unreadable or names a missing image; the message gives the line.
    """
    try:
        rows = list(_rows(path))
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{printable(path)}: not in UTF-8 ({where}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"{printable(path)}: not readable ({error}).") from error
    if not rows:
        raise ValueError(f"{printable(path)}: an empty list.")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))  # the first row may lack some
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    path_key = next((by_name[name] for name in PATH_COLUMNS if name in by_name), None)
    if path_key is None:
        raise ValueError(
            f"{printable(path)}: no column of paths among {brief_names(columns)}. "
            f"Name it one of {', '.join(PATH_COLUMNS)}."
        )
    if label_column is None:
        label_key = next((by_name[name] for name in LABEL_NAMES if name in by_name), None)
    elif (label_key := by_name.get(label_column.strip().lower())) is None:
        raise ValueError(f"--label-column {label_column}: not a column of {printable(path)} ({brief_names(columns)}).")
    files, entries = FileImages(), []
    for line, row in rows:
        name, label = row.get(path_key), row.get(label_key) if label_key else None
        if not name or (label_key and label in (None, "")):
            missing = label_key if name and label_key else path_key
            raise ValueError(f"{printable(path)}, line {line}: no {printable(missing.strip())} given.")
        full = _find(path.parent, str(name))
        if full is None:
            raise ValueError(f"{printable(path)}, line {line}: {printable(path.parent / str(name))} does not exist.")
        entries.append((full, str(name).strip(), label))
    classes, numbers, notes = None, [NO_LABEL] * len(entries), []
    if label_key:
        try:
            classes, numbers = number_labels([label for *_, label in entries])
            notes = [f"labels: column {printable(label_key.strip())}"]
        except Unlabeled as error:
            notes = [f"column {printable(label_key.strip())}: {error}"]
        except NotClasses as error:
            raise ValueError(
                f"{printable(path)}: {error} (column {printable(label_key.strip())}). Remove that column, or name "
                "the one that holds classes with --label-column."
            ) from error
    samples = []
    for (full, name, _), number in zip(entries, numbers, strict=True):
        stem, suffix = os.path.splitext(name)
        about = os.stat(full)
        samples.append(Sample(stem, suffix.lower(), files, full, number, about.st_size, about.st_mtime_ns))
    unused = [column.strip() for column in columns if column not in (path_key, label_key)]
    if unused:
        remedy = "" if label_key else f" (for labels: --label-column {printable(unused[0])})"
        notes.append(f"columns that are not used: {brief_names(unused)}{remedy}")
    return ImageSource(samples, classes, notes=notes)


def _find(folder: Path, name: str) -> str | None:
    """Path of a listed file; blanks around the name are stripped if it does not exist with them."""
    for text in (name, name.strip()):
        full = os.path.join(folder, text)
        if "\0" not in text and os.path.isfile(full):
            return full
    return None


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield (line number, row as a dict) for each line of a list."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".jsonl":
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{printable(path)}, line {line}: not JSON ({printable(error, 80)}).") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{printable(path)}, line {line}: expected an object with keys, found {printable(row, 40)}."
                    )
                yield line, row
        else:
            reader = csv.DictReader(file, delimiter=LISTS[path.suffix.lower()] or ",", skipinitialspace=True)
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{printable(path)}, line {reader.line_num}: more fields than the {len(row) - 1} columns."
                    )
                yield reader.line_num, row
