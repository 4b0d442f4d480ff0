"""Messages of the package: log records printed as lines, with arguments written the way the user gave them.

Messages are written with command-line options, such as --labels-per-class 5. When the package is called from Python,
they are rewritten as Python arguments, labels_per_class=5.
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

# boolean options, which take no value
FLAGS = frozenset({
    "allow-same-data", "baselines", "download", "json", "measure", "merge", "overwrite", "private", "quiet", "resume",
    "scratch",
})  # fmt: skip
OPTION = re.compile(
    r"""(?<![^\s("'])(?:--(?P<name>[a-z][\w-]*(?:\.[\w-]+)*)|(?P<output>-o)\b)"""
    r"""(?P<value>[ ](?:'[^']*'|\[[^]]*\]|[A-Z]{2,}(?:\s[A-Z]{2,})*\b|[NX]\b|(?:true|false|none)\b"""
    r"""|-?\d\S*?(?=[:,;.)]*(?:\s|$))|(?!\()\S*[^\s:,;.)](?=[:,;.)]+(?:\s|$)|$)))?"""
)
# a shell command, which is not rewritten: up to the end of its sentence
SHELL = re.compile(r"\b(?:sslvit [a-z]+|pip install|docker run)\b(?:(?!\.\s)[^;:()])*$")
WORDS = {"true": "True", "false": "False", "none": "None"}
_is_command_line = False


def in_python(text: str) -> str:
    """Rewrite the options in a message as arguments of a Python call."""
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
    """Decorator for the Python API: rewrites options in error messages as Python arguments, except within a command."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if not _is_command_line:
                error.args = tuple(in_python(one) if isinstance(one, str) else one for one in error.args)
            raise

    return call


BEFORE_MESSAGE: list[Callable[[], None]] = []  # called before each message, such as to erase progress bars


class MessageHandler(logging.Handler):
    """Prints messages without level or name, except for a "warning: " prefix; errors go to stderr.

    Attributes:
        to_stderr: Print everything on stderr, for a command that prints JSON on stdout.
        outlives_reader: Whether work goes on without output when the reader of a pipe, such as head, has exited.
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
        except BrokenPipeError:  # the reader, such as head, has exited
            if not self.outlives_reader:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def messages_of(is_quiet: bool, is_json: bool, outlives_reader: bool = False) -> Iterator[None]:
    """Configure messages while the block runs a command: options as on the command line, level, and output stream.

    Args:
        is_quiet: Print only warnings and errors, and no progress bars.
        is_json: Print messages on stderr, since stdout is for one JSON document.
        outlives_reader: Go on without output when the reader of the messages has exited.
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
