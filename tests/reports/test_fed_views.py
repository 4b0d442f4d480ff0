"""What a recipe will feed: boxes where they are sampled, views as a run gets them, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_fixtures import TINY
from shard_fixtures import image_folder

import sslvit
from sslvit.cli import main
from sslvit.data.open import open_shards
from sslvit.data.resample import Boxes
from sslvit.reports import previews
from sslvit.reports.previews import COLORS, SIDE, _with_boxes, plot_views
from sslvit.settings.load import load_recipe

COLORED = {"encoder.channels": 3, "encoder.mean": [0.5] * 3, "encoder.std": [0.2] * 3, "seed": 3}


def box(top: float, left: float, height: float, width: float) -> Boxes:
    return Boxes(*(np.array([side]) for side in (top, left, height, width)), np.array([False]))


def test_boxes_are_drawn_where_they_are_and_one_that_reaches_outside_makes_room() -> None:
    image = np.zeros((SIDE - 1, SIDE - 1, 1), np.float32)
    drawn = _with_boxes(image, [(True, box(10, 20, 100, 50)), (False, box(40, 30, 10, 10))])
    large = np.isclose(drawn, np.array(COLORS[0], np.float32)[:, None, None]).all(0)
    assert large[10, 20:71].all() and large[110, 20:71].all()  # noqa: PT018
    assert large[10:111, 20].all() and large[10:111, 70].all()  # noqa: PT018
    assert large.sum() == 2 * 51 + 2 * 101 - 4
    small = np.isclose(drawn, np.array(COLORS[1], np.float32)[:, None, None]).all(0)
    assert small.sum() == 4 * 11 - 4
    outside = _with_boxes(image, [(True, box(-(SIDE - 1), 0, 2 * (SIDE - 1), SIDE - 1))])
    assert (outside[:, 1 : SIDE // 2 - 2, SIDE // 2 + 2 :] == 1).all()  # white above and beside the image
    assert (outside[:, SIDE // 2 + 2 : -2, 2 : SIDE // 2 - 2] == 0).all()


def test_the_views_are_those_of_a_run_in_its_first_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        Image.fromarray(source.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    run = sslvit.pretrain("mae/digits", folder, tmp_path / "run", **TINY | COLORED)
    plotted = {}
    monkeypatch.setattr(
        previews, "plot_images", lambda out, rows, titles: plotted.update(rows=rows, titles=titles) or out
    )
    plot_views(load_recipe(run.config), str(folder), tmp_path / "v.png", 4)
    assert plotted["titles"] == ["image, and the\nboxes of its views", "view 1\n8 x 8"]
    index = open_shards(str(folder))
    module = sslvit.ShardDataModule.from_settings(load_recipe(run.config, {"data.shards": str(folder)}))
    numbers = np.unique(np.linspace(0, len(index) - 1, 4).astype(int))
    from sslvit.data.loader import make_batch
    from sslvit.data.reader import ShardReader

    batch = make_batch(ShardReader(index, 3, 0), module.views, numbers, np.zeros_like(numbers))
    np.testing.assert_array_equal(plotted["rows"][1], batch.views[0].float().numpy() / 255)


def test_views_are_shown_of_recipes_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = image_folder(tmp_path / "images", count=4)
    words = ["show", "views", "dino/vit_tiny_cifar10", str(folder), "--images", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip().endswith("views.png")
    assert (tmp_path / "views.png").stat().st_size > 1000
    assert main([*words, "-o", "w.png", "--size", "64"]) == 1
    assert "--size" in capsys.readouterr().err
    with pytest.raises(ValueError, match="takes a recipe, a YAML file or a run folder"):
        sslvit.show("views", sslvit.load_encoder("zoo:digits/dino"), folder)
    with pytest.raises(FileNotFoundError, match="no such file or recipe"):
        sslvit.show("views", "mae/nothing", folder)


@pytest.mark.parametrize("what", ["pca", "distance", "field"])
def test_the_fraction_of_the_crop_is_that_of_pictures_of_an_encoder(tmp_path: Path, what: str) -> None:
    source, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(source.integers(0, 255, (28, 28)).astype(np.uint8)).save(folder / f"{number}.png")
    encoder = sslvit.load_encoder("zoo:digits/mae")
    whole, middle = (sslvit.show(what, encoder, folder, images=2, crop_fraction=part).png for part in (None, 0.5))
    assert whole != middle
