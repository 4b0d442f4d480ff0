"""A small set of images to train on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """A shell starts what runs in the background deaf to Ctrl-C, and so would be whatever these tests try."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    pack(
        array_samples(source.integers(0, 255, (30, 8, 8)).astype(np.uint8), source.integers(0, 3, 30)),
        tmp_path / "s",
        ["a", "b", "c"],
    )
    return tmp_path / "s"
