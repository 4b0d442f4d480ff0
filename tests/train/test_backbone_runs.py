"""Runs that train a CNN, or a network of one's own, in the place of the vision transformer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from run_fixtures import same, weights
from shard_fixtures import labeled_shards
from torch import nn

import sslvit
from sslvit.cli import main
from sslvit.models.networks import given_backbone
from sslvit.settings import EncoderSettings
from sslvit.train.folder import RunFolder
from sslvit.train.planning import plan

CNN = "torchvision:shufflenet_v2_x0_5"  # one of 0.3 M parameters
SHORT = {
    "encoder.image_size": 8, "data.global_batch_size": 10, "data.workers": 0,
    "train.steps": 7, "train.log_every": 1, "train.checkpoint_every": 3, "train.precision": "float32",
    "train.accelerator": "cpu", "optim.warmup_epochs": 0.5, "optim.base_lr": 0.02,
}  # fmt: skip
TUNED = SHORT | {
    "data.view.scale": [0.8, 1.0], "data.view.operations": 0, "task.mixup": 0.0, "task.cutmix": 0.0,
}  # fmt: skip
DINO = SHORT | {
    "encoder.channels": 3, "encoder.mean": None, "encoder.std": None,
    "data.view.local_crops": 2, "data.view.local_size": 4, "data.view.jitter": 0.5, "task.out_dim": 12,
    "task.head_width": 16, "task.bottleneck": 8, "task.momentum": 0.9, "task.teacher_temp": 0.06, "task.koleo": 0.0,
}  # fmt: skip


class Tiny(nn.Module):
    """A network of one's own, with running statistics."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)).relu().mean((2, 3))


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path)


def words(settings: dict[str, object]) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in settings.items()]


def test_a_cnn_is_trained_with_labels_by_its_name_and_its_folder_opens_by_it(capsys, shards, tmp_path) -> None:
    out = tmp_path / "cnn"
    data = ["--train", str(shards / "train"), "--val", str(shards / "val")]
    assert main(["finetune", CNN, *data, "--out", str(out), *words(TUNED | {"train.steps": 2})]) == 0
    run = RunFolder(out)
    assert json.loads(run.scores.read_text())["images"] == 21
    assert run.read_config()["init"] is None
    assert "all its weights move at one learning rate" in capsys.readouterr().out
    assert json.loads((run.encoder / "encoder.json").read_text())["encoder"]["backbone"] == CNN
    page = run.page.read_text()
    assert f"<td>encoder</td><td>{CNN}</td>" in page
    assert "<td>encoder.image_size</td>" in page
    assert not re.findall(r"<td>encoder\.(?:patch|depth|class_token|pooling)</td>", page)  # of a transformer
    assert CNN in str(sslvit.runs(tmp_path))
    encoder, trained = sslvit.load_encoder(out).state_dict(), weights(run)
    assert all(torch.equal(value, trained[f"model.encoder.{key}"]) for key, value in encoder.items())
    assert main(["knn", str(out), *data, "--neighbors", "3", "--no-baselines"]) == 0
    assert main(["export", str(out), str(tmp_path / "export"), "--format", "onnx"]) == 1
    assert f"torch.save(sslvit.load_encoder({str(out)!r}).net.state_dict(), FILE)" in capsys.readouterr().err
    plain = torchvision.models.get_model(CNN.removeprefix("torchvision:"))
    found = plain.load_state_dict(sslvit.load_encoder(out).net.state_dict(), strict=False)
    assert found == (["fc.weight", "fc.bias"], [])


def test_a_cnn_trained_from_scratch_is_better_than_chance(shards, tmp_path) -> None:
    longer = TUNED | {"train.steps": 60, "train.log_every": 20, "optim.base_lr": 0.2}
    run = sslvit.finetune(None, shards / "train", shards / "val", out=tmp_path / "run", backbone=Tiny, **longer)
    assert run.to_dict()["scores"]["top1"] > 60  # of three classes


def test_finetune_none_trains_the_encoder_that_the_recipe_describes(shards, tmp_path) -> None:
    shape = {"encoder.patch": 4, "encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2}
    data = ["--train", str(shards / "train"), "--val", str(shards / "val")]
    assert main(["finetune", "none", *data, "--out", str(tmp_path / "one"), *words(TUNED | shape)]) == 0
    one = RunFolder(tmp_path / "one")
    assert one.read_config()["init"] is None
    other = sslvit.finetune(one, shards / "train", shards / "val", out=tmp_path / "other", scratch=True, **TUNED)
    assert same(one, other)


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        ("none", {}, "and it describes none. Give --encoder.preset"),
        (CNN, {"encoder.width": 16}, "--encoder.width: is of the vision transformer"),
        ("torchvision:alexnet", {}, "torchvision:alexnet takes no 3 x 8 x 8 images"),
        ("torchvision:vgg11", {"encoder.small_stem": True}, "vgg11 has no 7 x 7 convolution"),
        ("none", {"encoder.backbone": "resnet18"}, "encoder.backbone: resnet18 is not torchvision:NAME"),
        ("none", {"encoder.backbone": "torchvision:resnet18@IMAGENET1K_V1"}, "weights are not named here"),
        ("none", {"encoder.backbone": "own"}, "own is a module from Python"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(capsys, shards, tmp_path, encoder, changes, message) -> None:
    data = ["--train", str(shards / "train"), "--val", str(shards / "val"), "--out", str(tmp_path / "run")]
    assert main(["finetune", encoder, *data, *words(TUNED | changes)]) != 0
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("recipe", ["mae/digits", "igpt/digits"])
def test_tasks_that_need_tokens_refuse_a_backbone_with_the_reason(shards, tmp_path, recipe) -> None:
    with pytest.raises(ValueError, match=r"x0_5 makes no tokens, and (MAE encodes|iGPT predicts)"):
        sslvit.pretrain(recipe, shards / "train", tmp_path / "run", **{"encoder.backbone": CNN})


@pytest.mark.parametrize("micro", [None, 5])
def test_a_stopped_run_of_a_cnn_resumes_to_the_same_weights(shards, tmp_path, micro) -> None:
    given = {**TUNED, "train.micro_batch_size": micro, "backbone": Tiny}
    data = None, shards / "train", shards / "val"
    whole = sslvit.finetune(*data, out=tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        sslvit.finetune(*data, out=tmp_path / "cut", callbacks=[StopAt(5)], **given)
    assert same(sslvit.resume(tmp_path / "cut", backbone=Tiny), whole)


def test_fine_tuning_of_a_trained_cnn_starts_from_its_weights(shards, tmp_path) -> None:
    given = {**TUNED, "train.steps": 2, "backbone": Tiny}
    data = shards / "train", shards / "val"
    first = sslvit.finetune(None, *data, out=tmp_path / "first", **given)
    second = sslvit.finetune(first, *data, out=tmp_path / "second", **{**given, "optim.base_lr": 1e-12})
    before, after = weights(first), weights(second)
    assert torch.allclose(before["model.encoder.net.conv.weight"], after["model.encoder.net.conv.weight"], atol=1e-9)
    assert second.read_config()["init"] == str(first.path)
    with pytest.raises(ValueError, match=r"first.encoder: these weights are of another architecture"):
        sslvit.finetune(first, *data, out=tmp_path / "third", **given | {"backbone": lambda: Tiny(width=4)})


def test_dino_trains_a_module_from_python_and_resumes_to_the_same_weights(shards, tmp_path) -> None:
    torch.manual_seed(0)
    net = Tiny()
    start = {key: value.clone() for key, value in net.state_dict().items()}
    whole = sslvit.pretrain("dino/digits", shards / "train", tmp_path / "whole", backbone=net, **DINO)
    with pytest.raises(KeyboardInterrupt):
        sslvit.pretrain("dino/digits", shards / "train", tmp_path / "cut", backbone=net, callbacks=[StopAt(5)], **DINO)
    assert same(sslvit.resume(tmp_path / "cut", backbone=net), whole)
    assert all(torch.equal(value, start[key]) for key, value in net.state_dict().items())  # copies are trained
    trained = weights(whole)
    assert not torch.equal(trained["model.encoder.net.conv.weight"], start["conv.weight"])
    assert not torch.equal(trained["model.encoder.net.conv.weight"], trained["model.teacher.net.conv.weight"])


def test_a_run_of_a_module_from_python_opens_only_with_that_module(shards, tmp_path) -> None:
    run = sslvit.pretrain("dino/digits", shards / "train", tmp_path / "run", backbone=Tiny, **DINO)
    with pytest.raises(ValueError, match=r"run.encoder: .*Give it again: sslvit.load_encoder\(RUN, backbone=module\)"):
        sslvit.knn(run, shards / "train", shards / "val")
    encoder = sslvit.load_encoder(run, backbone=Tiny)
    teacher = {key.removeprefix("model.teacher."): value for key, value in weights(run).items() if ".teacher." in key}
    assert all(torch.equal(value, teacher[key]) for key, value in encoder.state_dict().items())
    table = sslvit.knn(encoder, shards / "train", shards / "val", neighbors=[3], device="cpu")
    assert list(table.rows) == ["raw pixels", "untrained encoder", "encoder"]
    with pytest.raises(ValueError, match="of another architecture"):
        sslvit.load_encoder(run, backbone=nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match="own is a module from Python"):
        sslvit.resume(run)


def test_dino_trains_a_network_by_its_name(shards, tmp_path, capsys) -> None:
    out, given = tmp_path / "run", words(DINO | {"encoder.backbone": CNN, "train.steps": 1})
    given += ["--data", str(shards / "train"), "--out", str(out), "--json"]
    assert main(["pretrain", "--config", "dino/digits", *given]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["encoder"], said["scores"]) == (str(out), str(out / "encoder"), None)
    assert said["metrics"]["step"] == 1
    assert (out / "figures" / "neighbors.png").exists()
    assert sslvit.load_encoder(out).settings.backbone == CNN
    assert json.loads((out / "encoder" / "encoder.json").read_text())["provenance"]["weights"] == "teacher"


def test_a_run_of_a_module_is_planned(shards) -> None:
    with given_backbone(Tiny):
        found = plan("dino/digits", images=30, **{**DINO, "encoder.backbone": "own"})
    assert found.forecast.encoder == sum(value.numel() for value in Tiny().parameters())
    assert found.forecast.flops_per_image > 0


def test_the_backbones_key_and_a_module_exclude_each_other(shards, tmp_path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        sslvit.pretrain("dino/digits", shards / "train", tmp_path / "run", backbone=Tiny,
                        **DINO, **{"encoder.backbone": CNN})  # fmt: skip


def test_settings_of_the_transformer_are_the_same_for_every_backbone() -> None:
    plain = EncoderSettings(backbone=CNN, image_size=8)
    assert EncoderSettings(backbone=CNN, image_size=8, width=16, heads=3, drop_path=0.5, pooling="attention") == plain
    with pytest.raises(ValueError, match="small_stem: is for a backbone"):
        EncoderSettings(small_stem=True)
