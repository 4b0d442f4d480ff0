"""Recipes for one's own images: what is null in them suits 30 images and 30 million, and is said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from run_fixtures import TINY
from shard_fixtures import image_folder

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data import open as opening
from sslvit.data.examples import Examples
from sslvit.data.open import open_shards
from sslvit.models import ViTEncoder
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, RunSettings, TrainSettings
from sslvit.settings.load import load_recipe
from sslvit.settings.task import MAESettings
from sslvit.train import fitting
from sslvit.train.fitting import fit_length
from sslvit.train.prepare import size_notice
from sslvit.train.run import pretrain

TASKS = ["mae", "dino", "igpt"]
GPU = {"train.accelerator": "gpu"}
CHOSEN = {"data.global_batch_size", "data.workers", "optim.warmup_epochs", "train.steps", "train.checkpoint_every"}
OWN = {key: value for key, value in TINY.items() if key not in CHOSEN}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 images side by side."""
    folder, source = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(30):
        Image.fromarray(source.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    encoder = ViTEncoder(EncoderSettings(8, patch=2, width=16, depth=1, heads=2))
    save_encoder(encoder, tmp_path / "encoder", {})
    return tmp_path / "encoder"


def own_images(photos: Path, out: Path, **changes) -> RunSettings:
    return load_recipe("mae/own_images", OWN | {"data.shards": str(photos), "out": str(out)} | changes)


def batch_of(task: str, images: int, multiple_of: int = 1) -> int:
    settings = load_recipe(f"{task}/own_images")
    return settings.data.batch_for(images, settings.task.usual.batch, multiple_of)


@pytest.mark.parametrize("task", TASKS)
def test_batch_length_warm_up_and_rate_are_chosen_in_the_recipes(task: str) -> None:
    settings = load_recipe(f"{task}/own_images")
    assert (settings.data.global_batch_size, settings.train.epochs, settings.data.workers) == (None, None, None)
    assert (settings.optim.warmup_epochs, settings.optim.base_lr) == (None, None)
    assert settings.train.micro_batch_size == "auto"
    assert settings.encoder.image_size == ([32, 32] if task == "igpt" else [224, 224])


@pytest.mark.parametrize(("task", "most"), [("mae", 1024), ("dino", 256), ("igpt", 128)])
def test_a_batch_is_a_power_of_two_that_leaves_steps_in_an_epoch_up_to_the_tasks_own(task: str, most: int) -> None:
    assert [batch_of(task, images) for images in (30, 240, 30_000_000)] == [4, 32, most]
    assert [batch_of(task, 240, multiple_of=ranks) for ranks in (3, 12)] == [48, 48]
    assert batch_of(task, 3) == 2


def epochs_of(task: str, images: int, **changes) -> float | None:
    settings = load_recipe(f"{task}/own_images", GPU | changes)
    batch = settings.data.batch_for(images, settings.task.usual.batch)
    train, note = fit_length(settings, images, None, images // batch, batch)
    assert not note
    return train.epochs


def test_a_run_on_a_gpu_is_as_long_as_its_data_set_asks_for() -> None:
    assert epochs_of("mae", 1_281_167) == 800
    assert epochs_of("mae", 30) == pytest.approx(10_000 / 7, rel=1e-3)  # a floor of steps
    assert epochs_of("mae", 30_000_000) == pytest.approx(34.33)  # a cap of images
    assert epochs_of("dino", 50_000) == 300
    assert epochs_of("dino", 1_281_167) == pytest.approx(99.9, abs=0.1)
    assert epochs_of("igpt", 1_000_000) == 100
    assert epochs_of("mae", 30, **{"train.epochs": 3}) == 3
    assert epochs_of("mae", 30, **{"train.steps": 3}) is None


def test_a_run_on_a_cpu_takes_about_an_hour_and_says_how_to_change_that(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_recipe("mae/own_images", OWN | {"train.accelerator": "cpu"})
    monkeypatch.setattr(fitting, "cpu_seconds", lambda step: 36_000.0 * step.run.total_steps / 10_000)
    train, note = fit_length(settings, 240, None, 7, 32)
    assert train.epochs * 7 == pytest.approx(1000, abs=1)
    for part in ("about an hour on this machine's CPU", "a GPU would get 1429 epochs", "10.0 hours", "--train.epochs"):
        assert part in note
    monkeypatch.setattr(fitting, "cpu_seconds", lambda step: 60.0)
    assert fit_length(settings, 240, None, 7, 32)[0].epochs == 1429


def test_several_processes_come_to_the_same_length_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "cpu_flops", None)
    settings = load_recipe("mae/own_images", {"train.accelerator": "cpu", "train.devices": 2})
    train, note = fit_length(settings, 240, None, 7, 32)
    assert 1 < train.epochs < 1429
    assert note


def test_the_rate_grows_like_the_square_root_of_the_batch() -> None:
    usual = MAESettings.usual
    peaks = [usual.base_lr_at(batch) * batch / 256 for batch in (1024, 256, 64, 4)]
    assert peaks == pytest.approx([1.2e-3, 6e-4, 3e-4, 7.5e-5], rel=1e-3)


def test_a_flat_folder_of_30_images_runs_and_every_choice_is_said_and_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fitting, "cpu_seconds", lambda step: 3600.0 * step.run.total_steps / 5)  # five steps in an hour
    folder = pretrain(own_images(photos, tmp_path / "run"))
    out = capsys.readouterr().out
    for part in ("5 steps of 4 images", "resolved for 30 images, 4 a step: data.global_batch_size 4;",
                 "train.epochs 0.7143 (about an hour on this machine's CPU", "optim.base_lr 0.0048",
                 "optim.warmup_epochs 0 steps"):  # fmt: skip
        assert part in out
    kept = yaml.safe_load(folder.config.read_text())
    assert (kept["data"]["global_batch_size"], kept["train"]["epochs"]) == (4, 5 / 7)
    assert (folder.figures / "neighbors.png").exists()

    # a resumed run keeps what was chosen, on whatever machine it goes on
    monkeypatch.setattr(fitting, "cpu_seconds", lambda step: 1.0)
    monkeypatch.setattr(MAESettings, "usual", MAESettings.usual.__class__(2, 1, 1e9, 1.0))
    again = pretrain(own_images(photos, tmp_path / "run"), resume=True)
    found = yaml.safe_load(again.config.read_text())
    assert found.pop("made_by")[:-1] == kept.pop("made_by")
    assert found == kept
    assert "resuming with changes" not in capsys.readouterr().out


def test_steps_that_are_given_win_over_a_chosen_length(photos: Path, tmp_path: Path) -> None:
    folder = pretrain(own_images(photos, tmp_path / "run", **{"train.steps": 2}))
    assert folder.read_metrics()[-1]["step"] == 2
    assert yaml.safe_load(folder.config.read_text())["train"]["epochs"] is None


def test_a_length_that_nobody_chose_is_no_plan() -> None:
    with pytest.raises(ValueError, match="train.epochs: still null"):
        RunPlan.make(TrainSettings(epochs=None), 7, 4, 0)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def notice_for(size: tuple[int, int], recipe: str, **changes) -> str | None:
    return size_notice(load_recipe(recipe, changes), "photos", size)


def test_images_that_shrink_tenfold_or_grow_sevenfold_are_said_with_the_remedy() -> None:
    assert notice_for((375, 500), "mae/vit_tiny_cifar10") == (
        "photos: images of about 375 x 500 pixels are seen at 32 x 32, 12 times smaller, where what is small in them "
        "is lost. Take mae/own_images, or raise encoder.image_size."
    )
    assert notice_for((319, 500), "mae/vit_tiny_cifar10") is None
    assert "7 times larger" in notice_for((32, 32), "mae/own_images")
    assert "take a recipe for small images (mae/vit_tiny_cifar10)" in notice_for((32, 32), "mae/own_images")
    assert notice_for((33, 40), "mae/own_images") is None
    assert notice_for((375, 500), "dino/own_images") is None
    assert "own_images" not in notice_for((375, 500), "igpt/own_images")  # it is so by design


def test_the_size_of_images_is_their_median_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number, side in enumerate((20, 30, 90)):
        Image.new("RGB", (side + 1, side)).save(tmp_path / "p" / f"{number}.jpg")
    flat = Examples.open(tmp_path / "p")
    assert (flat.images, flat.classes, flat.size) == (3, None, (30, 31))
    assert Examples.of(open_shards(tmp_path / "p")).size == (30, 31)


def test_a_run_says_that_its_images_change_in_size(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    large = {"encoder.image_size": 56, "encoder.patch": 8, "train.steps": 1}
    pretrain(own_images(photos, tmp_path / "run", **large))
    assert "images of about 8 x 8 pixels are seen at 56 x 56, 7 times larger" in capsys.readouterr().out


# ---- before packing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["pretrain", "--config", "mae/own_images", "--data", "PHOTOS", "--out", "RUN", "--data.resolutions", "[50]"],
         "data.resolutions: 50 is not a multiple"),
        (["pretrain", "--config", "mae/own_images", "--data", "PHOTOS", "--out", "THERE"], "already exists"),
        (["pretrain", "--config", "mae/own_images", "--data", "PHOTOS", "--out", "RUN", "--init", "no"], "no: "),
        (["finetune", "ENCODER", "--train", "PHOTOS", "--val", "PHOTOS", "--out", "RUN"],
         "side by side have no labels"),
        (["probe", "ENCODER", "--train", "PHOTOS", "--val", "PHOTOS"], "sslvit show neighbors ENCODER"),
        (["knn", "ENCODER", "--train", "PHOTOS", "--val", "PHOTOS"], "sslvit show neighbors ENCODER"),
    ],
)  # fmt: skip
def test_what_needs_no_images_is_refused_before_they_are_packed(
    words: list[str], reason: str, photos: Path, tmp_path: Path, encoder_folder: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(opening, "open_image_folder", None)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    named = {"PHOTOS": photos, "RUN": tmp_path / "run", "THERE": tmp_path / "there", "ENCODER": encoder_folder}
    assert main([str(named.get(word, word)) for word in words]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["pretrain", "--data", "FOLDER", "--encoder.channels", "2"], "encoder.channels: 2, but the images of"),
        (["pretrain", "--data", "FOLDER", "--data.global_batch_size", "21"], "data.global_batch_size: 21 is more than"),
        (["pretrain", "--data", "FOLDER", "--data.limit", "21"], "data.limit: 21 is more than the 20 images of"),
        (["knn", "ENCODER", "--train", "FOLDER", "--val", "OTHER", "--neighbors", "21"], "there are only 20 training"),
        (["probe", "ENCODER", "--train", "FOLDER", "--val", "OTHER", "--labels-per-class", "11"], "has only 10"),
        (["probe", "ENCODER", "--train", "SHARDS", "--val", "OTHER"], "cow only in"),
        (["finetune", "ENCODER", "--train", "SHARDS", "--val", "OTHER"], "cow only in"),
    ],
)
def test_what_names_and_headers_tell_is_refused_before_images_are_packed(
    words: list[str], reason: str, tmp_path: Path, encoder_folder: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    places = {
        "ENCODER": encoder_folder, "FOLDER": image_folder(tmp_path / "folder"), "SHARDS": tmp_path / "shards",
        "OTHER": image_folder(tmp_path / "other", ("cat", "cow")),
    }  # fmt: skip
    assert main(["shards", "pack", str(places["FOLDER"]), str(places["SHARDS"])]) == 0
    monkeypatch.setattr("sslvit.data.open_folder.pack", None)
    if words[0] in ("pretrain", "finetune"):
        recipe = "mae/own_images" if words[0] == "pretrain" else "finetune/small_images"
        words = [*words, "--config", recipe, "--out", "RUN"]
        places["RUN"] = tmp_path / "run"
    assert main([str(places.get(word, word)) for word in words]) == 1
    assert reason in capsys.readouterr().err


def test_every_command_packs_a_folder_into_one_place_once(
    photos: Path, tmp_path: Path, encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sslvit").propagate = True
    try:
        pretrain(own_images(photos, tmp_path / "run", **{"train.steps": 1}))
        first = {record.message for record in caplog.records if "packing it into" in record.message}
        for words in (
            ["embed", encoder_folder, photos, "-o", tmp_path / "f.npz"], ["health", encoder_folder, photos],
            ["show", "neighbors", encoder_folder, photos, "-o", tmp_path / "n.png"],
            ["palette", photos, "-o", tmp_path / "p.json", "--colors", "4", "--image-size", "8"],
        ):  # fmt: skip
            caplog.clear()
            assert main([str(word) for word in words]) == 0
            (said,) = {record.message for record in caplog.records if "packed earlier in" in record.message}
            place = said.rpartition("packed earlier in ")[2].rstrip(".")
            assert place in next(iter(first))
    finally:
        logging.getLogger("sslvit").propagate = False
    assert len(first) == 1
    assert not list(tmp_path.glob("*shards*"))
