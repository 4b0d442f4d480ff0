"""Settings that take one of several words, and sections that take one of several dataclasses."""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sslvit.files import quoted

Record = TypeVar("Record", bound=type)
MAX_COMPARED = 100  # characters of a value to compare with known ones


@dataclass(frozen=True)
class Choice:
    """Annotation of a field that holds one of several settings dataclasses.

    Args:
        key: Field whose value selects the dataclass.
        default: Value of the field if none is given.
        records: Known values -> dataclasses.
        find: Looks up the dataclass for any other value; returns None if it is unknown.
    """

    key: str
    default: str
    records: Mapping[str, type]
    find: Callable[[str], type | None] = lambda name: None

    def record(self, name: Any, section: str) -> type:
        """The dataclass of a name; raises ValueError if there is none."""
        found = (self.records.get(name) or self.find(name)) if isinstance(name, str) else None
        if found is None:
            raise ValueError(f"{section}.{self.key}: {not_one_of(name, self.records)}")
        return found


@dataclass(frozen=True)
class Arg:
    """Annotation of a field that is a path or a positional argument on the command line.

    Args:
        metavar: Placeholder for the value in the help; a tuple for several values.
        position: Position among the positional arguments, from 1; 0 for an option.
        flag: One letter for the option, such as -o.
        is_path: Whether ~ and $HOME are expanded.
    """

    metavar: str | tuple[str, ...]
    position: int = 0
    flag: str = ""
    is_path: bool = True


@dataclass(frozen=True)
class Also:
    """Annotation of a field that also accepts another type, which __post_init__ converts to the declared one."""

    kind: Any


def checked(prefix: str) -> Callable[[Record], Record]:
    """Class decorator, below @dataclass, that rejects values not listed in a field's Literal.

    The check runs before the class's own __post_init__, which can rely on it.

    Args:
        prefix: Prefix of the keys in messages, as in "encoder.".
    """

    def decorate(kind: Any) -> Any:
        original = kind.__dict__.get("__post_init__")

        def __post_init__(self: Any) -> None:
            kind_of_self: Any = type(self)
            for key, words in choices_of(kind_of_self).items():
                if getattr(self, key) not in words:
                    name = key.replace("_", "-") if prefix == "--" else key
                    raise ValueError(f"{prefix}{name}: {not_one_of(getattr(self, key), words)}")
            if original is not None:
                original(self)
            elif hasattr(super(kind, self), "__post_init__"):
                super(kind, self).__post_init__()

        kind.__post_init__ = __post_init__
        return kind

    return decorate


BOUNDS: dict[str, Callable[[float], bool]] = {  # wording in messages -> check
    "positive": lambda value: 0 < value < math.inf,
    "0 or more": lambda value: 0 <= value < math.inf,
    "1 or more": lambda value: value >= 1,
    "2 or more": lambda value: value >= 2,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "a probability in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
}


def check_bounds(settings: object, prefix: str, bounds: str, *keys: str) -> None:
    """Raise ValueError for the first of the given fields that violates `bounds`, one of BOUNDS.

    Missing fields and None are skipped; in a list, every number is checked.
    """
    for key in keys:
        found = getattr(settings, key, None)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and not BOUNDS[bounds](value):
                name = key.replace("_", "-") if prefix == "--" else key
                between = (" ", ":") if prefix.startswith("--") else (": ", "")
                raise ValueError(f"{prefix}{name}{between[0]}{value}{between[1]} must be {bounds}.")


def not_one_of(value: object, words: Iterable[object]) -> str:
    """Message about a value that is not one of some words, with the most similar word."""
    known = [str(word).lower() if isinstance(word, bool) else str(word) for word in words if word is not None]
    return f"{in_message(value)} is not one of {', '.join(known)}.{near(value, known)}"


def in_message(value: object) -> str:
    """Format a value as in YAML, shortened if it is long."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else quoted(value)


def near(value: object, words: Iterable[str], most: int = 1) -> str:
    """Suggest at most `most` similar words, as a sentence; empty if none is similar."""
    found = difflib.get_close_matches(value[:MAX_COMPARED], words, n=most) if isinstance(value, str) else []
    return f" Did you mean {', '.join(found)}?" if found else ""


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Field -> annotation of a settings dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind)}


def plain(hint: Any) -> Any:
    """An annotation without the metadata of Annotated."""
    return hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union and the types of Also; the annotation itself if it is not a union."""
    also = tuple(one.kind for one in getattr(hint, "__metadata__", ()) if isinstance(one, Also))
    hint = plain(hint)
    return (*also, *(typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)))


def words_of(hint: Any) -> tuple[Any, ...]:
    """The words (and None) that an annotation allows; empty if it allows other values."""
    words: tuple[Any, ...] = ()
    for one in alternatives(hint):
        if one is not type(None) and typing.get_origin(one) is not typing.Literal:
            return ()
        words += (None,) if one is type(None) else typing.get_args(one)
    return words


@functools.cache
def choices_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    """Field -> allowed words, for the fields of a settings dataclass that are restricted to words."""
    return {key: words for key, hint in hints_of(kind).items() if (words := words_of(hint))}
