"""Views that the user's own function makes: exact at any workers and resumes, checked, and said in words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_fixtures import TINY, TINY_DINO, metrics, same
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_tensor

import sslvit
from sslvit import rng
from sslvit.cli import main
from sslvit.data.transform import TransformViews, function_of, named_function
from sslvit.settings.views import TransformSettings
from sslvit.tasks import task_class
from sslvit.train.folder import RunFolder

CROP = v2.Compose([v2.RandomResizedCrop(8, (0.5, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage(),
                   v2.ToDtype(torch.float32, scale=True)])  # fmt: skip


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)


def jittered(image: Image.Image) -> torch.Tensor:
    """Brighter by numbers of all three generators."""
    factor = (torch.rand(()).item() + np.random.rand() + random.random()) / 3  # noqa: NPY002
    return CROP(image) * factor


def two_and_two(image: Image.Image) -> list[torch.Tensor]:
    """DINO's two global views and two local ones."""
    small = v2.RandomResizedCrop(4, (0.2, 0.5))
    return [jittered(image), jittered(image), to_tensor(small(image)), pil_to_tensor(small(image))]


def run(out: Path, shards: Path, transform: Any, recipe: str = "mae/digits", **changes: Any) -> RunFolder:
    options = TINY if recipe == "mae/digits" else TINY_DINO
    kept = {key: value for key, value in options.items() if not key.startswith("data.view.")}
    return sslvit.pretrain(recipe, shards, out, transform=transform, **kept | changes)


def stopped(out: Path, shards: Path, transform: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> RunFolder:
    """A run that is stopped by Ctrl-C in the middle of its sixth step."""
    task = task_class(changes.get("recipe", "mae/digits").split("/")[0])
    step = task.training_step

    def stop(self, batch, batch_idx=0):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(task, "training_step", stop)
        with pytest.raises(KeyboardInterrupt, match=r"sslvit.resume\('.*', transform=...\)"):
            run(out, shards, transform, **changes)
    return RunFolder(out)


@pytest.mark.parametrize(
    ("recipe", "transform"), [("mae/digits", jittered), ("dino/digits", two_and_two)], ids=["mae", "dino"]
)
def test_a_stopped_run_resumes_to_the_same_weights_and_metrics(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, transform: Any
) -> None:
    whole = run(tmp_path / "whole", shards, transform, recipe)
    cut = stopped(tmp_path / "cut", shards, transform, monkeypatch, recipe=recipe)
    for _ in range(3):
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002 another state than before
    assert same(sslvit.resume(cut, transform=transform), whole)


def test_workers_memory_and_micro_batches_change_nothing(shards: Path, tmp_path: Path) -> None:
    one = run(tmp_path / "one", shards, jittered)
    assert same(run(tmp_path / "workers", shards, jittered, **{"data.workers": 2, "data.memory_limit_mb": 0}), one)
    parts = run(tmp_path / "parts", shards, jittered, **{"train.micro_batch_size": 2})
    losses = ([line["train/loss"] for line in metrics(found)] for found in (one, parts))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)


def test_the_views_are_what_the_function_gives_and_others_generators_stay_as_they_were(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    task = task_class("mae")
    step = task.training_step
    monkeypatch.setattr(
        task, "training_step", lambda self, batch, batch_idx=0: (seen.append(batch), step(self, batch, batch_idx))[1]
    )
    run(tmp_path / "run", shards, lambda image: pil_to_tensor(image) // 2, **{"train.steps": 1, "encoder.mean": [0.0],
                                                                               "encoder.std": [1.0]})  # fmt: skip
    reader = sslvit.data.reader.ShardReader(sslvit.data.index.load_index(shards), 1)
    (batch,) = seen
    assert torch.allclose(batch.views[0] * 255, (reader.decoded[batch.samples] // 2).float(), atol=1e-4)
    states = [random.getstate(), str(np.random.get_state()), torch.get_rng_state()]  # noqa: NPY002
    with rng.all_seeded(3, "x"):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    with rng.all_seeded(3, "x"):
        assert drawn == [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    with rng.all_seeded(4, "x"):
        assert all(a != b for a, b in zip(drawn, [random.random(), np.random.rand(), torch.rand(()).item()],  # noqa: NPY002
                                          strict=True))  # fmt: skip
    assert [random.getstate(), str(np.random.get_state())] == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_run_says_its_function_in_words_and_how_it_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cut = stopped(tmp_path / "cut", shards, jittered, monkeypatch)
    view = yaml.safe_load(cut.config.read_text())["data"]["view"]
    assert (view["kind"], view["sizes"]) == ("transform", [[8, 8]])
    assert view["function"] == f"jittered of {jittered.__module__} given from Python"
    capsys.readouterr()
    assert main(["resume", str(cut.path)]) == 1
    said = capsys.readouterr().err
    assert f"was given {view['function']}, which no file holds. Resume it from Python with the same: sslvit.res" in said
    words = ["--config", "mae/digits", "--data", str(shards), "--out", str(tmp_path / "new")]
    assert main(["pretrain", *words, "--data.view.kind", "transform"]) == 1
    said = capsys.readouterr().err
    assert (
        "transform takes a function, which no file holds. Give it from Python: sslvit.pretrain(..., transform=" in said
    )
    sslvit.resume(cut, transform=CROP)
    assert "resuming with changes: data.view.function jittered of" in capsys.readouterr().out


def test_the_views_of_an_image_follow_from_seed_epoch_and_sample() -> None:
    with named_function(jittered) as view:
        settings = TransformSettings(function=view["data.view.function"], sizes=[[8, 8]])
        image = torch.arange(300, dtype=torch.uint8).view(1, 20, 15)
        calls = [(0, 1, 2), (0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2)]
        made = [TransformViews(settings, [8, 8], "bilinear", seed).call(image, sample, epoch)[0]
                for seed, epoch, sample in calls]  # fmt: skip
    assert torch.equal(made[0], made[1])
    assert not any(torch.equal(made[0], other) for other in made[2:])


def sized(*sizes: tuple[int, int], channels: int = 1):
    return lambda image: [torch.zeros(channels, *size) for size in sizes]


class OwnGenerator:
    """As some libraries draw: from a generator that nobody else seeds."""

    def __init__(self) -> None:
        self.source = np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(image) * float(self.source.random())


@pytest.mark.parametrize(
    ("recipe", "transform", "message"),
    [
        ("mae/digits", sized((8, 8), (8, 8)), "it gives 2, and mae takes one view of each image"),
        ("dino/digits", sized((8, 8)), "it gives 1, and dino takes two global views of each image, then local ones"),
        ("mae/digits", sized((6, 8)), "a view of 6 x 8 pixels, and encoder.image_size is 8 x 8. Change one of them"),
        ("dino/digits", sized((8, 8), (4, 4)), "views of 8 x 8, 4 x 4 pixels, and encoder.image_size is 8 x 8"),
        ("dino/digits", sized((8, 8), (8, 8), (3, 4)), "3 x 4 pixels are not a multiple of encoder.patch .2"),
        ("mae/digits", sized((8, 8), channels=3), "it gives 3 x 8 x 8, and a view is a tensor 'c h w' of 1 channels"),
        ("mae/digits", sized(), "it gives nothing, and a view is a tensor"),
        ("mae/digits", lambda image: image, "it gives a Image. Let it end with a tensor 'c h w' .ToTensor"),
        (
            "mae/digits",
            lambda image: to_tensor(image) * 4 - 2,
            "pixels are uint8 or floating-point numbers from 0",
        ),
        ("mae/digits", OwnGenerator(), "other views of one image from the same random numbers, so a run could not be"),
        ("mae/digits", "crop", "transform: a str, which cannot be called"),
    ],
)
def test_what_no_run_can_take_is_refused_before_it_begins(
    shards: Path, tmp_path: Path, recipe: str, transform: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", shards, transform, recipe)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_image_gives_the_views_of_the_first_and_a_failure_names_its_sample(shards: Path, tmp_path: Path) -> None:
    def odd(image: Image.Image) -> torch.Tensor:
        return torch.zeros(1, 8, 8 if calls.append(0) is None and len(calls) < 5 else 6)

    def failing(image: Image.Image) -> torch.Tensor:
        calls.append(0)
        return to_tensor(image) / (0 if len(calls) < 5 else "x")

    calls: list[int] = []
    with pytest.raises(ValueError, match=r"sample \d+ gives views of 1 x 8 x 6, and the first image gave 1 x 8 x 8"):
        run(tmp_path / "odd", shards, odd)
    calls.clear()
    with pytest.raises(RuntimeError, match=r"transform: it failed on sample \d+ in epoch 0 .TypeError"):
        run(tmp_path / "failing", shards, lambda image: failing(image).nan_to_num(0, 0, 0))


def test_other_channels_and_16_bits_are_given_as_tensors(tmp_path: Path) -> None:
    given: list[Any] = []

    def function(image: Any) -> torch.Tensor:
        given.append(image)
        return image

    for dtype, channels in ((np.uint8, 5), (np.uint16, 1)):
        images = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (16, 8, 8, channels), dtype)
        changes = {"encoder.channels": channels, "encoder.mean": [0.5] * channels, "encoder.std": [0.3] * channels}
        run(tmp_path / f"{channels}", images, function, **changes, **{"train.steps": 1})
        assert all(isinstance(image, torch.Tensor) and image.shape == (channels, 8, 8) for image in given)
        assert 0.9 < max(float(image.max()) for image in given) <= 1
        given.clear()


def test_a_call_within_a_call_leaves_the_outer_ones_function_where_it_is() -> None:
    with named_function(abs) as view:
        settings = TransformSettings(function=view["data.view.function"])
        with named_function(abs):
            pass
        assert function_of(settings) is abs
    with pytest.raises(ValueError, match="takes a function, which no file holds"):
        function_of(settings)
