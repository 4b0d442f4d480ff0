"""Settings that are one of a few words, and sections that are one of several records."""

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
MAX_COMPARED = 100  # characters of a value that are compared with known ones


@dataclass(frozen=True)
class Choice:
    """Annotation of a field that holds one of several settings dataclasses.

    Args:
        key: Field of those dataclasses whose value picks one.
        default: Its value where none is given.
        records: Dataclass of each known value.
        find: Looks up the dataclass of any other value, None for an unknown one.
    """

    key: str
    default: str
    records: Mapping[str, type]
    find: Callable[[str], type | None] = lambda name: None

    def record(self, name: Any, section: str) -> type:
        """The dataclass of a name; ValueError where there is none."""
        found = (self.records.get(name) or self.find(name)) if isinstance(name, str) else None
        if found is None:
            raise ValueError(f"{section}.{self.key}: {not_one_of(name, self.records)}")
        return found


@dataclass(frozen=True)
class Arg:
    """Annotation of a field that is a path or a positional argument on the command line.

    Args:
        metavar: What stands for the value in the help; one word for each of several values.
        position: Place among the positional arguments, from 1; 0 for an option.
        flag: One letter for the option, such as -o.
        is_path: Whether ~ and $HOME are expanded.
    """

    metavar: str | tuple[str, ...]
    position: int = 0
    flag: str = ""
    is_path: bool = True


@dataclass(frozen=True)
class Also:
    """Annotation of a field that takes values of another type, too, which __post_init__ turns into the declared one."""

    kind: Any


def checked(prefix: str) -> Callable[[Record], Record]:
    """A decorator, below @dataclass, that refuses values which a field's Literal does not list.

    It runs before the class's own __post_init__, which may rely on them.

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


BOUNDS: dict[str, Callable[[float], bool]] = {  # in the words of a message
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
    """Raise ValueError on the first number, of those that there are, that is out of bounds, one of BOUNDS.

    A list is out of bounds where one of its numbers is.
    """
    for key in keys:
        found = getattr(settings, key, None)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and not BOUNDS[bounds](value):
                name = key.replace("_", "-") if prefix == "--" else key
                between = (" ", ":") if prefix.startswith("--") else (": ", "")
                raise ValueError(f"{prefix}{name}{between[0]}{value}{between[1]} must be {bounds}.")


def not_one_of(value: object, words: Iterable[object]) -> str:
    """What is wrong with a value that is none of some words, and which of them was meant."""
    known = [str(word).lower() if isinstance(word, bool) else str(word) for word in words if word is not None]
    return f"{in_message(value)} is not one of {', '.join(known)}.{near(value, known)}"


def in_message(value: object) -> str:
    """A value as YAML writes it, cut if it is long."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else quoted(value)


def near(value: object, words: Iterable[str], most: int = 1) -> str:
    """Which of some words, or at most how many of them, may be meant, as a sentence; empty where none is near."""
    found = difflib.get_close_matches(value[:MAX_COMPARED], words, n=most) if isinstance(value, str) else []
    return f" Did you mean {', '.join(found)}?" if found else ""


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Field -> annotation, of a settings dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind)}


def plain(hint: Any) -> Any:
    """An annotation without what stands beside the type in Annotated."""
    return hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The annotations of a union; the annotation itself if it is none."""
    also = tuple(one.kind for one in getattr(hint, "__metadata__", ()) if isinstance(one, Also))
    hint = plain(hint)
    return (*also, *(typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)))


def words_of(hint: Any) -> tuple[Any, ...]:
    """The words that an annotation allows, null included; empty where it allows anything else."""
    words: tuple[Any, ...] = ()
    for one in alternatives(hint):
        if one is not type(None) and typing.get_origin(one) is not typing.Literal:
            return ()
        words += (None,) if one is type(None) else typing.get_args(one)
    return words


@functools.cache
def choices_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    """Field -> the words that it may be, of a settings dataclass."""
    return {key: words for key, hint in hints_of(kind).items() if (words := words_of(hint))}
