"""A small set of images to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    pack(
        array_samples(source.integers(0, 255, (30, 8, 8)).astype(np.uint8), source.integers(0, 3, 30)),
        tmp_path / "s",
        ["a", "b", "c"],
    )
    return tmp_path / "s"
