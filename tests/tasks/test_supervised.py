"""Fine-tuning: what it starts from, what moves how fast, and that it learns from labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shard_fixtures import overwrite

import sslvit
from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.batch import Batch
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.models import ViTEncoder
from sslvit.models.classifier import Classifier
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, OptimSettings, SupervisedSettings
from sslvit.tasks.supervised import Supervised

SMALL = {"image_size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2}
RUN = RunPlan(total_steps=10, steps_per_epoch=5, global_batch_size=8)
SHORT = {
    "data.global_batch_size": 16, "data.workers": 0, "train.steps": 60, "train.log_every": 10,
    "train.precision": "float32",
    "train.accelerator": "cpu", "optim.base_lr": 0.05, "task.mixup": 0.0, "task.cutmix": 0.0,
    "encoder.drop_path": 0.0,
}  # fmt: skip


def make(seed: int = 0, **changes) -> ViTEncoder:
    torch.manual_seed(seed)
    encoder = ViTEncoder(EncoderSettings(**SMALL | changes))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def task_for(encoder: EncoderSettings, seed: int = 0, layer_decay: float = 0.65, **changes) -> Supervised:
    torch.manual_seed(1)
    optim = OptimSettings(layer_decay=layer_decay)
    return Supervised(SupervisedSettings(classes=3, **changes), encoder, optim, replace(RUN, seed=seed))


def batch_of(count: int = 6) -> Batch:
    source = torch.Generator().manual_seed(0)
    views = [torch.rand(count, 3, 8, 8, generator=source)]
    number = torch.arange(count)
    return Batch(views, number % 3, number, torch.ones(count, dtype=torch.bool), torch.zeros_like(number))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    for name, count in (("train", 64), ("val", 30)):
        labels = np.arange(count) % 3
        images = source.integers(0, 60, (count, 8, 8, 3)) + labels[:, None, None, None] * 80
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["a", "b", "c"])
    save_encoder(make(), tmp_path / "encoder")
    return tmp_path


def test_it_starts_from_the_encoder_and_what_is_behind_the_blocks_is_new() -> None:
    start = make()
    settings = replace(start.settings, pooling="mean", fc_norm=True, final_norm=False, drop_path=0.1)
    task = task_for(settings)
    task.start_from(start, "there")
    own, given = task.encoder.state_dict(), start.state_dict()
    assert all(torch.equal(own[key], given[key]) for key in own if not key.startswith("fc_norm."))
    assert "norm.weight" not in own
    assert own["fc_norm.weight"].eq(1).all()
    with_query = task_for(replace(start.settings, pooling="attention"))
    with_query.start_from(start, "there")
    assert "attn_pool.query" in with_query.encoder.state_dict()
    with pytest.raises(ValueError, match="there: an encoder of another architecture .*width: 16 and 32"):
        task_for(replace(start.settings, width=32)).start_from(start, "there")


def test_in_evaluation_the_images_are_whole_and_labels_unmixed() -> None:
    task, batch = task_for(EncoderSettings(**SMALL), erase=0.9, smoothing=0.0).eval(), batch_of()
    logits = task.model(batch.views[0])
    torch.testing.assert_close(
        task.compute(batch, 0).objective, torch.nn.functional.cross_entropy(logits, batch.labels)
    )


def test_positions_are_stretched_to_a_larger_size() -> None:
    start = make()
    task = task_for(replace(start.settings, image_size=16))
    task.start_from(start, "there")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(task.encoder.eval()(images), start.eval()(images))  # as it does by itself at that size
    assert task.encoder.pos_embed.shape == (1, 1 + 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("size", [[16, 24], [8, 4], [12, 8]])
@pytest.mark.parametrize("how", [{}, {"interpolate_antialias": False}, {"interpolate_offset": 0.1}])
@pytest.mark.parametrize("positions", ["none", "learned_1d", "learned_2d", "sincos_2d", "rotary_2d", "relative_bias"])
def test_positions_of_every_kind_are_as_the_weights_have_them_at_the_new_size(
    positions: str, how: dict, size: list[int]
) -> None:
    if how and positions == "relative_bias":
        pytest.skip("its table has no such settings")
    start = make(image_size=[8, 12], pos_embed=positions, registers=1, prefix_positions="all", **how)
    for name, parameter in start.named_parameters():
        if "pos_embed" in name or "rel_pos" in name:
            parameter.copy_(torch.randn_like(parameter))  # so large that no wrong table passes
    task = task_for(replace(start.settings, image_size=size))
    task.start_from(start, "there")
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(task.encoder.eval()(images), start.eval()(images), rtol=1e-4, atol=1e-4)
    assert task.encoder.settings.image_size == size
    if positions != "none":
        other = task_for(replace(start.settings, image_size=size[::-1]))
        other.start_from(start, "there")
        mirrored = other.encoder.eval()(images.transpose(2, 3))[:, 2:].unflatten(1, (size[1] // 4, size[0] // 4))
        here = task.encoder.eval()(images)[:, 2:].unflatten(1, (size[0] // 4, size[1] // 4))
        assert not torch.allclose(mirrored.transpose(1, 2), here, atol=1e-2)  # rows are no columns


def test_a_turning_encoder_keeps_its_range_when_it_is_fine_tuned_again_and_saved(tmp_path: Path) -> None:
    start = make(pos_embed="rotary_2d")
    assert start.settings.rotary_grid == [2, 2]
    larger = ViTEncoder(replace(start.settings, image_size=16))
    larger.load_state_dict(start.state_dict())
    save_encoder(larger, tmp_path / "larger")
    again = load_encoder(tmp_path / "larger")
    assert (again.settings.image_size, again.settings.rotary_grid) == ([16, 16], [2, 2])
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images), start.eval()(images))
    natively = task_for(EncoderSettings(**SMALL | {"image_size": 16, "pos_embed": "rotary_2d"}))
    assert natively.encoder.settings.rotary_grid == [4, 4]
    with pytest.raises(ValueError, match=r"rotary_grid: \[2, 2\] and \[4, 4\]"):
        natively.start_from(start, "there")
    assert EncoderSettings(**SMALL, rotary_grid=[2, 2]).rotary_grid is None  # other positions have none
    with pytest.raises(ValueError, match="encoder.rotary_grid: .* must be"):
        EncoderSettings(**SMALL, pos_embed="rotary_2d", rotary_grid=[2])


def test_rates_fall_from_the_head_to_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_for(EncoderSettings(**SMALL), layer_decay=0.5)
    optimizer = task.configure_optimizers()
    rate_of = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rate_of[id(parameter)] = (group["lr_scale"], group["decays"])
    assert rate_of[id(task.model.head.weight)] == (1.0, True)
    assert rate_of[id(task.model.head.bias)] == (1.0, False)
    assert rate_of[id(task.encoder.norm.weight)] == (1.0, False)
    assert rate_of[id(task.encoder.blocks[1].attn.qkv.weight)] == (0.5, True)
    assert rate_of[id(task.encoder.blocks[0].attn.qkv.weight)] == (0.25, True)
    assert rate_of[id(task.encoder.patch_embed.proj.weight)] == (0.125, True)
    assert rate_of[id(task.encoder.pos_embed)] == (0.125, False)
    assert len(rate_of) == len(list(task.parameters()))
    monkeypatch.setattr(Supervised, "global_step", 3)
    task.optimizer_step(0, 0, optimizer)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates[0.125] == pytest.approx(rates[1.0] / 8)
    assert rates[1.0] == task.lr_at(3) > 0
    assert {group["weight_decay"] for group in optimizer.param_groups if not group["decays"]} == {0.0}


def test_mixing_and_erasing_are_drawn_by_key_and_leave_torchs_stream_alone() -> None:
    task = task_for(EncoderSettings(**SMALL), erase=0.5)
    before = torch.get_rng_state()

    def once(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = batch_of()
        return task.mix(task.erase(batch, step), batch, step)

    one, other = once(0), once(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1].sum(1), torch.ones(6))
    assert (one[1].max(1).values < 1).any()
    assert not torch.equal(one[1], once(1)[1])
    plain = task_for(EncoderSettings(**SMALL), erase=0.0, mixup=0.0, cutmix=0.0)
    images, target = plain.mix(plain.erase(batch_of(), 0), batch_of(), 0)
    assert torch.equal(images, batch_of().views[0])
    assert torch.equal(target.argmax(1), batch_of().labels)


def test_training_images_of_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="--train: all images are of one class, so there is nothing to learn"):
        SupervisedSettings().fitted(images=12, global_batch_size=4, total_steps=2, classes=1)


def test_smoothing_that_leaves_nothing_of_the_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task.smoothing: 1.0 must be in \[0, 1\)"):
        SupervisedSettings(smoothing=1.0)


def test_labels_are_smoothed() -> None:
    torch.manual_seed(0)
    model, target = Classifier(EncoderSettings(**SMALL), 3), torch.eye(3)[batch_of().labels]
    torch.nn.init.normal_(model.head.weight)
    images = batch_of().views[0]
    logits = model(images)
    found = {}
    for smoothing in (0.0, 0.6):
        even = (1 - smoothing) * target + smoothing / 3
        found[smoothing] = model.loss(images, target, smoothing).loss
        torch.testing.assert_close(found[smoothing], -(even * logits.log_softmax(1)).sum(1).mean())
        task = task_for(EncoderSettings(**SMALL), smoothing=smoothing, mixup=0.0, cutmix=0.0, erase=0.0)
        task.model.load_state_dict(model.state_dict())
        torch.testing.assert_close(task.compute(batch_of(), 0).objective, found[smoothing])
    assert float(found[0.6].detach()) != pytest.approx(float(found[0.0].detach()), rel=1e-3)


def mixed(step: int = 0, seed: int = 0, first_row: int = 0, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    task, batch = task_for(EncoderSettings(**SMALL), seed, **changes), batch_of()
    batch.first_row = first_row
    return task.mix(batch.views[0], batch, step)


def shares_of(target: torch.Tensor) -> set[float]:
    """The weight of each image's own label; six images of labels 0, 1, 2, 0, 1, 2, so neighbors differ."""
    return {round(float(row[label]), 5) for row, label in zip(target, batch_of().labels, strict=True)}


def test_mixing_is_drawn_by_step_seed_and_micro_batch_and_labels_follow_the_images() -> None:
    share = {}
    for name, key in {"": {}, "step": {"step": 1}, "seed": {"seed": 1}, "row": {"first_row": 6}}.items():
        images, target = mixed(mixup=0.8, cutmix=0.0, **key)
        (share[name],) = shares_of(target)  # one for the whole micro-batch
        original = batch_of().views[0]
        expected = share[name] * original + (1 - share[name]) * original.roll(1, 0)
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert len(set(share.values())) == 4


def test_mixup_and_cutmix_draw_their_share_from_their_own_beta_distribution() -> None:
    """Beta(0.05, 0.05) is nearly always near 0 or 1, Beta(100, 100) always near a half."""

    def drawn(**changes) -> np.ndarray:
        return np.array([next(iter(shares_of(mixed(step, **changes)[1]))) for step in range(40)])

    assert (abs(drawn(mixup=100.0, cutmix=0.0) - 0.5) < 0.2).all()
    assert (abs(drawn(mixup=0.05, cutmix=0.0) - 0.5) > 0.3).mean() > 0.7
    half = drawn(mixup=0.0, cutmix=100.0)  # a box of about 4 x 4 of the 8 x 8 pixels, less where it lies over the edge
    assert ((half >= 0.6) & (half < 1)).all()
    extreme = drawn(mixup=0.0, cutmix=0.05)
    assert 0.2 < (extreme == 1).mean() < 0.8  # no box
    assert (extreme < 0.75).any()


def test_where_both_are_asked_for_each_step_draws_one_of_them() -> None:
    kinds = []
    for step in range(30):
        images, _ = mixed(step, mixup=1.0, cutmix=1.0)
        original = batch_of().views[0]
        is_own, is_other = images == original, images == original.roll(1, 0)
        kinds.append(bool((is_own | is_other).all()))  # CutMix takes whole pixels
    assert 5 < sum(kinds) < 25


def test_erasing_is_drawn_by_seed_epoch_and_sample_wherever_the_image_stands() -> None:
    def erased(seed: int = 0, epoch: int = 0, samples: tuple = (4, 9), step: int = 0) -> torch.Tensor:
        task = task_for(EncoderSettings(**SMALL), seed, erase=1.0)
        number = torch.tensor(samples)
        batch = Batch([torch.full((2, 3, 8, 8), 7.0)], number % 3, number, torch.ones(2, dtype=torch.bool),
                      torch.full((2,), epoch))  # fmt: skip
        return task.erase(batch, step)

    one = erased()
    assert torch.equal(erased(samples=(9, 4)).flip(0), one)
    assert torch.equal(erased(step=3), one)
    boxes = [tuple((images[0] != 7).flatten().tolist()) for images in (one, erased(1), erased(epoch=1), one.flip(0))]
    assert len(set(boxes)) == 4
    noise = one[one != 7]
    assert noise.std() == pytest.approx(1, abs=0.3)  # random numbers of deviation one, not one value
    assert len(noise.unique()) > 0.9 * len(noise)


def test_whether_an_image_is_erased_is_drawn_by_step_and_row() -> None:
    task = task_for(EncoderSettings(**SMALL), erase=0.5)

    def which(step: int, first_row: int = 0) -> list[bool]:
        batch = batch_of()
        batch.first_row = first_row
        return (task.erase(batch, step) != batch.views[0]).flatten(1).any(1).tolist()

    assert which(3) == which(3)
    assert len({tuple(which(step)) for step in range(8)}) > 3
    assert len({tuple(which(3, row)) for row in range(0, 48, 6)}) > 3


def test_a_new_head_is_nearly_zero_and_reads_what_is_pooled() -> None:
    task = task_for(EncoderSettings(**SMALL | {"pooling": "mean", "fc_norm": True}))
    assert float(task.model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.3)
    assert not task.model.head.bias.any()
    task = task_for(task.encoder.settings, mixup=0.0, cutmix=0.0, erase=0.0, smoothing=0.0)
    task.model.head.weight.data.normal_()
    batch = batch_of()
    pooled = task.encoder.fc_norm(task.encoder(batch.views[0])[:, 1:].mean(1))
    expected = torch.nn.functional.cross_entropy(pooled @ task.model.head.weight.T, batch.labels)
    torch.testing.assert_close(task.compute(batch, 0).objective, expected)
    torch.testing.assert_close(task.model(batch.views[0]), pooled @ task.model.head.weight.T)


@pytest.mark.parametrize("layer_decay", [0.5, 0.9])
def test_the_decay_of_rates_is_the_settings(layer_decay: float) -> None:
    task = task_for(EncoderSettings(**SMALL), layer_decay=layer_decay)
    rates = sorted({group["lr_scale"] for group in task.parameter_groups()})
    assert rates == pytest.approx(sorted(layer_decay**power for power in range(4)))


def test_erasing_follows_its_probability() -> None:
    erased = 0
    for seed in range(40):
        task = task_for(EncoderSettings(**SMALL), seed, erase=0.25)
        changed = (task.erase(batch_of(), 0) != batch_of().views[0]).flatten(1).any(1)
        erased += int(changed.sum())
    assert 0.15 < erased / 240 < 0.35


def test_an_image_is_erased_elsewhere_in_another_epoch() -> None:
    task = task_for(EncoderSettings(**SMALL), erase=0.999)
    erased = []
    for epoch in (0, 0, 1):
        batch = batch_of()
        batch.epochs = torch.full((6,), epoch)
        erased.append(task.erase(batch, 0))
    assert torch.equal(erased[0], erased[1])
    assert all(not torch.equal(one, other) for one, other in zip(erased[0], erased[2], strict=True))


def test_training_data_as_validation_data_is_refused_or_said(shards: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["finetune", str(shards / "encoder"), "--train", str(shards / "train"), "--val", str(shards / "train")]
    words += [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    words += ["--out", str(shards / "run"), "--train.steps", "2"]
    assert main(words) == 1
    assert "the same images. Scores of" in (said := capsys.readouterr().err)
    assert said.endswith("or pass --task.allow_same_data true.\n")
    assert not (shards / "run").exists()
    assert main([*words, "--task.allow_same_data", "true"]) == 0
    assert "(those that it was trained on: it says nothing of others)" in capsys.readouterr().out
    assert json.loads((shards / "run" / "scores.json").read_text())["is_training_data"]


def test_the_command_learns_and_writes_what_it_reports(shards: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["finetune", str(shards / "encoder"), "--train", str(shards / "train"), "--val", str(shards / "val")]
    changes = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    assert main([*words, "--out", str(shards / "run"), *changes, "--task.validate_every", "25"]) == 0
    assert "% on 30 images" in capsys.readouterr().out
    scores = json.loads((shards / "run" / "scores.json").read_text())
    assert scores["top1"] > 60
    assert scores["images"] == 30
    lines = [json.loads(line) for line in (shards / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/top1" in line] == [30, 60]  # 25, rounded up to a line
    assert lines[-1]["val/top1"] == scores["top1"]
    encoder = load_encoder(shards / "run")
    assert encoder.settings.fc_norm
    head = load_file(shards / "run" / "encoder" / "head.safetensors")
    assert head["head.weight"].shape == (3, 16)
    # what was written classifies as what was scored
    from sslvit.evaluate.classify import accuracy
    from sslvit.evaluate.sources import LabeledSet

    def logits(images: torch.Tensor) -> torch.Tensor:
        return encoder.features(images) @ head["head.weight"].T + head["head.bias"]

    data = LabeledSet(load_index(shards / "val"), 3)
    assert accuracy(logits, data, encoder.settings, torch.device("cpu"), 7).top1 == pytest.approx(scores["top1"])
    assert main([*words, "--out", str(shards / "run"), *changes]) == 1
    assert "already exists" in capsys.readouterr().err


def test_a_resumed_run_ends_with_the_same_weights(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslvit.train.callbacks.checkpoints import Checkpoints

    changes = SHORT | {"train.steps": 7, "train.checkpoint_every": 3, "train.log_every": 1, "task.mixup": 0.8,
                       "task.cutmix": 1.0, "task.erase": 0.5, "encoder.drop_path": 0.2}  # fmt: skip
    paths = [str(shards / name) for name in ("encoder", "train", "val")]
    whole = sslvit.finetune(*paths, out=shards / "whole", **changes)
    on_step = Checkpoints.on_step

    def fail_after_step_5(callback, trainer, module) -> None:
        on_step(callback, trainer, module)
        if callback.step == 5:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_step", fail_after_step_5)
        with pytest.raises(RuntimeError, match="stopped"):
            sslvit.finetune(*paths, out=shards / "cut", **changes)
    cut = sslvit.finetune(*paths, out=shards / "cut", resume=True, **changes)
    one, other = (torch.load(run.checkpoint, weights_only=True)["state_dict"] for run in (whole, cut))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_does_not_go_on_with_other_labels_of_the_same_images(shards: Path) -> None:
    paths = [str(shards / name) for name in ("encoder", "train", "val")]
    run = sslvit.finetune(*paths, out=shards / "run", **SHORT | {"train.steps": 2})
    index = load_index(shards / "train")
    before = index.labels_fingerprint()
    index.records = np.array(index.records)
    index.records["label"] = (index.records["label"] + 1) % 3
    assert index.labels_fingerprint() != before
    index.save()
    with pytest.raises(ValueError, match=f"written with other data .labels {before} then"):
        sslvit.resume(run, **{"train.steps": 3})


def test_what_cannot_be_fine_tuned_is_refused(shards: Path, capsys: pytest.CaptureFixture) -> None:
    pack(array_samples(np.zeros((16, 8, 8, 3), np.uint8)), shards / "plain")
    pack(array_samples(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]), shards / "other", ["a", "d"])

    def failing(train: str, val: str, *more: str) -> str:
        words = ["finetune", str(shards / "encoder"), "--train", str(shards / train), "--val", str(shards / val)]
        assert main([*words, "--out", str(shards / "new"), "--data.global_batch_size", "8", *more]) == 1
        assert not (shards / "new").exists()
        return capsys.readouterr().err

    assert "--train: supervised training needs labels, and these images have none" in failing("plain", "val")
    (shards / "flat").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(shards / "flat" / "1.png")
    for sets, option in ((("flat", "val"), "--train"), (("train", "flat"), "--val")):
        error = failing(*sets)
        assert f"{option} {shards / 'flat'}: images side by side have no labels. Give one folder" in error
    assert "have no labels" in failing("train", "plain")
    assert "have different classes" in failing("train", "other")
    assert "trains mae, not with labels" in failing("train", "val", "--config", "mae/digits")
    assert "--init: fine-tuning takes ENCODER for that" in failing("train", "val", "--init", "x")
    assert "1 is too few" in failing("train", "val", "--train.micro_batch_size", "1")
    assert "task.smoothing: 2" in failing("train", "val", "--task.smoothing", "2")
    assert "task.classes: 5, but the data has 3" in failing("train", "val", "--task.classes", "5")


def test_a_learned_query_and_a_larger_size_are_trained_and_saved(shards: Path) -> None:
    changes = SHORT | {"train.steps": 2, "encoder.image_size": 16, "encoder.pooling": "attention"}
    paths = [str(shards / name) for name in ("encoder", "train", "val")]
    run = sslvit.finetune(*paths, out=shards / "run", **changes)
    encoder = load_encoder(run.path)
    assert encoder.settings.image_size == [16, 16]
    assert encoder.features(torch.randn(1, 3, 16, 16)).shape == (1, 16)
    assert "attn_pool.query" in encoder.state_dict()


def test_few_images_are_enough(shards: Path) -> None:
    """What only neighbors need (as many images as their k) is not asked of fine-tuning."""
    pack(array_samples(np.zeros((6, 8, 8, 3), np.uint8), [0, 1, 2] * 2), shards / "six", ["a", "b", "c"])
    changes = SHORT | {"train.steps": 1, "data.global_batch_size": 4}
    run = sslvit.finetune(shards / "encoder", shards / "six", shards / "val", out=shards / "run", **changes)
    assert run.scores.exists()


def test_training_from_scratch_differs_in_its_start_alone(shards: Path) -> None:
    changes = SHORT | {"train.steps": 1}
    paths = [str(shards / name) for name in ("encoder", "train", "val")]
    tuned, scratch = (
        sslvit.finetune(*paths, out=shards / name, scratch=name == "scratch", **changes)
        for name in ("tuned", "scratch")
    )
    one, other = (run.read_config() for run in (tuned, scratch))
    assert one.pop("init") == str(shards / "encoder")
    assert other.pop("init") is None
    one.pop("out"), other.pop("out")
    assert one == other
    again = sslvit.finetune(*paths, tuned.config, shards / "again", scratch=True)  # a recipe that names an encoder
    assert again.read_config()["init"] is None


def test_a_run_whose_reported_images_cannot_be_read_keeps_its_weights_and_is_scored_by_a_resume(
    shards: Path, capsys: pytest.CaptureFixture
) -> None:
    index = load_index(shards / "val")
    before = overwrite(index, dict.fromkeys(range(5)))
    words = ["finetune", str(shards / "encoder"), "--train", str(shards / "train"), "--val", str(shards / "val")]
    changes = [word for key, value in (SHORT | {"train.steps": 2}).items() for word in (f"--{key}", str(value))]
    out = shards / "run"
    assert main([*words, "--out", str(out), *changes]) == 1
    assert "5 of 30 images cannot be read, more than the 1.0%" in capsys.readouterr().err
    assert not (out / "scores.json").exists()
    checkpoint = (out / "checkpoints" / "last.ckpt").read_bytes()
    overwrite(index, before)
    assert main(["resume", str(out)]) == 0
    assert "% on 30 images" in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["step"], scores["images"], scores["unreadable"]) == (2, 30, 0)
    assert main(["resume", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == scores
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == checkpoint
    assert (out / "encoder" / "head.safetensors").exists()
