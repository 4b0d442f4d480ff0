"""Settings that are one of a few words are checked in Python as they are in a recipe."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from sslvit.files import quoted

Settings = TypeVar("Settings", bound=type)
MAX_COMPARED = 100  # characters of a value that are compared with known ones


def checked(prefix: str) -> Callable[[Settings], Settings]:
    """A decorator, below @dataclass, that refuses values which a field's Literal does not list.

    It runs before the class's own __post_init__, which may rely on them.

    Args:
        prefix: of the keys in messages, as in "encoder.".
    """

    def decorate(kind: Settings) -> Settings:
        own = kind.__dict__.get("__post_init__")

        def __post_init__(self: Any) -> None:
            for key, words in choices_of(type(self)).items():
                if getattr(self, key) not in words:
                    raise ValueError(
                        f"{prefix}{key}: {quoted(getattr(self, key))} is not one of {', '.join(words)}."
                        f"{near(getattr(self, key), words)}"
                    )
            if own is not None:
                own(self)
            elif hasattr(super(kind, self), "__post_init__"):
                super(kind, self).__post_init__()

        kind.__post_init__ = __post_init__
        return kind

    return decorate


def near(value: Any, words: typing.Iterable[str]) -> str:
    """Which of some words was meant, as a sentence; empty where none is near."""
    found = difflib.get_close_matches(value[:MAX_COMPARED], words, n=1) if isinstance(value, str) else []
    return f" Did you mean {found[0]}?" if found else ""


@functools.cache
def choices_of(kind: type) -> dict[str, tuple[Any, ...]]:
    """Field -> the words that it may be, of a settings dataclass."""
    hints = typing.get_type_hints(kind)
    return {key: typing.get_args(hint) for key, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
