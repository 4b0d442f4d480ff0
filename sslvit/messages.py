"""What the package says: log records as lines on the screen, and arguments in the words of who gave them.

Messages name an argument as the command line does, --labels-per-class 5. Who calls from Python reads
labels_per_class=5 in the same place.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# options without a value, which are on or off
FLAGS = frozenset(
    {"allow-same-data", "baselines", "download", "json", "merge", "overwrite", "private", "quiet", "resume", "scratch"}
)
OPTION = re.compile(
    r"""(?<![^\s("'])(?:--(?P<name>[a-z][\w-]*(?:\.[\w-]+)*)|(?P<output>-o)\b)"""
    r"""(?P<value>[ ](?:'[^']*'|\[[^]]*\]|[A-Z]{2,}(?:\s[A-Z]{2,})*\b|[NX]\b|(?:true|false|none)\b"""
    r"""|-?\d\S*?(?=[:,;.)]*(?:\s|$))|(?!\()\S*[^\s:,;.)](?=[:,;.)]+(?:\s|$)|$)))?"""
)
SHELL = re.compile(r"\b(?:sslvit [a-z]+|pip install|docker run)\b[^;:()]*$")  # a command, which is typed in any case
WORDS = {"true": "True", "false": "False", "none": "None"}
_is_command_line = False


def in_python(text: str) -> str:
    """A message whose options are written as arguments of a Python call."""
    return OPTION.sub(lambda found: found[0] if SHELL.search(text[: found.start()]) else _argument(found), text)


def _argument(found: re.Match[str]) -> str:
    name = "output" if found["output"] else found["name"]
    value = found["value"] or ""
    if name in FLAGS:
        return f"{name.replace('-', '_')}=True{value}"
    given = WORDS.get(value.strip(), value.strip())
    if re.fullmatch(r"[A-Z]+(?: [A-Z]+)+", given):
        given = f"[{', '.join(given.split())}]"
    elif given.startswith("'"):
        given = given.strip("'")
    elif given and not re.match(r"[\[\d-]|[A-Z]+$|(?:True|False|None)$", given):
        given = f'"{given}"'
    if name == "plugin":
        return f"sslvit.use_plugin({given})"
    if "." in name:
        return f'**{{"{name}": {given}}}' if given else name
    return f"{name.replace('-', '_')}={given}"


def for_python(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator for what users call from Python: its errors are in their words, unless a command calls it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if not _is_command_line:
                error.args = tuple(in_python(one) if isinstance(one, str) else one for one in error.args)
            raise

    return call


BEFORE_MESSAGE: list[Callable[[], None]] = []  # what makes room on the screen


class MessageHandler(logging.Handler):
    """Prints the message alone; warnings say so, and errors go to stderr.

    Attributes:
        to_stderr: Keep stdout free, for a command whose result there is JSON.
        outlives_reader: Whether the work goes on, unheard, when whoever reads the messages has left.
    """

    to_stderr = outlives_reader = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        stream = sys.stderr if self.to_stderr or record.levelno >= logging.ERROR else sys.stdout
        text = record.getMessage() if _is_command_line else in_python(record.getMessage())
        for make_room in BEFORE_MESSAGE:
            make_room()
        try:
            print(prefix + text, file=stream, flush=True)
        except BrokenPipeError:  # head, for example, has enough
            if not self.outlives_reader:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def messages_of(is_quiet: bool, is_json: bool, outlives_reader: bool = False) -> Iterator[None]:
    """While the block runs a command, options are called so; say warnings and errors only, or everything on stderr.

    Args:
        is_quiet: Warnings and errors only; progress bars are off, too.
        is_json: stdout is for one JSON document.
        outlives_reader: Go on, unheard, when whoever reads the messages has left.
    """
    global _is_command_line
    was_command_line, _is_command_line = _is_command_line, True
    logger = logging.getLogger("sslvit")
    level, handlers = logger.level, [one for one in logger.handlers if isinstance(one, MessageHandler)]
    logger.setLevel(logging.WARNING if is_quiet else level)
    for handler in handlers:
        handler.to_stderr, handler.outlives_reader = is_json, outlives_reader
    try:
        yield
    finally:
        _is_command_line = was_command_line
        logger.setLevel(level)
        for handler in handlers:
            handler.to_stderr = handler.outlives_reader = False
