"""What a recipe schedules, over epochs that need no images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fixtures import TINY
from shard_fixtures import image_folder

import sslvit
from sslvit.cli import main
from sslvit.reports import previews
from sslvit.reports.previews import STEPS_PER_EPOCH, plot_schedule
from sslvit.settings.load import load_recipe

Curves = dict[str, tuple[list[float], list[float]]]


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Curves]:
    """What is plotted of a recipe with changes."""
    plotted: dict[str, Any] = {}
    monkeypatch.setattr(previews, "plot_curves", lambda out, lines, *labels: plotted.update(lines=lines) or out)

    def of(recipe: str, source: str | None = None, **changes: Any) -> Curves:
        plot_schedule(load_recipe(recipe, changes), source, "s.png")
        return plotted["lines"]

    return of


def at(curve: tuple[list[float], list[float]], epoch: float) -> float:
    """The value at an epoch, between two points of the curve."""
    return float(np.interp(epoch, *curve))


def test_the_curves_of_dino_are_those_of_its_paper(curves: Callable[..., Curves]) -> None:
    lines = curves("dino/vit_small_in1k_300")
    assert [name.partition(" (")[0] for name in lines] == ["lr", "momentum", "teacher temp", "weight decay"]
    rate, momentum, temperature, decay = lines.values()
    assert rate[0][0] == 0
    assert rate[0][-1] == pytest.approx(300 - 1 / STEPS_PER_EPOCH)
    assert at(rate, 5) == pytest.approx(0.5, abs=0.02)  # a warm-up of ten epochs
    assert at(rate, 10) == pytest.approx(1, abs=0.02)
    assert at(rate, 155) == pytest.approx(0.5, abs=0.02)  # the middle of the cosine
    assert at(momentum, 0) == pytest.approx(0.996, abs=1e-4)
    assert at(temperature, 15) == pytest.approx((0.04 + 0.03 * 15 / 30) / 0.07, abs=0.01)
    assert at(decay, 0) == pytest.approx(0.04 / 0.4)
    assert decay[1] == sorted(decay[1])


def test_changes_and_images_count(curves: Callable[..., Curves], tmp_path: Path) -> None:
    changes = {"train.epochs": 10, "optim.warmup_epochs": 1, "optim.lr_schedule": "wsd", "optim.cooldown_fraction": 0.2}
    rate = next(iter(curves("mae/digits", **changes).values()))
    assert at(rate, 7.9) == 1 > at(rate, 8.5)
    folder = image_folder(tmp_path / "images", count=16)
    rate = next(iter(curves("mae/digits", str(folder), **TINY | {"train.steps": 6}).values()))  # four batches of 8
    assert rate[0] == [0, 0.25, 0.5, 0.75, 1, 1.25]


def test_the_command_draws_or_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "schedule", "igpt/digits", "--train.epochs", "2"]) == 0
    assert capsys.readouterr().out.strip() == "schedule.png"
    assert (tmp_path / "schedule.png").stat().st_size > 1000
    words = ["--init", "zoo:digits/mae", "--train.epochs", "2", "--data.global_batch_size", "8", "-o", "continued.png"]
    assert main(["show", "schedule", "mae/continue", *words]) == 0  # whose encoder is that one
    images = str(image_folder(tmp_path / "images", count=4))
    encoder = ["zoo:digits/mae", images]
    for words, reason in (
        (["schedule", "mae/own_images"], "show schedule: data.global_batch_size is null here"),
        (["schedule", "mae/own_images", "--data.global_batch_size", "8"], "show schedule: train.epochs is null here"),
        (["schedule", "mae/digits", "--train.steps", "9"], "how many epochs train.steps are depends on the images"),
        (
            ["schedule", "mae/digits", "--train.budget", "5min"],
            "train.budget 5min is a number of steps that",
        ),
        (["schedule", "mae/digits", images, "--images", "4"], "--images is for pictures of images"),
        (
            ["schedule", "mae/digits", "--size", "4"],
            "--size is for pictures of an encoder; show schedule",
        ),
        (["views", "mae/digits", "--heads", "4"], "show views: takes a run and no --heads."),
        (["views", "mae/digits"], "show views: name shards or a folder of images."),
        (["pca", "zoo:digits/mae"], "show pca: name shards or a folder of images."),
        (
            ["pca", *encoder, "--train.steps", "4"],
            "train.steps: settings of a recipe are for show views",
        ),
    ):
        assert main(["show", *words, "-o", "other.png"]) == 1, words
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()
    with pytest.raises(ValueError, match="an encoder does not tell it"):
        sslvit.show("schedule", sslvit.load_encoder("zoo:digits/mae"))


def test_views_take_changes_of_the_recipe(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", count=4)
    pictures = [
        sslvit.show("views", "dino/vit_tiny_cifar10", images, images=2, **{"data.view.local_crops": crops})
        for crops in (2, 6)
    ]
    one, other = (picture.png for picture in pictures)
    assert one != other
