"""`sslvit plan` and `sslvit.plan`: this machine by default, measured where asked, and what the loader must deliver."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_fixtures import TINY, TINY_DINO

import sslvit
from sslvit.cli import main
from sslvit.data import examples
from sslvit.data import open as opening
from sslvit.settings.load import load_recipe
from sslvit.train import planning
from sslvit.train.planning import Loading

TINY_RUN = {key: value for key, value in TINY.items() if key != "data.workers"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 255, (9, 8, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_a_plan_is_for_this_machine_and_packs_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "open_image_folder", None)
    found = sslvit.plan("mae/own_images", photos, **TINY_RUN)
    assert [pace.hardware for pace in found.paces] == ["this machine's CPU"]
    assert found.forecast.images == 24
    assert found.loading.is_measured
    assert found.loading.workers == 0
    total = found.forecast.run.total_steps * 8
    assert found.paces[0].images_per_second == pytest.approx(total / found.paces[0].seconds)
    assert "measured on these images" in found.text()
    assert json.loads(json.dumps(found.to_dict()))["hours"] == {"this machine's CPU": found.paces[0].seconds / 3600}


def test_a_gpu_is_named_by_its_peak_or_its_memory() -> None:
    given = sslvit.plan("mae/own_images", images=100, tflops=10, **TINY_RUN)
    assert [pace.hardware for pace in given.paces] == ["1 x given"]
    large = sslvit.plan("mae/own_images", images=100, memory_gib=80, **TINY_RUN | {"train.accelerator": "auto"})
    assert {"1 x h200", "1 x a100"} < {pace.hardware for pace in large.paces}
    assert large.loading.workers > 0
    assert not large.loading.is_measured
    assert sslvit.plan("mae/own_images", images=100, **TINY_RUN | {"data.limit": 40}).to_dict()["images"] == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"measure": True}, "measure=True: real steps take images"),
        ({"data": "photos"}, "images= and data=: give one"),
        ({"images": -5}, "images=-5: must be 1 or more"),
        ({"images": None, "classes": 3}, "classes=: is for images"),
        ({"images": None}, "images= or data=: how many images are there"),
        ({"utilization": -1}, "utilization=-1: must be in"),
        ({"tflops": 0}, "tflops=0: must be positive"),
        ({"memory_gib": 0}, "memory_gib=0: must be positive"),
        ({"memory_gib": 8, "train.accelerator": "cpu"}, "memory_gib=: the memory of a GPU"),
    ],
)
def test_arguments_that_a_plan_would_not_heed_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sslvit.plan("mae/own_images", **{"images": 100} | given)


def test_real_steps_are_timed_and_leave_nothing(photos: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"--{key}={json.dumps(value)}" for key, value in TINY_RUN.items()]
    assert main(["plan", "--config", "mae/own_images", "--data", str(photos), "--measure", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measured"]["steps"], found["measured"]["batch"]) == (4, 8)
    assert 0 <= found["measured"]["waiting"] <= 1
    assert found["images_per_second"] == {"1 x this machine's CPU": found["measured"]["images_per_second"]}
    assert found["measured"]["memory"] > 2**26
    assert not (Path("runs") / "new").exists()


def test_cores_that_deliver_too_little_are_said() -> None:
    assert Loading(1000, 100, True, 15).is_enough
    few = Loading(1000, 100, True, 7)
    assert not few.is_enough
    assert "7 processes 700: too few" in few.text()
    assert "in turns with training: 50% of the time" in Loading(100, 100, False, 0).text()
    assert not Loading(100, 100, False, 0).is_enough


@pytest.mark.parametrize(("limit", "largest"), [(1024, 128), (0, 4)])
def test_a_small_set_is_timed_as_a_run_crops_it(
    photos: Path, monkeypatch: pytest.MonkeyPatch, limit: int, largest: int
) -> None:
    made = []
    make = examples.make_batch

    def note(reader, views, samples, epochs):
        made.append((len(samples), reader.decoded is not None, views.color_here))
        return make(reader, views, samples, epochs)

    monkeypatch.setattr(examples, "make_batch", note)
    found = sslvit.plan("dino/own_images", photos, **TINY_DINO | {"data.memory_limit_mb": limit})
    assert found.loading.is_measured
    assert set(made) == {(largest, limit > 0, True)}


def test_as_many_images_are_timed_on_a_cpu_as_take_a_moment(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = TINY_RUN | {"data.global_batch_size": 24}
    batches: list[int] = []
    monkeypatch.setattr(planning, "time_run", lambda _, run, steps: batches.append(run.global_batch_size))
    for seconds_per_image, expected in ((planning.SECONDS_ON_CPU / 5, 5), (100, 1), (1e-6, 24)):
        monkeypatch.setattr(planning, "cpu_seconds", lambda step, each=seconds_per_image: each * step.images)
        sslvit.plan("mae/own_images", photos, measure=True, **changes | {"train.steps": 1})
        assert batches.pop() == expected


@pytest.mark.parametrize(("limit", "has_workers"), [(1024, False), (0, True)])
def test_a_set_that_is_decoded_once_has_no_loader_processes_on_a_gpu_either(
    photos: Path, limit: int, has_workers: bool
) -> None:
    changes = TINY_RUN | {"train.accelerator": "gpu", "data.memory_limit_mb": limit}
    found = sslvit.plan("mae/own_images", photos, memory_gib=80, **changes)
    assert found.loading is not None
    assert (found.loading.workers > 0) == has_workers


def test_the_size_of_a_model_of_pixels_is_compared_with_a_scaling_law() -> None:
    settings = load_recipe("igpt/digits", {"encoder.image_size": 10, "data.view.kind": "crop"})
    assert planning.model_size_notice(settings, 3_000, 1_000) is None  # 300 pixels per parameter
    assert planning.model_size_notice(settings, 2_000, 1_000) is None
    assert planning.model_size_notice(settings, 4_000, 1_000) is None
    few = planning.model_size_notice(settings, 100_000, 1_000_000)
    assert few.startswith("10 pixels per parameter; 200 to 400 make the most of the compute")
    assert few.endswith("at the same cost, about 0.2 M parameters")  # 188,000 see 5.3 times as many, 283 for each
    many = planning.model_size_notice(settings, 10_000_000, 1_000_000)
    assert many.startswith("1,000 pixels per parameter")
    assert many.endswith("about 1.9 M parameters")
    turns = {"data.resolutions": [5, 10], "data.resolution_fractions": [0.6, 0.4]}
    mixed = load_recipe("igpt/digits", {"encoder.image_size": 10, "data.view.kind": "crop"} | turns)
    assert planning.model_size_notice(mixed, 100_000, 1_000_000).startswith("6 pixels per parameter")  # 55 per image
    assert planning.model_size_notice(load_recipe("mae/digits"), 1, 1_000_000) is None
    bert = {"task.objective": "bert", "encoder.causal": False, "encoder.mask_token": True}
    assert planning.model_size_notice(load_recipe("igpt/digits", bert), 1, 1_000_000) is None
