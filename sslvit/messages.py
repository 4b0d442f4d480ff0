"""How the package's log records reach the screen: one line each, as the commands print theirs."""

from __future__ import annotations

import logging
import sys


class MessageHandler(logging.Handler):
    """Prints the message alone; warnings say so, and errors go to stderr.

    Args:
        to_stderr: Keep stdout free, for a command whose result there is JSON.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        stream = sys.stderr if self.to_stderr or record.levelno >= logging.ERROR else sys.stdout
        print(prefix + record.getMessage(), file=stream, flush=True)
