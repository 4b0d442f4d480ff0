"""A palette from shards to JSON, picture and recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from shard_fixtures import image_folder

from sslvit.cli import main
from sslvit.data import pixels
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.data.pixels import make_palette, sample_pixels
from sslvit.palette import fit_palette
from sslvit.settings.load import load_recipe
from sslvit.settings.palette import read_palette


@pytest.fixture
def index(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    return pack(array_samples(images), tmp_path / "shards")


def test_a_palette_is_written_with_its_error_and_drawn(index, tmp_path: Path) -> None:
    made = make_palette(index, tmp_path / "p" / "palette.json", colors=16, image_size=8)
    written = json.loads((tmp_path / "p" / "palette.json").read_text())
    assert written == made
    assert (tmp_path / "p" / "palette.png").exists()
    assert len(written["colors"]) == 16
    assert written["pixels"] == 30 * 64
    drawn, _ = sample_pixels(index, 8, 0)
    nearest = np.square(drawn.numpy()[:, None] - np.array(written["colors"])).mean(2).min(1)
    assert written["mean_squared_error"] == pytest.approx(nearest.mean(), rel=1e-5)
    assert written["mean_squared_error_uniform"] == pytest.approx((2 / 8) ** 2 / 12, rel=0.05)  # of equal boxes
    assert read_palette(tmp_path / "p" / "palette.json") == written["colors"]


def test_the_same_seed_gives_the_same_palette_and_nothing_is_overwritten(index, tmp_path: Path) -> None:
    one, other, third = (
        make_palette(index, tmp_path / f"{name}.json", 16, 8, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one["colors"] == other["colors"] != third["colors"]
    with pytest.raises(ValueError, match="a.json: already exists"):
        make_palette(index, tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"palette is written as JSON"):
        make_palette(index, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="--colors 1: a palette has two or more"):
        make_palette(index, tmp_path / "d.json", colors=1)


def test_a_palette_is_written_before_its_picture_and_not_without(
    index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        assert json.loads((tmp_path / "p.json").read_text())["colors"]  # a kill here leaves what a recipe needs
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(pixels, "plot_palette", fails)
        with pytest.raises(RuntimeError, match="no room"):
            make_palette(index, tmp_path / "p.json", 16, 8)
    assert not list(tmp_path.glob("p.*"))
    make_palette(index, tmp_path / "p.json", 16, 8)


def test_places_within_an_image_depend_on_the_seed(index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "PIXELS", 300)  # 10 of each of 30 images
    drawn = [sample_pixels(index, 8, seed)[0].view(30, 10, 3) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).flatten(1).any(1).all()


def test_a_palettes_clusters_are_those_of_its_seed_and_pixels(index, tmp_path: Path) -> None:
    made = make_palette(index, tmp_path / "p.json", 16, 8, seed=1)
    drawn, _ = sample_pixels(index, 8, 1)
    assert np.array(made["colors"]) == pytest.approx(fit_palette(drawn, 16, 1).numpy(), abs=1e-6)
    assert np.abs(np.array(made["colors"]) - fit_palette(drawn, 16, 0).numpy()).max() > 0.01


def test_pixels_come_from_all_over_a_large_data_set(index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MAX_IMAGES", 10)
    monkeypatch.setattr(pixels, "PIXELS", 50)
    drawn, shown = sample_pixels(index, 8, 0)
    assert drawn.shape == (50, 3)
    assert shown.shape == (10, 3, 8, 8)
    again, _ = sample_pixels(index, 8, 0)
    other, _ = sample_pixels(index, 8, 1)
    assert (drawn == again).all()
    assert not (drawn == other).all()


def test_pixels_are_of_all_images_all_places_and_readable_ones(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pixels, "MAX_IMAGES", 8)
    monkeypatch.setattr(pixels, "PIXELS", 64)  # 8 of each of 8 images
    places = np.tile(np.arange(64, dtype=np.uint8).reshape(8, 8), (40, 1, 1))
    drawn, _ = sample_pixels(pack(array_samples(places), tmp_path / "places"), 8, 0)
    found = ((drawn + 1) * 127.5).round().int().view(8, 8)
    assert found.max() > 55  # not the upper rows only
    assert len({tuple(row.sort().values.tolist()) for row in found}) == 8  # other places of each image
    assert all(len(set(row.tolist())) == 8 for row in found)  # each place once
    numbers = np.repeat(np.arange(40, dtype=np.uint8), 64).reshape(40, 8, 8)
    drawn, _ = sample_pixels(pack(array_samples(numbers), tmp_path / "numbers"), 8, 0)
    chosen = set(((drawn + 1) * 127.5).round().int().view(-1).tolist())
    assert len(chosen) == 8
    others, _ = sample_pixels(load_index(tmp_path / "numbers"), 8, 1)
    assert chosen != set(
        ((others + 1) * 127.5).round().int().view(-1).tolist()
    )  # not the first ones, whatever the seed
    white = pack(array_samples(np.full((4, 8, 8), 255, np.uint8)), tmp_path / "white")
    tar = tmp_path / "white" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"IHDR", b"XXXX", 1))
    drawn, shown = sample_pixels(white, 8, 0)
    assert len(shown) == 3
    assert (drawn == 1).all()  # the unreadable image, black, is not among them


def test_gray_images_get_grays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    pack(array_samples(images), tmp_path / "shards")
    words = ["palette", str(tmp_path / "shards"), "-o", str(tmp_path / "gray.json"), "--image-size", "8"]
    assert main(words) == 0
    assert "8 colors fitted on 1,280 pixels" in capsys.readouterr().out
    colors = read_palette(tmp_path / "gray.json")
    assert [len(color) for color in colors] == [1] * 8
    assert colors == sorted(colors)
    assert main(words) == 1
    assert "already exists" in capsys.readouterr().err


def test_an_image_folder_is_packed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "images", count=4)
    assert main(["palette", str(folder), "-o", str(tmp_path / "p.json"), "--colors", "2"]) == 0
    assert len(list((tmp_path / "cache" / "sslvit").rglob("images-*/index.json"))) == 1


def test_a_recipe_names_a_palette_file_beside_it_or_where_the_user_stands(tmp_path: Path, monkeypatch) -> None:
    recipe = (Path(__file__).parents[2] / "configs" / "igpt" / "digits.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("palette: uniform", "palette: mine.json"))
    (tmp_path / "mine.json").write_text(json.dumps({"colors": [[-1.0], [1.0]]}))
    settings = load_recipe(tmp_path / "recipe.yaml")
    assert settings.encoder.palette == [[-1.0], [1.0]]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.json").write_text(json.dumps({"colors": [[-1.0], [0.0], [1.0]]}))
    monkeypatch.chdir(tmp_path / "here")
    assert len(load_recipe(tmp_path / "recipe.yaml").encoder.palette) == 3
    with pytest.raises(FileNotFoundError, match="other.json is not a file. Make one with: sslvit palette"):
        load_recipe(tmp_path / "recipe.yaml", {"encoder.palette": "other.json"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is no palette"),
        ("b.json", '{"color": []}', "b.json is no palette"),
        ("c.json", '{"colors": [[1, 2], [0.5]]}', "colors of 1 and 2 numbers"),
        ("d.json", '{"colors": [[0], [255]]}', r"255 is outside \[-1, 1\]"),
        ("e.json", '{"colors": []}', "0 colors"),
        ("f.json", '{"colors": [[null], [1]]}', "f.json is no palette"),
        ("g.npy", "text", "g.npy is no palette"),
        ("h.json", "[1, 2]", "h.json is no palette"),
    ],
)
def test_files_that_are_no_palettes_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_palette(tmp_path / name)


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy is no palette"):
        read_palette(tmp_path / "a.npy")
