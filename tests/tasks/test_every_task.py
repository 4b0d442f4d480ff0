"""What holds for every task: each trained weight is used and moves by the recipe, and chance follows its key."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import BERT

from sslvit import rng
from sslvit.data.batch import Batch
from sslvit.data.views import Views
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, RunSettings
from sslvit.settings.load import load_recipe, takes_init
from sslvit.tasks import task_class
from sslvit.tasks.base import StepOutput, Task

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "bench"
)
SMALL = {"encoder.width": 16, "encoder.depth": 2, "encoder.heads": 2}
HEADS = {
    "mae": {"task.decoder_width": 16, "task.decoder_depth": 1, "task.decoder_heads": 2},
    "dino": {"task.out_dim": 16, "task.head_width": 16, "task.bottleneck": 8},
}  # fmt: skip
OPTIONS = {
    "as the recipe": {},
    "mask token and norm of the pooled vector": {"encoder.mask_token": True, "encoder.fc_norm": True},
    "registers, learned 2-D positions, scales, norms of queries": {
        "encoder.registers": 2, "encoder.pos_embed": "learned_2d", "encoder.prefix_positions": "all",
        "encoder.layer_scale": 0.1, "encoder.qk_norm": True,
    },
    # the mean over patches: a class token has no bias to any patch, so in the last block none would count for it
    "relative bias and locality": {
        "encoder.pos_embed": "relative_bias", "encoder.locality_self_attention": True, "encoder.pooling": "mean",
    },
}  # fmt: skip


def settings_of(recipe: str, **changes) -> RunSettings:
    """A recipe's settings; continued pretraining is that of a plain ViT."""
    base = EncoderSettings() if takes_init(recipe) else None
    return load_recipe(recipe, {"data.shards": "none"} | changes, base)


def task_of(recipe: str, **changes) -> tuple[Task, Batch]:
    """A small task after a recipe, and a batch as it would get it."""
    settings = settings_of(recipe, **SMALL | changes)
    torch.manual_seed(0)
    task = task_class(settings.task.name)(
        settings.task.fitted(1000, 8, 100, 3), settings.encoder, replace(settings.optim, warmup_epochs=1),
        RunPlan(100, 10, 8),
    ).train()  # fmt: skip
    with torch.no_grad():
        for parameter in task.parameters():  # no weight is silent because another one is still zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).specs()
    images = [torch.randn(4, settings.encoder.channels, *size) for size, _ in views]
    number = torch.arange(4)
    return task, Batch(images, number % 3, number, torch.ones(4, dtype=torch.bool), number)


def shrunk(recipe: str) -> dict:
    """What makes a recipe's images and head small."""
    settings = settings_of(recipe)
    encoder, name = settings.encoder, settings.task.name
    if encoder.tokens == "pixel":
        return {"encoder.image_size": 4, "encoder.feature_layer": 1}
    local = {"data.view.local_size": 2 * encoder.patch} if name == "dino" else {}
    return {"encoder.image_size": 4 * encoder.patch, **local, **HEADS.get(name, {})}


@pytest.mark.parametrize(
    ("recipe", "changes", "frozen"),
    [
        ("mae/digits", {}, {"mask_token", "fc_norm.weight", "fc_norm.bias"}),
        ("dino/digits", {}, {"mask_token"}),
        ("igpt/digits", {}, {"mask_token", "fc_norm.weight"}),  # its norms have no bias
        ("igpt/digits", BERT, {"fc_norm.weight"}),
        ("finetune/small_images", {}, {"mask_token"}),
    ],
)
def test_what_no_step_passes_through_is_frozen_and_nothing_else(recipe: str, changes: dict, frozen: set) -> None:
    options = {"encoder.mask_token": True, "encoder.fc_norm": True, **changes}
    task, _ = task_of(recipe, **shrunk(recipe), **options)
    assert {name for name, p in task.encoder.named_parameters() if not p.requires_grad} == frozen
    moved = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert moved == {id(p) for p in task.parameters() if p.requires_grad}


@pytest.mark.parametrize("recipe", ["dino/digits", "finetune/small_images"])
def test_a_class_token_that_sees_no_patch_is_not_trained(recipe: str) -> None:
    with pytest.raises(ValueError, match="in front of a causal encoder, which sees no patch.*encoder.pooling to mean"):
        task_of(recipe, **{"encoder.causal": True, "encoder.pooling": "class", "encoder.class_token": True,
                           "encoder.tokens": "patch"})  # fmt: skip


# ---- what a step draws, how it moves weights, what it records


EVERY_TASK = {
    "mae/digits": {}, "dino/digits": {}, "igpt/digits": {},
    "finetune/small_images": {"task.mixup": 0, "task.cutmix": 0, "task.erase": 0},
}  # fmt: skip


@pytest.mark.parametrize("recipe", EVERY_TASK)
def test_stochastic_depth_follows_step_seed_and_row_and_not_torchs_stream(recipe: str) -> None:
    task, batch = task_of(recipe, **shrunk(recipe), **EVERY_TASK[recipe], **{"encoder.drop_path": 0.5})

    def loss(step: int = 7, seed: int = 0, first_row: int = 0, stream: int = 0) -> float:
        task.run, batch.first_row = replace(task.run, seed=seed), first_row
        torch.manual_seed(stream)
        with torch.no_grad():
            return float(task.compute(batch, step).objective)

    drop_rates = {block.drop_rate for block in task.encoder.blocks}
    assert drop_rates == {0.0, 0.5}
    assert loss() == loss(stream=1)
    others = [loss(step=8), loss(step=17), loss(seed=1), loss(first_row=4)]
    assert len({loss(), *others}) == 5


def test_noise_of_a_step_is_uniform_and_its_rows_are_those_of_the_global_batch() -> None:
    task, batch = task_of("mae/digits", **shrunk("mae/digits"))
    noise = task.uniform("mask", batch, 1000, 3)
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    assert noise.var() == pytest.approx(1 / 12, abs=0.005)
    batch.first_row = 2
    later = task.uniform("mask", batch, 1000, 3)
    assert torch.equal(later[:2], noise[2:])
    assert not torch.equal(later[2:], noise[2:])


@pytest.mark.parametrize("key", [(0, 0, "mask"), (7, 123456, "drop path"), (2**31, 1, "erase")])
def test_numbers_made_on_a_device_are_those_of_numpy_bit_for_bit(key: tuple) -> None:
    rows = np.array([0, 1, 5, 4095, 2**32 + 3, 2**44 - 1])
    numbers = rng.uniform(key, rows, 300)
    assert torch.equal(rng.uniform_on(key, torch.from_numpy(rows), 300), torch.from_numpy(numbers))
    start = int(rng._sequence(key).generate_state(1, np.uint64)[0])
    for row, column in itertools.product(range(len(rows)), (0, 1, 299)):
        cell = int(rows[row]) * 2**20 + column
        assert numbers[row, column] == (split_mix(start, cell) >> 11) * 2.0**-53


def split_mix(start: int, number: int) -> int:
    """Output of Steele's SplitMix64 by its number, in whole numbers of any length."""
    mixed = (start + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


class Steps:
    """What Lightning's optimizer does with a task: an update with gradients that are given."""

    def __init__(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        self.task, self.optimizer, self.monkeypatch = task, task.configure_optimizers(), monkeypatch

    def take(self, step: int) -> dict[str, float]:
        """Update number `step`, and what it records."""
        self.monkeypatch.setattr(type(self.task), "global_step", step)
        self.task.configure_gradient_clipping(self.optimizer)
        self.task.optimizer_step(0, 0, self.optimizer)
        return {name: float(values[-1]) for name, values in self.task.records.items()}


@pytest.mark.parametrize("clip", [None, 0.5, 2.0, 1000.0])
@pytest.mark.parametrize("clip_grad_by", ["all", "parameter"])
def test_gradients_are_clipped_as_asked_and_their_norm_is_recorded_as_it_was(
    clip: float | None, clip_grad_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = task_of(
        "mae/digits", **shrunk("mae/digits"), **{"optim.clip_grad": clip, "optim.clip_grad_by": clip_grad_by}
    )
    trained = [p for p in task.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    before = [p.grad.clone() for p in trained]
    total = sum(float(grad.double().square().sum()) for grad in before) ** 0.5
    steps = Steps(task, monkeypatch)
    given: list[torch.Tensor] = []  # to the optimizer; after its step there are none
    steps.optimizer.step = lambda closure=None: given.extend(p.grad.clone() for p in trained)
    assert steps.take(3)["train/grad_norm"] == pytest.approx(total, rel=1e-5)
    assert all(p.grad is None for p in trained)
    for clipped, grad in zip(given, before, strict=True):
        norm = total if clip_grad_by == "all" else float(grad.norm())
        torch.testing.assert_close(clipped, grad * min((clip or norm) / norm, 1), rtol=1e-4, atol=1e-7)


def test_an_update_moves_weights_as_adamw_at_the_rate_and_decay_of_its_step_and_records_that_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand, for three updates: the first one from zero moments is the same for all averages."""
    changes = {
        "optim.base_lr": 0.32, "optim.min_lr": 0.004, "optim.warmup_epochs": 1, "optim.weight_decay": 0.3,
        "optim.final_weight_decay": 0.7, "optim.betas": [0.6, 0.8], "optim.clip_grad": None,
    }  # fmt: skip
    task, _ = task_of("mae/digits", **shrunk("mae/digits"), **changes)
    weight = task.encoder.blocks[0].attn.qkv.weight
    steps, source = Steps(task, monkeypatch), torch.Generator().manual_seed(0)
    expected, first, second = weight.detach().double().clone(), 0.0, 0.0
    peak = 0.32 * 8 / 256  # of a batch of 8
    for number, step in enumerate((40, 41, 99), start=1):
        gradient = torch.randn(weight.shape, generator=source)
        weight.grad = gradient.clone()
        recorded = steps.take(step)
        half = (1 + np.cos(np.pi * (step - 10) / 90)) / 2  # the warm-up is 10 of 100 steps
        rate, decay = 0.004 + (peak - 0.004) * half, 0.7 + (0.3 - 0.7) * (1 + np.cos(np.pi * step / 100)) / 2
        first = 0.6 * first + 0.4 * gradient.double()
        second = 0.8 * second + 0.2 * gradient.double().square()
        move = first / (1 - 0.6**number) / ((second / (1 - 0.8**number)).sqrt() + 1e-8)
        expected = expected * (1 - rate * decay) - rate * move
        assert recorded["lr"] == pytest.approx(rate)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_marks_every_gradient_it_reaches() -> None:
    for value, is_finite in ((2.0, True), (float("inf"), False), (float("nan"), False)):
        weight = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        task, _ = task_of("mae/digits", **shrunk("mae/digits"))
        task.backward(weight.sum() + value)
        assert bool(weight.grad.isfinite().all()) == is_finite
        assert not is_finite or torch.equal(weight.grad, torch.ones(2))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (1, 10), (2.5, 25), (9, 25)])
def test_a_run_is_young_in_its_warmup_and_at_most_for_a_quarter(warmup: float, steps: int) -> None:
    settings = settings_of("mae/digits", **SMALL | shrunk("mae/digits"))
    optim = replace(settings.optim, warmup_epochs=warmup)
    task = task_class("mae")(settings.task, settings.encoder, optim, RunPlan(100, 10, 8))
    assert task.health_grace_steps == steps


def test_what_the_health_check_sees_is_of_the_features_and_probs_given(monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch = task_of("mae/digits", **shrunk("mae/digits"))
    features, loss = torch.randn(2, 3), torch.tensor(3.0)
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
    output = StepOutput(loss, {"loss": loss}, features, probs, {"variance": torch.tensor(2.0)})
    monkeypatch.setattr(type(task), "compute", lambda self, batch, step: output)
    task.training_step(batch)
    assert not task.logged_features  # not a step that is looked at
    task.logs_features = True
    task.training_step(batch)
    seen = {name: values[0] for name, values in task.logged_features.items()}
    assert torch.equal(seen["features"], features)
    assert seen["variance"].tolist() == [2.0]
    torch.testing.assert_close(seen["entropy"], torch.tensor([1.5, 2.0]) * np.log(2))
    torch.testing.assert_close(seen["uniform_kl"], torch.tensor([0.5, 0.0]) * np.log(2))
    assert seen["choice"][0] == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_trained_weight_of_every_recipe_gets_a_gradient(recipe: str, options: str) -> None:
    changes = OPTIONS[options]
    is_pixel = settings_of(recipe).encoder.tokens == "pixel"
    if is_pixel:
        alone = ("encoder.registers", "encoder.locality_self_attention")  # not for a causal sequence of pixels
        changes = {key: value for key, value in changes.items() if key not in alone}
    task, batch = task_of(recipe, **shrunk(recipe), **changes)
    task.compute(batch, 0).objective.backward()
    idle = [name for name, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    frozen = {name for name, p in task.encoder.named_parameters() if not p.requires_grad}
    assert frozen <= {"mask_token", "fc_norm.weight", "fc_norm.bias"}
    assert ("mask_token" in frozen) == task.encoder.settings.mask_token
