"""A grid of settings: parse lists of values, combine them, and name each combination."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sslvit.files import brief, quoted
from sslvit.settings.load import YAML_ERRORS
from sslvit.settings.typed import read_plain, read_value

MAX_NAME = 200  # characters of a folder name; file systems allow 255
SWEPT = "encoder.depth 2,4"


def read_values(text: str) -> list[Any]:
    """Parse several values of a setting, written as a YAML list without its brackets.

    Commas separate values: 2,4. A list as a value needs brackets, [0.9,0.95],[0.9,0.999], and text with a comma needs
    quotes. Text without commas that is not valid YAML is a single value.

    Raises:
        ValueError: The text contains a comma and is not valid YAML.
    """
    try:
        return read_plain(f"[{text}]") or [None]
    except YAML_ERRORS as error:
        if "," in text:
            raise ValueError(
                f"{quoted(text)} is no list of values. Put text with a comma or a sign of YAML in quotes within the "
                "shell's, as in \"'a,b',c\"."
            ) from error
        return [text]


def plain_grid(grid: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Convert the values of a grid to types of YAML: paths to text, NumPy numbers to Python's, tuples to lists.

    Args:
        grid: Dotted key -> values.

    Raises:
        ValueError: A key has no list of values, or a value has an unsupported type.
    """
    for key, values in grid.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{key}: expected a list of values, not {quoted(values)}.")
    return {key: [_to_plain(key, value) for value in values] for key, values in grid.items()}


def _to_plain(key: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_to_plain(key, one) for one in value]
    if isinstance(value, dict):
        return {name: _to_plain(key, one) for name, one in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{key}: expected numbers, text, true, false, null or lists, not {brief(value)}.")


def combinations(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Name of each run -> its settings by dotted key, in the order of the keys; the last key changes fastest.

    Args:
        grid: Dotted key -> values, several of at least one key.

    Raises:
        ValueError: No key has several values, one has none or the same twice, or two runs would have one name.
    """
    grid = plain_grid(grid)
    for key, values in grid.items():
        if doubles := [one for number, one in enumerate(values) if one in values[:number]]:
            raise ValueError(f"{key}: {brief(doubles[0])} stands there twice.")
    swept = swept_keys(grid)
    if not swept:
        raise ValueError(f"sweep: no setting has several values. Give them with commas, as in --{SWEPT}.")
    runs: dict[str, dict[str, Any]] = {}
    for chosen in itertools.product(*grid.values()):
        changes = dict(zip(grid, chosen, strict=True))
        name = name_run({key: changes[key] for key in swept})
        if name in runs:
            raise ValueError(f"sweep: two runs would be called {brief(name)}. Sweep their values one after the other.")
        if len(name) > MAX_NAME:
            raise ValueError(f"sweep: {brief(name)} is too long a name for a folder. Sweep fewer settings at once.")
        runs[name] = changes
    return runs


def name_run(values: Mapping[str, Any]) -> str:
    """The name of a run's folder, made from its values of the swept settings.

    Args:
        values: Dotted key -> value.
    """
    return ",".join(f"{key}={format_for_name(values[long])}" for long, key in shorten_keys(list(values)).items())


def swept_keys(grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The keys that have several values."""
    return [key for key, values in grid.items() if len(values) > 1]


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Key -> the key without its section, unless another key has the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def format_for_name(value: Any) -> str:
    """Format a value for a file name, with letters, digits, dots, signs and underscores only."""
    values = value if isinstance(value, list) else [value]
    words = [f"{one:.0f}" if isinstance(one, float) and one in range(10**6) else format_value(one) for one in values]
    pieces = re.split(r"[^\w.+-]+", "\0".join(words), flags=re.ASCII)
    return "-".join(piece for piece in pieces if piece) or "empty"


def format_value(value: Any) -> str:
    """Format a value as it would be typed for a setting."""
    if isinstance(value, str) and read_value(value) == value:
        return value
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
