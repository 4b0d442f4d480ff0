"""What the commands share: files that may be written, encoders that are named."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from sslvit.commands.options import FromFile, Released, Reported, Saved
from sslvit.files import brief, to_json, write_atomically

Settings = TypeVar("Settings")


def only(kind: type[Settings], options: Any) -> Settings:
    """The settings that are among a command's options."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def report(options: Reported, text: str, content: Any) -> None:
    """Print a result as text, or with --json as one JSON document; -o writes the latter to a file."""
    print(to_json(content, indent=1) if options.json else text)
    if isinstance(options, Saved) and options.output is not None:
        write_json(options.output, content)


def write_json(path: str | Path, content: Any) -> None:
    """Write numbers for programs."""
    write_atomically(path, to_json(content, indent=1) + "\n")


def table_of(rows: dict[str, dict[str, float]], decimals: int) -> str:
    """A table of single numbers."""
    from sslvit.evaluate.scores import format_table

    return format_table({row: {name: [value] for name, value in of.items()} for row, of in rows.items()}, decimals)


def check_new(path: str | Path | None) -> None:
    """Refuse, before any work, a file that could not be written or would replace another."""
    if path is None:
        return
    if Path(path).exists():
        raise ValueError(f"{path}: already exists. Choose another file.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist. Make it first.")
    if not os.access(Path(path).parent, os.W_OK):
        raise ValueError(f"{path}: its folder cannot be written to. Choose another.")


def check_new_picture(path: str | Path | None) -> None:
    """check_new for a picture."""
    if path is not None and Path(path).suffix != ".png":
        raise ValueError(f"{path}: a picture is written as PNG. Choose a name that ends in .png.")
    check_new(path)


def foreign_overrides(options: Released) -> dict[str, Any]:
    """Settings that a released file does not tell, where they are given."""
    from sslvit.settings.palette import UNIFORM, read_palette

    given: dict[str, Any] = {"image_size": options.image_size} if options.image_size else {}
    if isinstance(options, FromFile) and options.weights:
        given["weights"] = options.weights
    if options.palette:
        given["palette"] = UNIFORM if options.palette == UNIFORM else read_palette(options.palette)
    return given


def one_source(names: list[str] | None) -> str | None:
    """What is given as data, as one name: several files, as a shell makes them of *.tar, become a pattern.

    Raises:
        ValueError: several folders, or names that a pattern cannot hold.
    """
    if not names:
        return None
    if len(names) == 1:
        return names[0]
    other = next((name for name in names if not name.endswith(".tar")), None)
    if other is not None:
        raise ValueError(
            f"--data: {len(names)} names, and {brief(other)} is no .tar file. Give one folder, or mix several: "
            "--data.mixture '{A: 1, B: 1}'"
        )
    odd = next((name for name in names if set(name) & set("{},")), None)
    if odd is not None:
        raise ValueError(f"--data: {brief(odd)}: braces and commas in a name of several. Give their folder instead.")
    return f"{{{','.join(names)}}}"
