"""Descriptions of settings, from the text below each field of a settings dataclass."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any

from sslvit.files import brief
from sslvit.settings.build import Known, choice_of, choices_in, hint_for, is_required, record_of
from sslvit.settings.choices import Choice, hints_of, near, words_of
from sslvit.settings.encoder import EncoderSettings
from sslvit.settings.presets import INIT, PRESETS
from sslvit.settings.run import RunSettings, find_task

BASE = "Recipe, or YAML file beside this one, whose settings this one's change. A key of YAML files only."
PRESET = (
    "Architecture whose settings are set where it is said; later words change them. One of "
    f"{', '.join(PRESETS)}, or {INIT} for that of the weights of --init."
)


def field_texts(kind: type) -> dict[str, str]:
    """Field -> the text below it, for a dataclass and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        texts |= _texts_in(base.__module__).get(base.__name__, {})
    return texts


def option_texts(kind: type) -> dict[str, str]:
    """`field_texts` for the options of a command, with defaults added and null replaced by its meaning."""
    texts, hints = field_texts(kind), hints_of(kind)
    for field in (one for one in fields(kind) if one.name in texts):
        default, choice = default_of(field), choice_of(hints[field.name])
        text = re.sub(r"[;,] null for ([^;]*)\.$", r" (default: \1).", texts[field.name])
        default_text = " ".join(map(str, default)) if isinstance(default, list) else in_yaml(default)
        if default is not None and default is not False and default_text and "(default:" not in text:
            text = f"{text.removesuffix('.')} (default: {choice.default if choice else default_text})."
        texts[field.name] = text
    return texts


@functools.cache
def _texts_in(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> text, of all classes in a module."""
    found: dict[str, dict[str, str]] = {}
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # the source of a plugin may not be available
        return {}
    for kind in ast.parse(source).body:
        if isinstance(kind, ast.ClassDef):
            found[kind.name] = {
                ast.unparse(field.target): " ".join(str(text.value.value).split())
                for field, text in pairwise(kind.body)
                if isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
    return found


Explained = tuple[type, str, Any, str]  # dataclass, key, default and description of a setting


def describe_settings(settings: Iterable[Explained], width: int = 80) -> str:
    """Format keys with defaults and descriptions, one paragraph per section."""
    lines: list[str] = []
    previous: type | None = None
    for record, key, default, text in settings:
        lines += [""] if record is not previous and lines else []
        previous = record
        lines += textwrap.wrap(
            f"{key} ({in_yaml(default)}): {text}", width, subsequent_indent="    ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def select_settings(name: str | None) -> list[Explained]:
    """Select the settings of a section such as train or data.view, or one setting.

    Args:
        name: Name of a section, of a setting with or without its section, or of a plugin's task; None for all settings.

    Raises:
        ValueError: The name is unknown; the message suggests the nearest.
    """
    every, choices = list(explained_settings()), choices_in(RunSettings)
    if name is None:
        return every
    if (plugin := find_task(name)) is not None:
        return list(explained_settings(plugin.settings_class, "task."))
    name = name.replace("-", "_").removesuffix(".")
    if section := [one for one in every if one[1].startswith(f"{name}.")]:
        return section
    found = [_with_owner(*one, choices) for one in every if one[1] == name or one[1].endswith(f".{name}")]
    if not found:
        keys = [one[1] for one in every]
        sections = {key.rpartition(".")[0] for key in keys}
        hint = hint_for(name, Known(keys, choices)) or near(name, sections) or " All: sslvit settings"
        raise ValueError(f"{brief(name)}: no such setting or section.{hint}")
    return found


def _with_owner(record: type, key: str, default: Any, text: str, choices: dict[str, Choice]) -> Explained:
    """Add the value that selects the setting's dataclass, if its section is a choice of several."""
    section, _, last = key.rpartition(".")
    choice = choices.get(section)
    if choice and last != choice.key:
        owners = [word for word, one in choice.records.items() if one is record]
        text += f" A setting of {section}.{choice.key} {' or '.join(owners)}."
    return record, key, default, text


def explained_settings(kind: type = RunSettings, prefix: str = "", choice: Choice | None = None) -> Iterator[Explained]:
    """Yield dataclass, key, default and description of each setting."""
    texts, hints = field_texts(kind), hints_of(kind)
    if kind is EncoderSettings:
        yield kind, f"{prefix}preset", None, PRESET
    for field in fields(kind):
        key, hint, text = prefix + field.name, hints[field.name], texts.get(field.name, "")
        words = [in_yaml(word) for word in words_of(hint) if word is not None]
        if choice and field.name == choice.key:
            text += f" One of {', '.join(choice.records)}; the keys below are those of {field.default}."
        elif not all(re.search(rf"\b{re.escape(word)}\b", text) for word in words):
            text += f" One of {', '.join(words)}."
        inner = choice_of(hint)
        if inner:
            for record in inner.records.values():
                yield from explained_settings(record, f"{key}.", inner)
        elif record_type := record_of(hint, {}, key):
            yield from explained_settings(record_type, f"{key}.")
        else:
            yield kind, key, default_of(field), text
    if kind is RunSettings:
        yield kind, "base", None, BASE


def default_of(field: Any) -> Any:
    """The default of a dataclass field; None if there is none."""
    if is_required(field):
        return None
    return field.default_factory() if field.default is MISSING else field.default


def in_yaml(value: Any) -> str:
    """Format a value as in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
