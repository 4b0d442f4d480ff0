"""A full disk is named with file and remedy by whoever writes a table, a picture or features; no half is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from disk_fixtures import files_up_to

from sslvit.commands.files import write_json
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.data.pixels import make_palette
from sslvit.evaluate.embed import Embeddings
from sslvit.figures import plot_bars, plot_images
from sslvit.files import WriteError
from sslvit.pages.page import text, write_page

PIXELS = np.random.default_rng(0).random((64, 3, 16, 16))


def embeddings(path: Path) -> None:
    Embeddings(np.zeros((1000, 8), np.float32), np.array(["a"] * 1000), None, []).save(path)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pictures": ("a.png", lambda path: plot_images(path, [PIXELS[:8]], ["row"])),
    "bars": ("a.png", lambda path: plot_bars(path, {"row": {"column": 1.0}}, "percent", "title")),
    "features": ("a.npz", embeddings),
    "page": ("a.html", lambda path: write_page(path, "title", [text(5000 * "x")], "page")),
    "table": ("a.json", lambda path: write_json(path, {"x": 5000 * "x"})),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_with_file_and_remedy(tmp_path: Path, writer: str) -> None:
    name, write = WRITERS[writer]
    with files_up_to(1000), pytest.raises(WriteError, match=f"{name}: could not be written .*[Cc]he"):
        write(tmp_path / name)
    assert os.listdir(tmp_path) == []
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_palette_is_whole_or_absent(tmp_path: Path) -> None:
    images = (PIXELS * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    index = pack(array_samples(images), tmp_path / "s")
    with files_up_to(1000), pytest.raises(WriteError, match="could not be written"):
        make_palette(index, tmp_path / "p" / "p.json", 64, 16)
    assert not list((tmp_path / "p").glob("p.json*"))
