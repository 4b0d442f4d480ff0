"""How the package's log records reach the screen: one line each, as the commands print theirs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEFORE_MESSAGE: list[Callable[[], None]] = []  # what makes room on the screen


class MessageHandler(logging.Handler):
    """Prints the message alone; warnings say so, and errors go to stderr.

    Args:
        to_stderr: Keep stdout free, for a command whose result there is JSON.

    Attributes:
        outlives_reader: Whether the work goes on, unheard, when whoever reads the messages has left.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        super().__init__()
        self.to_stderr, self.outlives_reader = to_stderr, False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        stream = sys.stderr if self.to_stderr or record.levelno >= logging.ERROR else sys.stdout
        for make_room in BEFORE_MESSAGE:
            make_room()
        try:
            print(prefix + record.getMessage(), file=stream, flush=True)
        except BrokenPipeError:  # head, for example, has enough
            if not self.outlives_reader:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def messages_of(is_quiet: bool, is_json: bool, outlives_reader: bool = False) -> Iterator[None]:
    """While the block runs, say warnings and errors only, or say everything on stderr.

    Args:
        is_quiet: Warnings and errors only; progress bars are off, too.
        is_json: stdout is for one JSON document.
        outlives_reader: Go on, unheard, when whoever reads the messages has left.
    """
    logger = logging.getLogger("sslvit")
    level, handlers = logger.level, [one for one in logger.handlers if isinstance(one, MessageHandler)]
    logger.setLevel(logging.WARNING if is_quiet else level)
    for handler in handlers:
        handler.to_stderr, handler.outlives_reader = is_json, outlives_reader
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            handler.to_stderr = handler.outlives_reader = False
