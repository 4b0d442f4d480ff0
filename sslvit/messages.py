"""How the package's log records reach the screen: one line each, as the commands print theirs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MessageHandler(logging.Handler):
    """Prints the message alone; warnings say so, and errors go to stderr.

    Args:
        to_stderr: Keep stdout free, for a command whose result there is JSON.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        stream = sys.stderr if self.to_stderr or record.levelno >= logging.ERROR else sys.stdout
        print(prefix + record.getMessage(), file=stream, flush=True)


@contextmanager
def messages_of(is_quiet: bool, is_json: bool) -> Iterator[None]:
    """While the block runs, say warnings and errors only, or say everything on stderr.

    Args:
        is_quiet: Warnings and errors only; progress bars are off, too.
        is_json: stdout is for one JSON document.
    """
    logger = logging.getLogger("sslvit")
    level, handlers = logger.level, [one for one in logger.handlers if isinstance(one, MessageHandler)]
    logger.setLevel(logging.WARNING if is_quiet else level)
    for handler in handlers:
        handler.to_stderr = is_json
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            handler.to_stderr = False
