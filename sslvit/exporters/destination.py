"""The folder of an export: written under a temporary name, complete or absent, and replaced without losing files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sslvit.exporters.card import CARD
from sslvit.files import WriteError, is_disk_error, write_error

VERDICT = "verdict.json"
IN_PROGRESS = ".export-in-the-making"  # marks a folder that this package may delete


def is_write_failure(error: BaseException) -> bool:
    """Whether writing to the disk failed. An OSError without a number comes from other libraries and does not count."""
    if isinstance(error, OSError) and not isinstance(error, WriteError):
        return error.errno is not None and not isinstance(error, FileNotFoundError)
    if isinstance(error, SafetensorError):
        return "os error" in str(error)  # not a malformed file
    return is_disk_error(error)


@contextmanager
def complete_or_removed(temporary: Path) -> Iterator[None]:
    """Remove a folder if the disk fails or the process is interrupted while the block writes it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise error if isinstance(error, WriteError) else write_error(temporary, error) from error
    except Exception:  # after a failed comparison, the folder stays for inspection
        raise
    except BaseException:  # interrupted
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check(out: Path, overwrite: bool = False, may_overwrite: bool = True) -> None:
    """Refuse, before any work, a folder that is in use or cannot be created.

    `may_overwrite`: whether the command has an --overwrite option.
    """
    _finish_replacement(out)
    if _replaced(out).exists():
        raise ValueError(f"{_replaced(out)}: in the way. Move it, or choose another name.")
    if out.is_symlink() or out.is_file():
        raise ValueError(f"{out}: is a {'link' if out.is_symlink() else 'file'}. Choose the name of a new folder.")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            more = ", or pass --overwrite" if may_overwrite else ""
            raise ValueError(f"{out}: already exists. Choose another folder{more}.")
        if not (out / VERDICT).exists():
            raise ValueError(f"{out}: not an earlier export (no {VERDICT}), so --overwrite leaves it alone.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{out}: {parent} is no folder that can be written to. Choose another one.")


def make_temporary(out: Path) -> Path:
    """Make an empty folder beside the destination; replaces the remains of a failed export."""
    temporary = out.with_name(f"{out.name}.part")
    is_leftover = temporary.is_dir() and (
        (temporary / IN_PROGRESS).exists() or (temporary / VERDICT).exists() or not any(temporary.iterdir())
    )
    if temporary.is_symlink() or (temporary.exists() and not is_leftover):
        raise ValueError(f"{temporary}: in the way, and not of an earlier export. Move it, or choose another name.")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{temporary}: cannot be made ({error.strerror}). Choose another folder.") from error
    with complete_or_removed(temporary):
        (temporary / IN_PROGRESS).write_text("an export is being written here; the folder may be deleted\n")
    return temporary


def move_into_place(temporary: Path, out: Path) -> None:
    """Give a finished folder its name; foreign files in an earlier export are moved to the new one.

    The earlier export is renamed first and deleted last, so that nothing is lost if this process is killed.
    """
    (temporary / IN_PROGRESS).unlink()
    if out.exists():
        out.rename(_replaced(out))
    temporary.rename(out)
    _finish_replacement(out)


def _replaced(out: Path) -> Path:
    """The temporary name of an earlier export while it is replaced."""
    return out.with_name(f"{out.name}.replaced")


def _finish_replacement(out: Path) -> None:
    """Delete a replaced export after moving foreign files; rename it back if there is no new export."""
    old = _replaced(out)
    if not old.is_dir() or old.is_symlink() or (any(old.iterdir()) and not (old / VERDICT).exists()):
        return
    if not out.exists():
        old.rename(out)
        return
    move_foreign_files(old, out)
    if not set(os.listdir(old)) - _exported_names(old):
        shutil.rmtree(old)


def _exported_names(folder: Path) -> set[str]:
    """Names of the files that the export itself wrote, as far as its verdict can be read."""
    try:
        names = json.loads((folder / VERDICT).read_text()).get("files", [])
    except (OSError, ValueError, AttributeError):
        names = []
    return {VERDICT, *CARD, *(name for name in names if isinstance(name, str))}


def move_foreign_files(old: Path, new: Path) -> None:
    """Move files that are not part of an earlier export to the new one."""
    exported = _exported_names(old)
    for path in old.iterdir():
        if path.name not in exported and not (new / path.name).exists():
            path.rename(new / path.name)
