"""What a recipe did not know of the data is chosen to fit it, said, and written down; what a person gave is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from run_fixtures import TINY, run

from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.open import open_data
from sslvit.data.pack import pack
from sslvit.results import decimals
from sslvit.settings import DataSettings, EncoderSettings, OptimSettings
from sslvit.settings.load import load_recipe
from sslvit.train.run import pretrain

SMALL = {key: value for key, value in TINY.items() if key != "data.global_batch_size"} | {"train.steps": 2}


@pytest.mark.parametrize(
    ("images", "ranks", "batch"),
    [(60, 1, 8), (1023, 1, 128), (1024, 1, 1024), (60, 3, 12), (20, 1, 4), (6, 1, 4), (3, 1, 2), (10, 8, 8), (5, 8, 8)],
)
def test_a_batch_that_is_not_filled_becomes_a_power_of_two_on_each_rank(images: int, ranks: int, batch: int) -> None:
    assert DataSettings(global_batch_size=1024, fit_batch=True).batch_for(images, 256, ranks) == batch
    assert DataSettings(global_batch_size=1024).batch_for(images, 256, ranks) == 1024


def test_a_recipes_batch_is_lowered_to_few_images_and_said(shards: Path, tmp_path: Path, capsys) -> None:
    recipe = load_recipe("mae/digits", SMALL | {"data.shards": str(shards), "out": str(tmp_path / "run")})
    folder = pretrain(recipe)
    out = capsys.readouterr().out
    assert "2 steps of 4 images" in out
    assert f"peak learning rate {8e-3 * 4 / 256:.2e}" in out
    assert "data.global_batch_size 4 instead of 64" in out
    kept = yaml.safe_load(folder.config.read_text())["data"]
    assert (kept["global_batch_size"], kept["fit_batch"]) == (4, False)
    assert len(folder.read_metrics()) == 2
    again = pretrain(load_recipe("mae/digits", SMALL | {"data.shards": str(shards), "out": str(tmp_path / "run"),
                                                        "train.steps": 3}), resume=True)  # fmt: skip
    assert yaml.safe_load(again.config.read_text())["data"] == kept
    assert "data." not in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming"))


def test_a_batch_that_a_person_gave_is_refused_where_it_does_not_fit(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="data.global_batch_size: 64 is more than the 30 samples there are. Set it to 30"
    ):
        run(shards, tmp_path / "run", **{"data.global_batch_size": 64})


def test_a_mixture_gets_a_batch_that_each_of_its_parts_fills(shards: Path, tmp_path: Path) -> None:
    other = pack(array_samples(np.zeros((8, 8, 8), np.uint8)), tmp_path / "few").location
    settings = DataSettings(mixture={str(shards): 3, other: 1}, global_batch_size=512, fit_batch=True)
    _, plan = open_data(settings, 0)
    assert plan.global_batch_size == 8  # 40 images could fill 30 / 3 * 4 or 8 * 4
    assert plan.steps_per_epoch >= 4


def test_a_plan_is_made_for_the_batch_that_would_run(shards: Path, capsys) -> None:
    words = [f"--{key}={value}" for key, value in SMALL.items() if key.startswith(("encoder", "task"))]
    assert main(["plan", "--config", "mae/digits", "--data", str(shards), *words]) == 0
    out = capsys.readouterr().out
    assert "batch        4 images" in out
    assert "instead of the recipe's 64 images" in out


def test_a_warm_up_as_long_as_the_run_becomes_a_tenth_of_it(shards: Path, tmp_path: Path, capsys) -> None:
    assert OptimSettings(warmup_epochs=40).fitted(7, 100).warmup_steps(7, 100) == 10
    assert OptimSettings(warmup_epochs=4).fitted(7, 100).warmup_steps(7, 100) == 28
    run(shards, tmp_path / "run", **{"optim.warmup_epochs": 40, "train.steps": 2})
    out = capsys.readouterr().out
    assert "optim.warmup_epochs 0 steps (0 epochs) instead of 40, since the run has 0.67 epochs" in out


def test_five_channels_get_the_mean_and_deviation_of_their_shards(tmp_path: Path, capsys) -> None:
    source = np.random.default_rng(0)
    images = source.integers(0, 255, (16, 8, 8, 5)).astype(np.uint8)
    images[..., 4] = 7  # constant
    index = pack(array_samples(images), tmp_path / "s")
    recipe = SMALL | {"data.shards": index.location, "encoder.channels": 5, "encoder.mean": None, "encoder.std": None}
    folder = pretrain(load_recipe("mae/digits", recipe | {"out": str(tmp_path / "run")}))
    encoder = yaml.safe_load(folder.config.read_text())["encoder"]
    assert encoder["mean"] == index.mean
    assert encoder["std"] == [*index.std[:4], 1.0]
    assert "encoder.mean [" in capsys.readouterr().out
    given = {"encoder.mean": [0.5] * 5, "encoder.std": [0.25] * 5}
    folder = pretrain(load_recipe("mae/digits", recipe | given | {"out": str(tmp_path / "given")}))
    assert yaml.safe_load(folder.config.read_text())["encoder"]["mean"] == [0.5] * 5


def test_photographs_keep_the_usual_mean_and_an_encoder_its_own() -> None:
    def is_open(**changes) -> bool:
        base = changes.pop("base", None)
        return load_recipe("mae/digits", {f"encoder.{k}": v for k, v in changes.items()}, base).data.fit_normalization

    open_keys = {"mean": None, "std": None}
    assert is_open(channels=5, **open_keys)
    assert not is_open(channels=3, **open_keys)
    assert not is_open(channels=2, mean=[0.5, 0.5], std=None)
    own = EncoderSettings(16, channels=5, patch=4)
    assert not load_recipe("finetune/small_images", {}, own).data.fit_normalization


def test_a_loss_far_off_is_short() -> None:
    assert [decimals(value) for value in (0.5, 2.146e23, -3e9, float("nan"), float("inf"))] == [
        "0.5000", "2.1e+23", "-3e+09", "nan", "inf",
    ]  # fmt: skip
    assert decimals(0.5, 3) == "0.500"
