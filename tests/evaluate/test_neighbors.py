"""Nearest neighbors by features, and their picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.decode import decode
from sslvit.data.pack import pack
from sslvit.data.reader import ShardReader
from sslvit.evaluate.neighbors import find_neighbors
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


@pytest.fixture
def encoder() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(EncoderSettings(8, patch=2, width=16, depth=1, heads=2, pooling="mean")).eval()


def colored(folder: Path, count: int = 12) -> ShardReader:
    """Images whose color says their number modulo 3, each a little darker than the one before."""
    images = np.zeros((count, 8, 8, 3), np.uint8)
    for number in range(count):
        images[number] = np.array(COLORS[number % 3]) * (1 - number / 400)
    return ShardReader(pack(array_samples(images), folder))


def test_neighbors_are_other_images_with_the_nearest_features(encoder: ViTEncoder, tmp_path: Path) -> None:
    encoder.features = lambda images: images.mean((2, 3))
    reader = colored(tmp_path / "s")
    colors = [int(decode(reader.read(number), 3)[:, 0, 0].argmax()) for number in range(12)]  # packing mixes them
    found = find_neighbors(encoder, reader, queries=4, neighbors=3)
    assert found.queries.tolist() == [0, 3, 7, 11]
    assert found.searched == 12
    for query, samples, values in zip(found.queries, found.samples, found.similarity, strict=True):
        alike = [number for number in range(12) if colors[number] == colors[query] and number != query]
        assert sorted(samples) == alike
        assert list(values) == sorted(values, reverse=True)
        assert values[0] == pytest.approx(1, abs=0.01)


def test_equal_images_are_each_others_neighbors_and_not_their_own(encoder: ViTEncoder, tmp_path: Path) -> None:
    images = np.zeros((9, 8, 8, 3), np.uint8)
    reader = ShardReader(pack(array_samples(images), tmp_path / "s"))
    found = find_neighbors(encoder, reader, queries=9, neighbors=2)
    assert all(query not in samples for query, samples in zip(found.queries, found.samples.tolist(), strict=True))


def test_a_bounded_number_of_images_is_searched_and_few_images_are_no_error(
    encoder: ViTEncoder, tmp_path: Path
) -> None:
    reader = colored(tmp_path / "s")
    assert find_neighbors(encoder, reader, among=5).searched == 5
    few = find_neighbors(encoder, colored(tmp_path / "few", 2), neighbors=6)
    assert few.samples.tolist() == [[1], [0]]
    with pytest.raises(ValueError, match="two images"):
        find_neighbors(encoder, colored(tmp_path / "one", 1))


def test_the_command_draws_a_folder_without_labels(
    encoder: ViTEncoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_encoder(encoder, tmp_path / "encoder", {})
    colored(tmp_path / "s")
    words = ["show", "neighbors", str(tmp_path / "encoder"), str(tmp_path / "s")]
    assert main([*words, "-o", str(tmp_path / "n.png"), "--images", "2"]) == 0
    assert (tmp_path / "n.png").stat().st_size > 1000
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "n.png")
    assert main([*words, "-o", str(tmp_path / "m.png"), "--among", "1"]) == 1
    assert "--among 1: must be 2 or more" in capsys.readouterr().err
    assert main(["show", "field", *words[2:], "-o", str(tmp_path / "m.png"), "--among", "9"]) == 1
    assert "--among is for show neighbors" in capsys.readouterr().err


def test_features_that_are_not_finite_have_no_neighbors(
    encoder: ViTEncoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    save_encoder(encoder, tmp_path / "encoder", {})
    colored(tmp_path / "s")
    words = ["show", "neighbors", str(tmp_path / "encoder"), str(tmp_path / "s"), "-o", str(tmp_path / "n.png")]
    assert main(words) == 1
    assert "features are not finite" in capsys.readouterr().err
    assert not (tmp_path / "n.png").exists()
