"""Continued pretraining: its architecture is read from the weights, and what is new learns first."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from run_fixtures import TINY, TINY_DINO
from sklearn.datasets import load_sample_images

import sslvit
from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.commands.training import PretrainOptions, wants_requeue
from sslvit.data.open import open_shards
from sslvit.layouts import from_sslvit
from sslvit.models import ViTEncoder
from sslvit.reports.demo import pack_digits
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings
from sslvit.settings.load import load_recipe, takes_init
from sslvit.train.prepare import read_settings

# nothing of which a recipe or a default says
ODD = EncoderSettings(
    image_size=[8, 12], patch=4, width=24, depth=2, heads=3, mlp="swiglu", norm_eps=1e-6, registers=2, layer_scale=0.1,
    channels=1, mean=[0.4], std=[0.2], pooling="class", pos_embed="learned_1d",
)  # fmt: skip
SHORT = {key: value for key, value in TINY.items() if not key.startswith(("encoder.", "optim.", "task."))} | {
    "task.decoder_width": 16, "task.decoder_depth": 1, "task.decoder_heads": 2,
}  # fmt: skip
SHORT_DINO = {key: value for key, value in TINY_DINO.items() if not key.startswith(("encoder.", "optim."))}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    encoder = ViTEncoder(ODD)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_encoder(encoder, tmp_path / "start")
    return tmp_path / "start"


class Weights(pl.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.after.append({name: value.clone() for name, value in module.model.state_dict().items()})


@pytest.mark.parametrize(("task", "changes"), [("mae", SHORT), ("dino", SHORT_DINO)])
def test_the_architecture_is_that_of_the_weights(
    shards: Path, start: Path, tmp_path: Path, task: str, changes: dict
) -> None:
    run = sslvit.pretrain(f"{task}/continue", shards, tmp_path / "run", init=start, **changes)
    encoder = load_encoder(run).settings
    is_as_before = {"drop_path", "activation_checkpointing", "dropout", "init", "color_init"}
    different = {key for key, value in vars(encoder).items() if value != vars(ODD)[key]}
    assert different <= is_as_before
    assert "preset" not in yaml.safe_load(run.config.read_text())["encoder"]
    run = sslvit.resume(run, **{"train.steps": 8})  # by the settings that it wrote
    assert run.read_metrics()[-1]["step"] == 8


def test_what_is_said_behind_the_preset_adapts_the_weights_and_is_said(
    shards: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = SHORT | {"encoder.patch": 2, "encoder.image_size": 8, "encoder.drop_path": 0.3, "train.steps": 1}
    run = sslvit.pretrain("mae/continue", shards, tmp_path / "run", init=start, **changes)
    said = capsys.readouterr().out
    assert "positions interpolated from 2 x 3 to 4 x 4 patches" in said
    assert "patch embedding resized from 4 x 4 to 2 x 2 pixels" in said
    settings = load_encoder(run).settings
    assert (settings.patch, settings.image_size, settings.width, settings.drop_path) == (2, [8, 8], 24, 0.3)


@pytest.mark.parametrize(("task", "changes"), [("mae", SHORT), ("dino", SHORT_DINO)])
def test_a_frozen_encoder_keeps_its_weights_while_what_is_new_learns(
    shards: Path, start: Path, tmp_path: Path, task: str, changes: dict
) -> None:
    weights, before = Weights(), load_encoder(start).state_dict()
    held = {"train.steps": 4, "train.log_every": 1, "optim.warmup_epochs": 0, "optim.base_lr": 1.0,
            "task.freeze_last_layer": 0}  # fmt: skip
    changes = {key: value for key, value in (changes | held).items() if task == "dino" or "freeze_last" not in key}
    epoch = len(open_shards(shards)) // changes["data.global_batch_size"]
    frozen = {"optim.freeze_encoder_epochs": 2 / epoch}
    sslvit.pretrain(f"{task}/continue", shards, tmp_path / "run", init=start, callbacks=[weights], **changes | frozen)
    new = "decoder." if task == "mae" else "head."
    for step, after in enumerate(weights.after):
        moved = [name for name, value in before.items() if not torch.equal(after[f"encoder.{name}"], value)]
        assert bool(moved) == (step >= 2), step
        if task == "dino":  # an average of equal weights, which rounds
            follows = [(after[f"teacher.{name}"] - value).abs().max() > 1e-5 for name, value in before.items()]
            assert any(follows) == (step >= 2), step
    first, second = weights.after[:2]
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith(new))


def test_blocks_far_from_the_output_move_at_lower_rates(start: Path) -> None:
    settings = read_settings("mae/continue", {"init": str(start), "optim.layer_decay": 0.5})
    task = sslvit.make_task(replace(settings, optim=settings.optim.fitted(10, 10, 1e-3)), RunPlan(10, 10, 8))
    scale = {id(p): group["lr_scale"] for group in task.parameter_groups() for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in task.model.named_parameters() if id(p) in scale}
    assert scales["encoder.cls_token"] == scales["encoder.patch_embed.proj.weight"] == 0.125
    assert scales["encoder.blocks.0.attn.qkv.weight"] == 0.25
    assert scales["encoder.blocks.1.attn.qkv.weight"] == 0.5
    assert {value for name, value in scales.items() if name.startswith(("decoder.", "encoder.norm."))} == {1.0}


def test_a_part_behind_the_encoder_moves_at_the_full_rate_whatever_its_name() -> None:
    """A model from outside may have a mask token, or blocks, of its own."""
    settings = load_recipe("mae/digits", {"optim.layer_decay": 0.5})
    task = sslvit.make_task(settings, RunPlan(10, 10, 8))
    task.model.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 4))
    task.model.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    scale = {id(p): group["lr_scale"] for group in task.parameter_groups() for p in group["params"]}
    assert {scale[id(p)] for p in (task.model.mask_token, *task.model.blocks.parameters())} == {1.0}
    assert scale[id(task.encoder.cls_token)] == 0.5 ** (settings.encoder.depth + 1)


def test_a_command_that_is_stopped_early_is_requeued_as_its_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: mae/continue\ntrain: {requeue: false}\n")
    for config, expected in (("mae/continue", True), (str(tmp_path / "mine.yaml"), False)):
        assert wants_requeue(PretrainOptions(config=config, changes={})) is expected


def test_local_crops_that_are_no_whole_patches_are_refused_with_the_next_size(
    shards: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"local_size: 6 is not a multiple of encoder.patch .4.. The next one is 8\."):
        sslvit.pretrain("dino/continue", shards, tmp_path / "run", init=start, **{"data.view.local_size": 6})


def test_a_released_file_that_does_not_tell_its_heads_names_a_command_that_takes_them(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    encoder = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=24, depth=1, heads=3))
    torch.save(from_sslvit(encoder.state_dict(), "dino"), tmp_path / "dino.pth")
    words = ["pretrain", "--config", "mae/continue", "--data", str(shards), "--out", str(tmp_path / "run")]
    assert main([*words, "--init", str(tmp_path / "dino.pth")]) == 1
    assert "sslvit import FILE FOLDER --heads N" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "dino.pth"), str(tmp_path / "start"), "--heads", "3"]) == 0
    assert main(["plan", *words[1:5], "--init", str(tmp_path / "start")]) == 0


def test_any_recipe_takes_the_architecture_where_the_preset_stands(tmp_path: Path) -> None:
    base = replace(ODD, width=48)
    settings = load_recipe("mae/digits", {"encoder.preset": "init", "encoder.depth": 3}, base)
    assert settings.encoder == replace(base, depth=3)
    (tmp_path / "mine.yaml").write_text("base: mae/continue\nencoder: {drop_path: 0.2}\n")
    assert takes_init(tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml", base=base).encoder == replace(base, drop_path=0.2)
    (tmp_path / "other.yaml").write_text("base: mae/continue\nencoder: {preset: vit_tiny}\n")
    assert not takes_init(tmp_path / "other.yaml")
    assert takes_init("mae/digits", {"encoder": {"preset": "init"}})


@pytest.mark.parametrize("words", ["pretrain --out run", "plan --images 30"])
def test_without_an_encoder_to_go_on_from_the_remedy_is_said(
    words: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(shards)] if "pretrain" in words else []
    assert main([*words.split(), "--config", "mae/continue", *data]) == 1
    assert "goes on from an encoder, and none is given. Name it with --init" in capsys.readouterr().err
    assert not Path("run").exists()
    assert main([*words.split(), "--config", "mae/continue", *data, "--encoder.with", "3"]) == 1
    assert "encoder.with: no such setting. Did you mean encoder.width?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="init means the encoder of init=, and mae/continue is read without one"):
        load_recipe("mae/continue")


def test_a_plan_is_of_the_encoder_that_is_named(start: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", "mae/continue", "--init", str(start), "--images", "64"]) == 0
    parameters = sum(p.numel() for p in load_encoder(start).parameters())
    assert f"encoder {parameters:,}" in capsys.readouterr().out


def photo_patches(count: int) -> np.ndarray:
    """Gray patches of 12 x 12 pixels, 'n h w 1', of scikit-learn's two photographs at half their size."""
    photos = [photo.mean(2) for photo in load_sample_images().images]
    source = np.random.default_rng(0)
    patches = []
    for number in range(count):
        photo = photos[number % 2]
        top, left = (int(source.integers(0, side - 24)) for side in photo.shape)
        patches.append(photo[top : top + 24, left : left + 24].reshape(12, 2, 12, 2).mean((1, 3)))
    return np.stack(patches).astype(np.uint8)[..., None]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neighbors_get_better_when_an_encoder_of_other_images_goes_on_with_ones_own(seed: int, tmp_path: Path) -> None:
    pack_digits(tmp_path)
    common = {"seed": seed, "online.train": None, "train.checkpoint_every": 10_000}
    sslvit.pretrain(
        "mae/digits", photo_patches(2000), tmp_path / "photos",
        **common, **{"train.steps": 300, "data.view": {"kind": "crop", "scale": [0.5, 1]}},
    )  # fmt: skip
    recipe = load_recipe("mae/digits")
    sslvit.pretrain(
        "mae/continue", tmp_path / "pretrain", tmp_path / "digits", init=tmp_path / "photos", task=asdict(recipe.task),
        optim={"base_lr": 8e-3, "warmup_epochs": 2}, train={"compile": "none", "steps": 1200},
        **common, **{"data.view": asdict(recipe.data.view), "data.global_batch_size": 64, "data.workers": 0},
    )  # fmt: skip
    table = sslvit.compare(
        {"photos": tmp_path / "photos", "digits": tmp_path / "digits"}, tmp_path / "train", tmp_path / "test",
        neighbors=[20], protocol=None,
    )  # fmt: skip
    (neighbors,) = table.differences
    assert neighbors.points > neighbors.half > 0
    assert "digits against photos, image by image: better in kNN, k = 20" in repr(table)
