"""A grid of settings: how several values are typed, their combinations, and a readable name for each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sslvit.files import brief, quoted
from sslvit.settings.load import YAML_ERRORS

MAX_NAME = 200  # characters of a folder's name, of which file systems take 255
SWEPT = "encoder.depth 2,4"


def read_values(text: str) -> list[Any]:
    """The values of a setting as they are typed: those of a YAML list without its brackets.

    Commas separate values: 2,4. A value that is a list stands in brackets, [0.9,0.95],[0.9,0.999], and text with a
    comma in quotes. What YAML cannot read so is one value, the text.
    """
    try:
        return yaml.safe_load(f"[{text}]") or [None]
    except YAML_ERRORS:
        return [text]


def combinations(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Name of each run -> its settings by dotted key, in the order of the keys; the last key changes fastest.

    Args:
        grid: Dotted key -> values, several of at least one key.

    Raises:
        ValueError: No key has several values, one has none or the same twice, or two runs would have one name.
    """
    for key, values in grid.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{key}: expected a list of values, not {quoted(values)}.")
        if double := next((one for number, one in enumerate(values) if one in values[:number]), None):
            raise ValueError(f"{key}: {brief(double)} stands there twice.")
    swept = swept_keys(grid)
    if not swept:
        raise ValueError(f"sweep: no setting has several values. Give them with commas, as in --{SWEPT}.")
    short = short_names(swept)
    runs: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        name = ",".join(f"{short[key]}={in_name(changes[key])}" for key in swept)
        if name in runs:
            raise ValueError(f"sweep: two runs would be called {brief(name)}. Sweep their values one after the other.")
        if len(name) > MAX_NAME:
            raise ValueError(f"sweep: {brief(name)} is too long a name for a folder. Sweep fewer settings at once.")
        runs[name] = changes
    return runs


def swept_keys(grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The keys that have several values."""
    return [key for key, values in grid.items() if len(values) > 1]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key without its section, where no other key ends so."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def in_name(value: Any) -> str:
    """A value as a part of a file's name: letters, digits, dots, signs and underscores."""
    words = [in_words(one) for one in value] if isinstance(value, list) else [in_words(value)]
    return re.sub(r"[^\w.+-]+", "-", "-".join(words), flags=re.ASCII).strip("-") or "empty"


def in_words(value: Any) -> str:
    """A value as it is typed behind its key."""
    if isinstance(value, str) and _read(value) == value:
        return value
    return str(value) if isinstance(value, float) else json.dumps(value)


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except YAML_ERRORS:
        return text
