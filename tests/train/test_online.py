"""Scores during pretraining: there when asked for, and not felt by the training."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_fixtures import RECIPES, metrics, run, weights
from torch.distributed.tensor import DTensor

from sslvit.checkpoint import load_encoder
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.data.plan import evenly_spaced
from sslvit.evaluate.linear import fit_probe
from sslvit.evaluate.sources import Features
from sslvit.models import ViTEncoder
from sslvit.run_plan import RunPlan
from sslvit.settings import load
from sslvit.tasks import task_class
from sslvit.train.callbacks.scoring import OnlineProbe, ScoringCallback, scoring
from sslvit.train.strategies import shard


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 21)):
        labels = np.arange(count) % 2
        images = source.integers(0, 100, (count, 8, 8)) + (labels * source.integers(0, 60, count))[:, None, None]
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["dark", "light"])
    return tmp_path


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_online_scores_leave_the_training_as_it_was(shards: Path, recipe: str) -> None:
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.every": 3,
              "online.images": 15}  # fmt: skip
    # dropout draws from torch's stream, so a look that draws from it would show
    changes = {"train.log_every": 2, "recipe": recipe, "encoder.dropout": 0.1}
    with_them = run(shards / "train", shards / "with", **changes, **online)
    without = run(shards / "train", shards / "without", **changes)
    one, other = weights(with_them), weights(without)
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = metrics(with_them)
    assert [line["step"] for line in lines if "probe/knn" in line] == [4, 7]  # 3 rounded up to a line; the last step
    assert [{k: v for k, v in line.items() if not k.startswith("probe/")} for line in lines] == metrics(without)


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits"])
def test_online_scores_are_those_of_the_trained_encoder_on_the_reported_images(shards: Path, recipe: str) -> None:
    """Neighbors and head from the images of online.train, scored on those of online.val: computed once more here."""
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.images": 20,
              "online.neighbors": 5}  # fmt: skip
    folder = run(shards / "train", shards / "run", recipe=recipe, **online)
    line = metrics(folder)[-1]
    encoder = load_encoder(folder.path)  # DINO's teacher
    (train, train_labels), (val, val_labels) = (
        labeled_features(encoder, shards / name, spread) for name, spread in (
            ("train", np.linspace(0, 39, 20)), ("val", np.linspace(0, 20, 20)),
        )
    )  # fmt: skip
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (train, val)]
    similarity = unit[1] @ unit[0].T
    right = 0
    for row, label in zip(similarity, val_labels, strict=True):
        votes = np.zeros(2)
        for nearest in np.argsort(-row)[:5]:
            votes[train_labels[nearest]] += np.exp(row[nearest] / 0.07)
        right += votes.argmax() == label
    assert line["probe/knn"] == pytest.approx(100 * right / 20)
    tensors = [torch.from_numpy(array) for array in (train, train_labels, val, val_labels)]
    head = fit_probe(Features(*tensors[:2]), 2, seed=0)
    guesses = (((val - head.mean.numpy()) / head.scale.numpy()) @ head.weight.numpy().T + head.bias.numpy()).argmax(1)
    assert line["probe/linear"] == pytest.approx(100 * (guesses == val_labels).mean())
    assert line["probe/feature_std"] == pytest.approx(4 * unit[1].std(0).mean(), rel=1e-4)  # of 16 channels
    assert {line["probe/knn"], line["probe/linear"]} != {100.0}  # scores that say something


def labeled_features(encoder: ViTEncoder, folder: Path, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of some images as they lie in the tar, resized by nothing: they have the encoder's size."""
    index = load_index(folder)
    pixels, labels = [], []
    for number in numbers.astype(int):
        shard, offset, size = index.locate(number)
        with open(index.shard_path(shard), "rb") as file:
            file.seek(offset)
            pixels.append(np.asarray(Image.open(io.BytesIO(file.read(size)))))
        labels.append(int(index.records["label"][number]))
    images = (torch.from_numpy(np.stack(pixels)).float()[:, None] / 255 - 0.2) / 0.33
    with torch.no_grad():
        return encoder.features(images).numpy(), np.array(labels)


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits"])
def test_a_score_of_sharded_weights_copies_the_scored_encoder_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.images": 20}
    settings = load.load_recipe(recipe, RECIPES[recipe] | online)
    probe, plan = OnlineProbe(settings, 9), RunPlan(9, 9, 8)
    kind = task_class(settings.task.name)
    task = kind(settings.task.fitted(9, 8, 9), settings.encoder, settings.optim, plan)
    trainer = SimpleNamespace(num_devices=1)
    with scoring(task):
        whole = probe.scores(trainer, task)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        shard(task, "cpu")
        gathered: list[torch.Tensor] = []
        full = DTensor.full_tensor
        monkeypatch.setattr(DTensor, "full_tensor", lambda value: gathered.append(value) or full(value))
        with scoring(task):
            assert probe.scores(trainer, task) == whole
    finally:
        torch.distributed.destroy_process_group()
    assert len(gathered) == len(list(task.trained_encoder.parameters()))


def test_loader_processes_of_scores_are_those_of_one_rank(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks on a machine each has its part of the cores, whichever launcher started them."""
    asked: list[tuple] = []
    monkeypatch.setattr("sslvit.train.callbacks.scoring.pick_workers", lambda *given: asked.append(given) or 0)
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.images": 20}
    run(shards / "train", shards / "run", **online | {"train.steps": 1, "data.workers": None})
    assert asked == [(None, "cpu", 1)]


def test_a_look_gives_back_the_mode_of_every_part() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    module[1].eval()
    with scoring(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in module.modules()] == [True, True, False]


def test_looks_are_due_with_a_line_and_after_the_last_step() -> None:
    assert ScoringCallback(25, 10, 60).every == 30
    assert ScoringCallback(None, 10, 60).every == 60
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 9).tolist() == [0, 1, 2]


def test_data_for_online_scores_is_checked_before_anything_is_written(shards: Path) -> None:
    pack(array_samples(np.zeros((4, 8, 8), np.uint8)), shards / "plain")
    with pytest.raises(ValueError, match="online.train and online.val belong together"):
        load.load_recipe("mae/digits", {"online.train": "x"})
    with pytest.raises(ValueError, match="have no labels"):
        run(shards / "train", shards / "run", **{"online.train": str(shards / "train"),
                                                 "online.val": str(shards / "plain")})  # fmt: skip
    assert not (shards / "run").exists()
