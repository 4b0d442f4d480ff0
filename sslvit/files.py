"""Files that are written whole or not at all, folders that one process holds, and text that is safe to print."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

REMEDIES = {
    errno.ENOSPC: "Make room on that disk, or choose another place.",
    errno.EDQUOT: "Your quota is used up: make room, or choose another place.",
    errno.EROFS: "That disk is mounted read-only: choose another place.",
    errno.EACCES: "Check its permissions.",
    errno.EPERM: "Check its permissions.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "The machine has no file handles left: close other programs.",
    errno.EIO: "The disk or the network file system reports an error: check it.",
    errno.ESTALE: "The network file system has lost the file: check its mount, then try again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.EISDIR: "It is a folder; give a file.",
}
MAX_PRINTED = 200  # characters of a name from a file in a message


class WriteError(OSError):
    """A file could not be written; the message names it, the reason and the remedy."""


@contextmanager
def new_file(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends, or is removed if that fails.

    Args:
        path: where the content goes; what is there before stays until the new file is whole.
        sync: wait until the disk has it, so that it survives a power cut.

    Raises:
        WriteError: the disk is full or cannot be written to.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        os.chmod(part, mode)  # some writers make files that only their owner may read
        if sync:
            _sync(part)
        os.replace(part, path)
        if sync:
            _sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own for a full disk
        part.unlink(missing_ok=True)
        if isinstance(error, WriteError) or not _is_of_the_disk(error):
            raise
        raise write_error(path, error) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Write a small file whole or not at all.

    Raises:
        WriteError: the disk is full or cannot be written to; what was there before stays.
    """
    with new_file(path, sync) as part:
        part.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def write_error(path: str | Path, error: BaseException) -> WriteError:
    """The error for a file that could not be written, with its name and the remedy."""
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC if "os error 28" in str(error) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0][:120]
    remedy = REMEDIES.get(number, "Check the disk and its permissions.")
    return WriteError(f"{printable(path)}: could not be written ({reason}). {remedy}")


def explain_os_error(error: OSError) -> str | None:
    """An error of the operating system in one line with file and remedy; None for one that has words of its own."""
    if error.errno is None or error.strerror is None:
        return None
    name = f"{printable(error.filename)}: " if error.filename is not None else ""
    remedy = REMEDIES.get(error.errno, "")
    return f"{name}{error.strerror[:1].lower()}{error.strerror[1:]}. {remedy}".strip()


def printable(text: object, limit: int = MAX_PRINTED) -> str:
    """Text from a file as one line of a message: control and bidirectional characters and bad bytes escaped, cut."""
    shown = "".join(character if _is_harmless(character) else _escaped(character) for character in str(text))
    return shown if len(shown) <= limit else f"{shown[: limit - 4]} ..."


@contextmanager
def held_folder(folder: str | Path, doing: str, name: str = ".lock") -> Iterator[None]:
    """Hold a folder for this process while the block runs; the system lets go of it even after kill -9.

    Args:
        folder: made if missing.
        doing: what this process wants to do, for the message, as in "pack into it".
        name: of the lock's file.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{folder}: another process is at work there. Wait until it has ended to {doing}, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def expand_path(path: str | Path) -> str:
    """A path as a shell would read it: ~ and $HOME; addresses and commands stay as they are.

    Raises:
        ValueError: there is no home folder.
    """
    text = str(path)
    if "://" in text or text.startswith("pipe:"):
        return text
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ValueError(f"{text}: there is no home folder here. Set HOME, or give the whole path.")
    return expanded


def cache_folder(path: str | Path) -> Path:
    """A folder for what can be made again; without a home that can be written to, one in the temporary folder.

    $XDG_CACHE_HOME stands for ~/.cache where it is set, as for other programs.
    """
    if os.environ.get("XDG_CACHE_HOME") and str(path).startswith("~/.cache/"):
        return Path(os.environ["XDG_CACHE_HOME"], str(path).removeprefix("~/.cache/"))
    try:
        folder = expand_path(path)
        is_usable = not str(path).startswith("~") or os.access(_existing(folder), os.W_OK)
    except ValueError:
        is_usable = False
    return Path(folder) if is_usable else Path(_own_temporary_folder(), str(path).lstrip("~/"))


_told: set[str] = set()


def _own_temporary_folder() -> str:
    folder = os.path.join(tempfile.gettempdir(), f"sslvit-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.islink(folder) or os.lstat(folder).st_uid != os.getuid():
        raise ValueError(f"{folder}: belongs to somebody else, and there is no home to use instead. Set HOME.")
    if folder not in _told:
        _told.add(folder)
        print(f"no home folder that can be written to: using {folder} (set HOME to choose another place)", flush=True)
    return folder


def _existing(path: str) -> str:
    """The nearest folder above that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return path


def free_bytes(folder: str | Path) -> int:
    """Room on the disk of a folder that exists, or will."""
    return shutil.disk_usage(_existing(str(folder))).free


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether a write failed, and not the program that wrote."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    return any(sign in str(error) for sign in ("PytorchStreamWriter", "No space left", "os error", "unexpected pos"))


def _is_harmless(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python keeps it in file names
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
