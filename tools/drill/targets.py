"""A kind of damaged file: what makes it and what reads it."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from material import Workshop

Payload = tuple[Any, ...]


@dataclass
class Reader:
    """Reads damaged inputs of one kind in a folder.

    Args:
        read: takes a payload; raises what the product raises.
        damaged: makes a payload.
        valid: the payload that is not damaged.
        name: that messages must have; None where the caller knows it.
    """

    read: Callable[..., None]
    damaged: Callable[[random.Random], Payload]
    valid: Callable[[], Payload]
    name: str | None = None


@dataclass
class Target:
    """A kind of file.

    Args:
        what: it is, in words.
        open: makes the files in a folder and returns their reader; runs in the child.
        prepare: makes what all children share.
    """

    what: str
    open: Callable[[Path], Reader]
    prepare: Callable[[Workshop], None] = field(default=lambda workshop: None)


def one_file(
    folder: Path, names: str, samples: list[bytes], damage: Callable[[bytes, random.Random], bytes],
    read: Callable[[Path], object], named: bool = True,
) -> Reader:  # fmt: skip
    """A reader of one file at a time."""
    path = folder / names

    def take(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return Reader(take, lambda rng: (damage(rng.choice(samples), rng),), lambda: (samples[0],),
                  path.name if named else None)  # fmt: skip


class Shared:
    """Folders that were prepared once, before children are forked."""

    folders: dict[str, Path] = {}  # noqa: RUF012


def prepare_shards(workshop: Workshop) -> None:
    Shared.folders["shards"] = workshop.shards()


def copied(name: str, folder: Path) -> Path:
    """A copy of a prepared folder in a child's own."""
    out = folder / name
    if not out.exists():
        shutil.copytree(Shared.folders[name], out)
    return out


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
