"""Helpers of the commands: printing and writing results, and options of released files."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from sslvit.commands.options import FromFile, Released, Reported, Saved
from sslvit.files import to_json, write_atomically

Settings = TypeVar("Settings")


def only(kind: type[Settings], options: Any) -> Settings:
    """Extract a settings dataclass from a command's options."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def report(options: Reported, text: str, content: Any) -> None:
    """Print a result as text, or as one JSON document with --json; -o writes the JSON document to a file."""
    print(to_json(content, indent=1) if options.json else text)
    if isinstance(options, Saved) and options.output is not None:
        write_json(options.output, content)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file."""
    write_atomically(path, to_json(content, indent=1) + "\n")


def foreign_overrides(options: Released) -> dict[str, Any]:
    """The given settings that a released file does not include."""
    from sslvit.settings.palette import UNIFORM, read_palette

    given: dict[str, Any] = {"image_size": options.image_size} if options.image_size else {}
    if isinstance(options, FromFile) and options.weights:
        given["weights"] = options.weights
    if options.palette:
        given["palette"] = UNIFORM if options.palette == UNIFORM else read_palette(options.palette)
    return given
