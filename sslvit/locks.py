"""Locks on files and folders; the system releases a lock even after kill -9."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sslvit.files import printable

logger = logging.getLogger(__name__)
GLANCE = 0.3  # seconds to retry, since `is_locked` in another process takes the lock for a moment
_lock_handles: set[int] = set()  # handles of locks, which a forked process must close


@contextmanager
def lock_folder(folder: str | Path, doing: str, name: str = ".lock", wait_seconds: float = 0.0) -> Iterator[None]:
    """Lock a folder for this process while the block runs; the system releases the lock even after kill -9.

    Args:
        folder: Folder, created if missing, and removed afterwards if it was created and is still empty.
        doing: What this process is about to do, for the message, as in "pack into it".
        name: Name of the lock file, which is deleted when the block ends.
        wait_seconds: Time to wait for another process that may be about to end.

    Raises:
        ValueError: Another process has locked the folder.
    """
    path, started, is_reported = Path(folder) / name, time.monotonic(), False
    deadline = started + wait_seconds
    is_new = not path.parent.exists()
    while (handle := _try_lock(path)) is None:
        if time.monotonic() >= max(deadline, started + GLANCE):
            raise ValueError(
                f"{printable(folder)}: another process is at work there. Wait until it has ended to {doing}, or choose "
                "another folder."
            )
        if not is_reported and wait_seconds:
            is_reported = True
            logger.info(f"{printable(folder)}: another process is at work there; waiting up to {wait_seconds:g} s")
        time.sleep(0.1 if is_reported else 0.02)
    _lock_handles.add(handle)
    try:
        yield
    finally:
        _lock_handles.discard(handle)
        path.unlink(missing_ok=True)  # while locked, so that a waiting process notices that its open file is gone
        if is_new:
            with suppress(OSError):
                path.parent.rmdir()  # fails if files were created there
        os.close(handle)


@contextmanager
def lock_file(path: str | Path, wait: bool = True) -> Iterator[int | None]:
    """Lock a file while the block runs, and delete it afterwards; the system releases the lock even after kill -9.

    Args:
        path: A file used only as a lock, in a folder that exists or can be created.
        wait: Whether to wait while another process or thread has the lock; if not, yield None.

    Yields:
        A handle of the file, in which a note to others can be written.
    """
    while (handle := _try_lock(Path(path))) is None and wait:
        time.sleep(0.02)
    if handle is None:
        yield None
        return
    _lock_handles.add(handle)
    try:
        yield handle
    finally:
        _lock_handles.discard(handle)
        with suppress(OSError):  # while locked, so that a waiting process notices that its open file is gone
            os.unlink(path)
        os.close(handle)


def is_locked(path: str | Path) -> bool:
    """Whether another process or thread has locked a file; the file is neither created nor changed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a lock file is deleted on release
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # other errors mean that the file system has no locks
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
    return False


def _try_lock(path: Path) -> int | None:
    """Try to take a lock; returns its handle, or None while another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = os.path.samestat(os.fstat(handle), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_locked = False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(handle)
            raise
        logger.warning(f"{printable(path.parent)}: its file system has no locks, so two processes may use it at once")
        is_locked = True
    if is_locked:
        return handle
    os.close(handle)
    return None


def _close_locks_in_child() -> None:
    for handle in _lock_handles:
        with suppress(OSError):
            os.close(handle)
    _lock_handles.clear()


os.register_at_fork(after_in_child=_close_locks_in_child)
