"""What was typed -> options and settings: settings may stand anywhere, and whatever is unknown is named."""

from __future__ import annotations

import argparse
import difflib
import re
from collections import deque
from collections.abc import Container
from typing import Any

import yaml

from sslvit.files import brief, expand_path
from sslvit.settings.load import YAML_ERRORS

# options that hold a path, of all commands
PATHS = (
    "archive", "cache", "checkpoint", "complete", "config", "data", "destination", "encoder", "figure", "folder",
    "incident", "init", "out", "output", "palette", "run", "scores", "shards", "source", "train", "val",
)  # fmt: skip
MAX_OPTION = 100  # characters that are compared with known options


class UnknownCommand(Exception):
    """A word that is no command."""


def read_options(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What was typed; settings, which argparse does not know, as `changes`.

    Args:
        parser: of all commands.
        arguments: as typed.

    Raises:
        UnknownCommand: the first word is no command.
        ValueError: an option that there is not, or a setting without a value.
    """
    name, used = find_parser(parser, arguments)
    words, settings = take_settings(arguments, used._option_string_actions)
    for word in [setting.partition("=")[0] for setting in settings if setting.startswith("--")]:
        hint = "" if "." in word else hint_for_option(word, used)
        if hint or not used.get_default("takes_settings"):
            raise ValueError(f"{brief(word)}: no such option.{hint} See: {name} --help")
    changes = read_changes(settings)
    options, rest = parser.parse_known_args(words)
    if rest and used.get_default("takes_settings"):
        raise ValueError(f"{brief(rest[0])}: expected --key value, as in --train.epochs 10.")
    if rest:
        raise ValueError(f"{brief(rest[0])}: one word too many, or no such option. See: {name} --help")
    options.changes = changes
    for key in PATHS:
        value = getattr(options, key, None)
        if isinstance(value, str) and value != used.get_default(key):
            setattr(options, key, expand_path(value))
        elif isinstance(value, list):
            setattr(options, key, [expand_path(one) for one in value])
    return options


def find_parser(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[str, argparse.ArgumentParser]:
    """The command that is meant, as it is typed, and its parser.

    Raises:
        UnknownCommand: there is none of that name; the message names the nearest.
    """
    name = "sslvit"
    for word in arguments:
        commands = parser.get_default("commands")
        if commands is None:
            break
        if word.startswith("-"):
            continue
        if word not in commands:
            near = difflib.get_close_matches(word, commands, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(commands)}."
            raise UnknownCommand(f"{brief(word)}: no such command. {hint} See: {name} --help")
        name, parser = f"{name} {word}", commands[word]
    return name, parser


def hint_for_option(word: str, parser: argparse.ArgumentParser) -> str:
    """The option that a word nearly is, as a sentence."""
    near = difflib.get_close_matches(word[:MAX_OPTION], parser._option_string_actions, n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""


def take_settings(arguments: list[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """Words for argparse, and settings with their values, wherever those stand.

    A setting always takes one value, so what follows that is never taken for it, nor it for a positional argument.

    Args:
        arguments: as typed.
        known: options that argparse knows.
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


def read_changes(rest: list[str]) -> dict[str, Any]:
    """--encoder.width 192 --train.steps=5 -> {"encoder.width": 192, "train.steps": 5}."""
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
        changes[key] = read_value(value)
    return changes


def read_value(text: str) -> Any:
    """A value as YAML reads it, and 1e-3 as a number too, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
    except YAML_ERRORS:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE):
        return float(value)
    return value
