"""Parsing the command line into a command's options; settings may appear anywhere, and errors name unknown words."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections import deque
from collections.abc import Callable, Container, Mapping
from typing import Any

from sslvit.files import brief, expand_path
from sslvit.settings.build import USUAL_NAMES, build, choice_of, choices_in, convert, is_required, known_keys
from sslvit.settings.choices import Arg, alternatives, hints_of, words_of
from sslvit.settings.describe import option_texts
from sslvit.settings.load import set_keys
from sslvit.settings.run import RunSettings
from sslvit.settings.typed import read_value

Function = Callable[[Any], int | None]
MAX_OPTION = 100  # most characters to compare with known options


class UnknownCommand(Exception):
    """A word that is not the name of a command."""


def options_class(function: Function) -> type:
    """The dataclass of a command's options, which is the type of the function's argument."""
    return next(iter(typing.get_type_hints(function).values()))


def add_options(parser: argparse.ArgumentParser, kind: type, has_help: bool = True) -> None:
    """Add the fields of a dataclass to a parser as options, with the string below each field as its help.

    Args:
        parser: The parser.
        kind: The dataclass.
        has_help: Whether to read the help texts from the source code.
    """
    texts, hints = option_texts(kind) if has_help else {}, hints_of(kind)
    for field in sorted(
        dataclasses.fields(kind), key=lambda one: (not is_required(one), arg_of(hints[one.name]).position)
    ):
        hint, arg = hints[field.name], arg_of(hints[field.name])
        if is_hidden(hint):
            continue
        text, choice, names = texts.get(field.name, ""), choice_of(hint), [f"--{field.name.replace('_', '-')}"]
        more: dict[str, Any] = {"default": argparse.SUPPRESS}
        words = list(choice.records) if choice else [str(word) for word in words_of(hint) if word is not None]
        if alternatives(hint) == (bool,):
            more["action"] = argparse.BooleanOptionalAction if field.default is True else "store_true"
        else:
            number = "N" if int in types_in(hint) else "X" if float in types_in(hint) else field.name.upper()
            more["metavar"] = arg.metavar or "|".join(words) or number
            if isinstance(arg.metavar, tuple):
                more["nargs"] = len(arg.metavar)
            elif any(typing.get_origin(one) is list for one in alternatives(hint)):
                more["nargs"] = "*"
        if arg.position:
            names = [field.name]
            several = {"nargs": "+"} if "nargs" in more else {}
            more |= {"default": None} | several if is_required(field) else {"nargs": "?"}
        else:
            names = [arg.flag, *names] if arg.flag else names
            more["required"] = is_required(field)
        parser.add_argument(*names, help=text.replace("%", "%%"), **more)


def arg_of(hint: Any) -> Arg:
    """How a field appears on the command line."""
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Arg)), Arg("", is_path=False))


def is_hidden(hint: Any) -> bool:
    """Whether a field is not an option."""
    return argparse.SUPPRESS in getattr(hint, "__metadata__", ())


def types_in(hint: Any) -> list[Any]:
    """Types of a field's values; for lists, the types of the elements."""
    return [
        kind
        for one in alternatives(hint)
        for kind in (typing.get_args(one) if typing.get_origin(one) is list else (one,))
    ]


def read_options(parser: argparse.ArgumentParser, kind: type, name: str, arguments: list[str]) -> Any:
    """Parse a command's options.

    Raises:
        ValueError: An unknown option, an invalid value, or a setting without a value.
    """
    hints = hints_of(kind)
    words, settings = take_settings(arguments, parser._option_string_actions)
    for word in [setting.partition("=")[0] for setting in settings if setting.startswith("--")]:
        is_known = "changes" in hints and word[2:].replace("-", "_") in _names_of_settings()
        hint = "" if "." in word or is_known else hint_for_option(word, parser)
        is_setting = "changes" in hints or choice_of(hints.get(word[2:].partition(".")[0]))
        if hint or not is_setting:
            raise ValueError(f"{brief(word)}: no such option.{hint} See: {name} --help")
    changes = read_changes(settings, getattr(kind, "read_setting", read_value))
    given, rest = parser.parse_known_args(words)
    if rest and "changes" in hints:
        raise ValueError(f"{brief(rest[0])}: expected --key value, as in --train.epochs 10.")
    if rest:
        raise ValueError(f"{brief(rest[0])}: one word too many, or no such option. See: {name} --help")
    found = {key: read_option(hints[key], value, f"--{key.replace('_', '-')}") for key, value in vars(given).items()}
    tree: dict[str, Any] = {}
    set_keys(kind, tree, found | ({"changes": changes} if "changes" in hints else changes))
    return build(kind, tree)


def read_option(hint: Any, value: Any, option: str) -> Any:
    """Convert an option's words to its field's type: text is kept as it is, everything else is parsed as YAML."""
    if choice_of(hint):
        return value
    kinds = types_in(hint)
    if arg_of(hint).is_path and str in kinds:
        value = [expand_path(word) for word in value] if isinstance(value, list) else expand_path(value)
    elif isinstance(value, (str, list)) and str not in kinds and not words_of(hint):
        value = [read_value(word) for word in value] if isinstance(value, list) else read_value(value)
    return convert(hint, None if value == "none" and type(None) in kinds else value, option)


def find_command(commands: Mapping[str, Function], arguments: list[str]) -> tuple[str, list[str]]:
    """Split arguments into the command's name and the rest; the name is empty if --help or --version comes first.

    Raises:
        UnknownCommand: There is no such command; the message suggests the most similar one.
    """
    name, rest = "", list(arguments)
    while rest and name not in commands:
        at = next((i for i, word in enumerate(rest) if not word.startswith("-")), None)
        if at is None or {"-h", "--help", "--version"} & set(rest[:at]):
            break
        word, known = rest.pop(at), {one.removeprefix(name).split()[0] for one in commands if one.startswith(name)}
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}."
            raise UnknownCommand(f"{brief(word)}: no such command. {hint} See: {f'sslvit {name}'.strip()} --help")
        name = f"{name}{word}" if f"{name}{word}" in commands else f"{name}{word} "
    return name.strip(), rest


def hint_for_option(word: str, parser: argparse.ArgumentParser) -> str:
    """Suggest the option most similar to a word, as a sentence."""
    near = difflib.get_close_matches(word[:MAX_OPTION], parser._option_string_actions, n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""


def _names_of_settings() -> set[str]:
    """Names of all recipe settings without their sections, and their names in other libraries."""
    records = [record for choice in choices_in(RunSettings).values() for record in choice.records.values()]
    names = {key.rpartition(".")[2] for key in known_keys(RunSettings)}
    return names.union(*USUAL_NAMES.values(), *map(hints_of, records))


def take_settings(arguments: list[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """Separate words for argparse from settings with their values, which may appear anywhere.

    A setting always takes one value, so the value is never mistaken for a positional argument, or the reverse.
    """
    words, settings, left = [], [], deque(arguments)
    while left:
        word = left.popleft()
        if word == "--":
            words += [word, *left]
            break
        if not word.startswith("--") or word.partition("=")[0] in known:
            words.append(word)
            continue
        settings.append(word)
        if "=" not in word and left and not left[0].startswith("--"):
            settings.append(left.popleft())
    return words, settings


def read_changes(rest: list[str], read: Callable[[str], Any] = read_value) -> dict[str, Any]:
    """Parse --encoder.width 192 --train.steps=5 to {"encoder.width": 192, "train.steps": 5}; `read` parses values."""
    changes: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        match = re.fullmatch(r"--([a-z][\w-]*(?:\.[\w-]+)*)(?:=(.*))?", word, re.DOTALL | re.IGNORECASE)
        if not match:
            raise ValueError(f"{brief(word)}: expected --key value, as in --train.epochs 10.")
        key, value = match.groups()
        if value is None:
            value = next(words, None)
        if value is None or value.startswith("--"):
            raise ValueError(f"--{brief(key)}: no value given.")
        changes.pop(key, None)  # a repeated setting counts at its last position
        try:
            changes[key] = read(value)
        except ValueError as error:
            raise ValueError(f"--{key}: {error}") from error
    return changes
