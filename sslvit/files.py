"""Atomic writing of files, and text that is safe to print."""

from __future__ import annotations

import errno
import glob
import json
import logging
import math
import os
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

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
WRITTEN_AS = {".png": "a picture is written as PNG", ".npz": "features are written as .npz"}  # by suffix
MAX_PRINTED = 200  # most characters of untrusted text in a message
MAX_VALUE = 60  # most characters of a value in a message
_SHORT = reprlib.Repr()  # does not traverse the whole of a large value
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxlong = 3, 16, 16, 8, 40
_SHORT.maxstring = _SHORT.maxother = MAX_VALUE


def to_json(content: Any, indent: int | None = None) -> str:
    """Serialize to strict JSON, in which null replaces NaN and infinite numbers.

    Args:
        content: Dicts, lists and plain values.
        indent: Spaces per level; None for one line.
    """
    return json.dumps(finite_or_null(content), indent=indent, allow_nan=False)


def finite_or_null(content: Any) -> Any:
    """Replace NaN and infinite numbers by None at any depth."""
    if isinstance(content, dict):
        return {key: finite_or_null(item) for key, item in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_or_null(item) for item in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class WriteError(OSError):
    """A file could not be written; the message gives its name, the reason and the remedy."""


@contextmanager
def new_file(path: str | Path, sync: bool = True, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file next to `path` that replaces `path` when the block ends, or is removed on an error.

    Args:
        path: Destination; an earlier file is kept until the new one is complete.
        sync: Wait until the file is on the disk, so that it survives a power failure.
        temporary: The temporary file, if only one process writes to `path`; by default its name has the process id.

    Raises:
        WriteError: The disk is full or not writable.
    """
    path = Path(path)
    temporary = temporary or path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some writers create files that only their owner may read
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            _sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors raise their own on a full disk
        temporary.unlink(missing_ok=True)
        if isinstance(error, WriteError) or not is_disk_error(error):
            raise
        raise write_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Write a small file atomically.

    Raises:
        WriteError: The disk is full or not writable; an earlier file is kept.
    """
    with new_file(path, sync) as temporary:
        temporary.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def remove_stale_temporaries(path: str | Path) -> None:
    """Remove temporary files of `new_file` next to a path that killed processes on this machine left behind."""
    path = Path(path)
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        number = temporary.name.removeprefix(f"{path.name}.").removesuffix(".part")
        if number.isdecimal() and int(number) != os.getpid() and not is_running(int(number)):
            temporary.unlink(missing_ok=True)


def check_new(path: str | Path | None, suffix: str | None = None) -> None:
    """Raise before any work if a file exists already, could not be written, or does not have the suffix."""
    if path is None:
        return
    if suffix is not None and Path(path).suffix != suffix:
        raise ValueError(f"{path}: {WRITTEN_AS[suffix]}. Choose a name that ends in {suffix}.")
    if Path(path).exists():
        raise ValueError(f"{path}: already exists. Choose another file.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist. Make it first.")
    if not os.access(Path(path).parent, os.W_OK):
        raise ValueError(f"{path}: its folder cannot be written to. Choose another.")


check_new_picture = partial(check_new, suffix=".png")
check_new_arrays = partial(check_new, suffix=".npz")


def is_running(process: int) -> bool:
    """Whether a process with this id is running on this machine, owned by any user."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process, or an id out of range
        return True
    return True


def write_error(path: str | Path, error: BaseException) -> WriteError:
    """Make the error for a file that could not be written, with its name and the remedy."""
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC if "os error 28" in str(error) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0][:120]
    remedy = REMEDIES.get(number or 0, "Check the disk and its permissions.")
    return WriteError(f"{printable(path)}: could not be written ({reason}). {remedy}")


def explain_os_error(error: OSError) -> str | None:
    """Describe an operating system error in one line with file and remedy; None if it has a message of its own."""
    if error.errno is None or error.strerror is None:
        return None
    name = f"{printable(error.filename)}: " if error.filename is not None else ""
    remedy = REMEDIES.get(error.errno, "")
    return f"{name}{error.strerror[:1].lower()}{error.strerror[1:]}. {remedy}".strip()


def printable(text: object, limit: int = MAX_PRINTED) -> str:
    """Make untrusted text one line: escape control and bidirectional characters and invalid bytes, and truncate it."""
    start = str(text)[: limit + 1]  # the text may be far longer
    line = "".join(character if character.isprintable() else _escaped(character) for character in start)
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def bytes_text(count: float) -> str:
    """Format a number of bytes with a suitable unit: 900 bytes, 12.5 KB (of 1,024 bytes), 3.4 MB, 1.2 GB."""
    if count < 1000:
        return f"{count:,.0f} bytes"
    for unit, size in (("KB", 2**10), ("MB", 2**20)):
        if count < 999.5 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 2**30:,.1f} GB"


def counted(count: int, what: str) -> str:
    """Format a count with its noun: 1 step, 2,000 steps, 1 pass, 2 passes."""
    plural = what if count == 1 else f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{count:,} {plural}"


def in_millions(count: float) -> str:
    """Format a number of parameters: 22.1 M, or 12,345 below a million."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,.0f}"


def brief(value: object) -> str:
    """Format a value for a message: one short line, however large the value is."""
    text = value[: 2 * MAX_VALUE] if isinstance(value, str) else _SHORT.repr(value)
    return printable(text, MAX_VALUE)


def quoted(value: object) -> str:
    """Like `brief`, but with quotes around strings."""
    return f"'{brief(value)}'" if isinstance(value, str) else brief(value)


def expand_path(path: str | os.PathLike[str]) -> str:
    """Expand ~ and environment variables in a path, as a shell does; URLs and pipe: commands are left unchanged.

    Raises:
        ValueError: There is no home folder.
    """
    text = os.fspath(path)
    if "://" in text or text.startswith("pipe:"):
        return text
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ValueError(f"{text}: there is no home folder here. Set HOME, or give the whole path.")
    return expanded


def cache_folder(path: str | Path) -> Path:
    """Resolve a cache folder; without a writable home, use one in the temporary folder.

    $XDG_CACHE_HOME replaces ~/.cache if it is set, as for other programs.
    """
    if os.environ.get("XDG_CACHE_HOME") and str(path).startswith("~/.cache/"):
        return Path(os.environ["XDG_CACHE_HOME"], str(path).removeprefix("~/.cache/"))
    try:
        folder = expand_path(path)
        is_usable = not str(path).startswith("~") or os.access(_existing(folder), os.W_OK)
    except ValueError:
        is_usable = False
    return Path(folder) if is_usable else Path(_user_temporary_folder(), str(path).lstrip("~/"))


_reported_folders: set[str] = set()


def _user_temporary_folder() -> str:
    folder = os.path.join(tempfile.gettempdir(), f"sslvit-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.islink(folder) or os.lstat(folder).st_uid != os.getuid():
        raise ValueError(f"{folder}: belongs to somebody else, and there is no home to use instead. Set HOME.")
    if folder not in _reported_folders:
        _reported_folders.add(folder)
        logger.info(f"no home folder that can be written to: using {folder} (set HOME to choose another place)")
    return folder


def _existing(path: str) -> str:
    """The path itself if it exists, otherwise its nearest parent that does."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return path


def is_disk_error(error: BaseException) -> bool:
    """Whether an error comes from the disk rather than from the program."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    return any(sign in str(error) for sign in ("PytorchStreamWriter", "No space left", "os error", "unexpected pos"))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8 (surrogateescape)
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
