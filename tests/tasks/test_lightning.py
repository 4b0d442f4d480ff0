"""A Lightning user's habits: a Trainer of their own, stock callbacks and loggers, plain data loaders."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from shard_fixtures import two_classes
from torch.utils.data import DataLoader, TensorDataset

import sslvit
from sslvit.data.module import ShardDataModule
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, MAESettings, OptimSettings, SupervisedSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import make_task
from sslvit.tasks.base import as_batch
from sslvit.tasks.mae import MAE
from sslvit.tasks.supervised import Supervised

SMALL = {
    "data.global_batch_size": 8, "data.workers": 0, "train.epochs": 2, "encoder.depth": 1, "encoder.width": 16,
    "encoder.heads": 2, "encoder.image_size": 8, "encoder.patch": 4,
}  # fmt: skip
SMALL_TASK = {
    "mae/digits": {"task.decoder_width": 8, "task.decoder_depth": 1, "task.decoder_heads": 1},
    "dino/digits": {"task.head_width": 8, "task.bottleneck": 4, "task.out_dim": None, "data.view.local_size": 4},
    "igpt/digits": {"encoder.patch": 1, "encoder.feature_layer": None},
}
ENCODER = {"image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    two_classes(folder, train=40, val=20)
    return folder


def quiet_trainer(folder: Path, **options) -> pl.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1} | options
    return pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options
    )


def mae(total_steps: int = 4, steps_per_epoch: int = 2, **run) -> MAE:
    settings = MAESettings(decoder_width=8, decoder_depth=1, decoder_heads=1)
    return MAE(settings, EncoderSettings(**ENCODER), OptimSettings(), RunPlan(total_steps, steps_per_epoch, 8, **run))


def loader(images: int = 16, batch: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(images) % 2), batch)


def test_what_a_loader_of_ones_own_may_give() -> None:
    views, labels = [torch.zeros(4, 3, side, side) for side in (8, 8, 4)], torch.arange(4)
    for given, count, has_labels in (
        (views[0], 1, False), ([views[0]], 1, False), ((views[0], labels), 1, True), (views, 3, False),
        ([views], 3, False), ((views, labels), 3, True), ([views[0], labels, "a.jpg"], 1, True),
    ):  # fmt: skip
        batch = as_batch(given)
        assert (len(batch.views), batch.labels is not None) == (count, has_labels)
    for given in (labels, (labels, labels), [views[0], views[1], labels], "abc"):
        with pytest.raises(ValueError, match="a batch must be images 'b c h w'"):
            as_batch(given)


def test_random_erasing_of_plain_batches_differs_from_step_to_step(tmp_path: Path) -> None:
    encoder = {"encoder.image_size": 8, "encoder.patch": 4, "encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2}
    settings = load_recipe("finetune/small_images", encoder | {
        "data.global_batch_size": 8, "train.steps": 4, "task.erase": 1.0, "task.mixup": 0, "task.cutmix": 0,
        "task.classes": 2, "train.micro_batch_size": 4, "data.shards": "none",
    })  # fmt: skip
    task = make_task(settings, RunPlan(4, 2, 8, 4))
    assert isinstance(task, Supervised)
    seen: list[torch.Tensor] = []
    erase = task.erase
    task.erase = lambda batch, step: seen.append(erase(batch, step)) or seen[-1]
    same = DataLoader(TensorDataset(torch.zeros(16, 3, 8, 8), torch.arange(16) % 2), 4)
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(task, same)
    assert len(seen) == 4
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


@pytest.mark.parametrize("recipe", SMALL_TASK)
def test_stock_callbacks_and_loggers_get_the_metrics(
    recipe: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = load_recipe(recipe, SMALL | {"data.shards": str(shards / "train")} | SMALL_TASK[recipe])
    data = ShardDataModule.from_settings(settings, str(shards / "val"))
    task = make_task(settings, data.run)
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path, "csv"), WandbLogger(save_dir=tmp_path)]
    trainer = quiet_trainer(
        tmp_path, logger=loggers, enable_checkpointing=True,
        callbacks=[best, EarlyStopping("val/loss", patience=5), LearningRateMonitor()],
    )  # fmt: skip
    trainer.fit(task, data)
    loggers[2].experiment.finish()
    assert trainer.global_step == 10  # two epochs of 40 images
    assert {"train/loss", "lr", "train/grad_norm", "val/loss"} <= trainer.callback_metrics.keys()
    assert Path(best.best_model_path).is_file()
    table = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "lr-AdamW/pg1" in table
    assert len([line for line in table.splitlines() if line]) > 10
    again = type(task).load_from_checkpoint(best.best_model_path, weights_only=True)
    assert again.settings == task.settings
    assert again.run == task.run
    for name, value in torch.load(best.best_model_path, weights_only=True)["state_dict"].items():
        assert torch.equal(again.state_dict()[name], value)


def test_records_stay_bounded_without_our_callbacks(tmp_path: Path) -> None:
    task = mae(total_steps=40, steps_per_epoch=20, micro_batch_size=4)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2)
    trainer.fit(task, loader(160, 4))
    assert trainer.global_step == 40
    assert {name: len(values) for name, values in task.records.items()} == {
        "train/loss": 2,
        "train/grad_norm": 1,
        "lr": 1,
    }


class Samples(pl.Callback):
    def __init__(self) -> None:
        self.epochs: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).extend(batch.samples.tolist())


def test_a_second_epoch_is_another_order_of_the_same_images(shards: Path, tmp_path: Path) -> None:
    settings = load_recipe("mae/digits", SMALL | {"data.shards": str(shards / "train")} | SMALL_TASK["mae/digits"])
    data = ShardDataModule.from_settings(settings)
    seen = Samples()
    quiet_trainer(tmp_path, callbacks=[seen]).fit(make_task(settings, data.run), data)
    first, second = seen.epochs[0], seen.epochs[1]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    both = [sample for step in range(10) for sample in data.plan.batch(step)[0].tolist()]
    assert first + second == both  # the order of a run of our own


def test_a_resume_in_the_middle_of_an_epoch_reads_what_is_left(shards: Path, tmp_path: Path) -> None:
    settings = load_recipe("mae/digits", SMALL | {"data.shards": str(shards / "train")} | SMALL_TASK["mae/digits"])
    middle, weights, orders = tmp_path / "middle.ckpt", [], []

    class SaveOnce(pl.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 7 and not middle.exists():
                trainer.save_checkpoint(middle)

    for path in (None, middle):
        data, seen = ShardDataModule.from_settings(settings), Samples()
        task = make_task(settings, data.run)
        trainer = quiet_trainer(tmp_path, callbacks=[seen, SaveOnce()])
        trainer.fit(task, data, ckpt_path=path, weights_only=True if path else None)
        orders.append(seen.epochs)
        weights.append(task.state_dict())
    assert orders[1] == {1: orders[0][1][16:]}  # five steps of 8 images an epoch
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_plain_images_and_labels_are_a_batch(tmp_path: Path) -> None:
    task = mae()
    quiet_trainer(tmp_path).fit(task, loader(), loader(8))
    assert task.trainer.callback_metrics["val/loss"].isfinite()
    classifier = Supervised(
        SupervisedSettings(classes=2), EncoderSettings(**ENCODER), OptimSettings(), RunPlan(4, 2, 8)
    )
    trainer = quiet_trainer(tmp_path)
    trainer.fit(classifier, loader(), loader(8))
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_accuracy_features_and_logits_of_ones_own_loader(tmp_path: Path) -> None:
    settings, run = SupervisedSettings(classes=2), RunPlan(4, 2, 8)
    classifier = Supervised(settings, EncoderSettings(**ENCODER), OptimSettings(), run)
    torch.manual_seed(0)
    torch.nn.init.normal_(classifier.model.head.weight)
    trainer, task, batches = quiet_trainer(tmp_path), mae(), loader(24, 8)
    (found,) = trainer.validate(classifier, batches, verbose=False)
    pixels, labels = batches.dataset.tensors
    with torch.no_grad():
        logits, features = classifier.eval().model(pixels), task.eval().encoder.features(pixels)
    right = (logits.argmax(1) == labels).sum().item()
    assert 0 < right < 24
    assert found["val/top1"] == pytest.approx(100 * right / 24)
    torch.testing.assert_close(torch.cat(trainer.predict(classifier, batches)), logits)
    torch.testing.assert_close(torch.cat(trainer.predict(task, batches)), features)


def test_micro_batches_of_plain_loaders_have_their_place_in_the_global_batch(tmp_path: Path) -> None:
    rows = []

    class Rows(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            rows.append(batch.first_row)

    task = mae(total_steps=2, steps_per_epoch=2, micro_batch_size=4)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2, max_epochs=1, callbacks=[Rows()])
    trainer.fit(task, loader(16, 4))
    assert rows == [0, 4, 0, 4]


def test_validation_loss_is_the_same_every_time_and_moves_nothing(shards: Path, tmp_path: Path) -> None:
    settings = load_recipe("dino/digits", SMALL | {"data.shards": str(shards / "train")} | SMALL_TASK["dino/digits"])
    data = ShardDataModule.from_settings(settings, str(shards / "val"))
    task = make_task(settings, data.run)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    losses = [quiet_trainer(tmp_path).validate(task, data, verbose=False)[0]["val/loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    assert not task.model.output_rows


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2.*Set accumulate_grad_batches=1"),
        ({"max_epochs": 3}, r"6 steps, but the schedules end after 4.*max_steps=4"),
        ({"max_epochs": -1}, r"Trainer: no limit of steps, .*max_steps=4"),
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1.0.*OptimSettings.clip_grad"),
        ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "swa_lrs would have no effect. Use WeightAveraging"),
        (
            {"callbacks": [GradientAccumulationScheduler({1: 2})]},
            r"Scheduler.{1: 2, 0: 1}.*in 1 pass. Leave the callback",
        ),
    ],
)
def test_a_trainer_that_takes_other_steps_is_refused(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        quiet_trainer(tmp_path, **options).fit(mae(), loader())


def test_a_scaled_loss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "precision", "16-mixed")  # Lightning takes bf16 in its place on a CPU
    with pytest.raises(ValueError, match=r'precision="16-mixed".*Set precision="bf16-mixed" or "32-true"'):
        quiet_trainer(tmp_path).fit(mae(), loader())


def test_other_ranks_than_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Trainer: 1 process, but the run plan says 2.*ranks=1"):
        quiet_trainer(tmp_path).fit(mae(ranks=2), loader())


@pytest.mark.parametrize("size", [4, 16])
def test_a_loader_of_other_batches_than_planned_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"gives {size} images at a time, .* plan says 8 .*Set its batch_size=8"):
        quiet_trainer(tmp_path).fit(mae(), loader(16, size))


def test_the_last_batch_of_an_epoch_may_be_smaller(tmp_path: Path) -> None:
    task = mae()
    quiet_trainer(tmp_path).fit(task, loader(12, 8))
    assert task.global_step == 4


def test_what_is_no_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a batch must be images 'b c h w'"):
        quiet_trainer(tmp_path).fit(mae(), DataLoader(TensorDataset(torch.zeros(16, 3)), 8))


@pytest.mark.slow
def test_the_documented_script_runs(shards: Path, tmp_path: Path) -> None:
    script = Path(sslvit.__file__).parents[1] / "docs" / "examples" / "lightning.py"
    words = [sys.executable, script, "mae/digits", shards / "train", shards / "val"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([str(word) for word in words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "runs" / "encoder" / "encoder.json").read_text())
