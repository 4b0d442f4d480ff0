"""What each optimizer step of a run moves weights by, against the formulas of the papers, written once more."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import RECIPES, metrics, run, weights

from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train.fake_step import example

STEPS = 12
SCHEDULE = {
    "train.steps": STEPS, "train.micro_batch_size": 4, "optim.base_lr": 0.32, "optim.min_lr": 0.001,
    "optim.warmup_epochs": 1.0, "optim.weight_decay": 0.1, "optim.final_weight_decay": 0.4,
}  # fmt: skip
PEAK, WARMUP = 0.01, 3  # 0.32 x 8 / 256; an epoch of 30 images in batches of 8


def half_cosine(start: float, end: float, at: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * at)) / 2


def watched_groups(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple]]:
    """(rate, decay, its share of the rate, whether it decays) of each group, step by step."""
    seen: list[list[tuple]] = []
    step = torch.optim.AdamW.step

    def watched(self, closure=None):
        seen.append([(g["lr"], g["weight_decay"], g.get("lr_scale", 1.0), g["decays"]) for g in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_rate_and_decay_of_each_step_are_those_of_the_schedule(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate from zero along a line, then half a cosine; a decay along half a cosine from the first step on."""
    seen = watched_groups(monkeypatch)
    folder = run(shards, tmp_path / "run", **SCHEDULE)
    rates = [PEAK * step / WARMUP for step in range(WARMUP)]
    rates += [half_cosine(PEAK, 0.001, (step - WARMUP) / (STEPS - WARMUP)) for step in range(WARMUP, STEPS)]
    decays = [half_cosine(0.1, 0.4, step / STEPS) for step in range(STEPS)]
    assert len(seen) == STEPS
    for groups, rate, decay in zip(seen, rates, decays, strict=True):
        assert [group[0] for group in groups] == pytest.approx([rate] * 2)
        assert sorted(group[1] for group in groups) == pytest.approx([0, decay])
        assert all((group[1] > 0) == group[3] for group in groups)
    assert [line["lr"] for line in metrics(folder)] == pytest.approx(rates)


def test_a_rate_stays_constant_until_the_cooldown(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched_groups(monkeypatch)
    wsd = {"optim.lr_schedule": "wsd", "optim.cooldown_fraction": 1 / 3}
    run(shards, tmp_path / "run", **SCHEDULE | wsd)
    rates = [PEAK * step / WARMUP for step in range(WARMUP)] + [PEAK] * 5
    rates += [0.001 + (PEAK - 0.001) * (1 - math.sqrt(step / 4)) for step in range(4)]
    assert [groups[0][0] for groups in seen] == pytest.approx(rates)


def test_rates_of_a_fine_tuning_fall_from_the_head_to_the_patches(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched_groups(monkeypatch)
    others = ("task.", "data.view")
    settings = {key: value for key, value in RECIPES["mae/digits"].items() if not key.startswith(others)}
    settings |= {"encoder.channels": 1, "encoder.mean": [0.2], "encoder.std": [0.3], "optim.layer_decay": 0.5,
                 "data.shards": str(shards), "out": str(tmp_path / "run")} | SCHEDULE  # fmt: skip
    from sslvit.train.run import pretrain

    pretrain(load_recipe("finetune/small_images", settings | {"train.steps": 6}))
    scales = {group[2] for group in seen[0]}
    assert scales == {0.25, 0.5, 1.0}  # patches, the block, the head
    peak = half_cosine(PEAK, 0.001, 0)
    assert sorted({group[0] for group in seen[3]}) == pytest.approx([peak * scale for scale in sorted(scales)])


def test_the_teacher_keeps_a_share_that_rises_with_the_steps(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per step, however many micro-batches it has."""
    shares = []
    monkeypatch.setattr("sslvit.tasks.dino.ema_update", lambda average, source, momentum, skip: shares.append(momentum))
    run(shards, tmp_path / "run", recipe="dino/digits", **{"train.micro_batch_size": 2, "task.final_momentum": 0.98})
    expected = [half_cosine(0.9, 0.98, step / 7) for step in range(7)]
    assert shares == pytest.approx([share for share in expected for _ in ("encoder", "head")])


@pytest.mark.parametrize(("by", "largest"), [("all", 0.5), ("parameter", 0.2)])
def test_gradients_are_clipped_by_the_norm_that_is_recorded(by: str, largest: float) -> None:
    changes = {"optim.clip_grad": largest, "optim.clip_grad_by": by, "train.steps": 9}
    settings = load_recipe("mae/digits", RECIPES["mae/digits"] | changes)
    torch.manual_seed(0)
    task = task_class("mae")(settings.task, settings.encoder, settings.optim, RunPlan(9, 3, 8))
    parameters = [p for p in task.parameters() if p.requires_grad]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn_like(parameter) * (0.2 if number % 2 else 0.002)
    before = [parameter.grad.double().numpy().copy() for parameter in parameters]
    task.configure_gradient_clipping(task.configure_optimizers())
    norms = [np.sqrt((gradient**2).sum()) for gradient in before]
    total = np.sqrt(sum(norm**2 for norm in norms))
    assert total > 1.5 * max(norms)
    assert float(task.records["train/grad_norm"][0]) == pytest.approx(total, rel=1e-5)
    for parameter, gradient, norm in zip(parameters, before, norms, strict=True):
        factor = min(1, largest / (total if by == "all" else norm))
        np.testing.assert_allclose(parameter.grad.numpy(), gradient * factor, rtol=1e-4, atol=1e-8)


def test_a_steps_gradient_is_the_mean_over_its_micro_batches(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a step, against the gradients of its micro-batches one by one."""
    task = task_class("mae")
    step, clip = task.training_step, task.configure_gradient_clipping
    alone: list[torch.Tensor] = []
    found = []

    def watched(self, batch, batch_idx=0):
        loss = step(self, batch, batch_idx)
        alone.append(torch.autograd.grad(loss, self.encoder.norm.weight, retain_graph=True)[0])
        return loss

    def looked(self, *given, **named):
        found.append((self.encoder.norm.weight.grad.clone(), torch.stack(alone).mean(0)))
        alone.clear()
        clip(self, *given, **named)

    monkeypatch.setattr(task, "training_step", watched)
    monkeypatch.setattr(task, "configure_gradient_clipping", looked)
    run(shards, tmp_path / "run", **{"train.micro_batch_size": 2, "train.steps": 2})
    assert len(found) == 2
    for gradient, mean in found:
        torch.testing.assert_close(gradient, mean)


def test_gradients_are_gone_before_the_next_forward_pass(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would lie beside its activations, which `sslvit plan` does not count."""
    task = task_class("mae")
    step, held = task.training_step, []

    def watched(self, batch, batch_idx=0):
        held.append(any(parameter.grad is not None for parameter in self.parameters()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", watched)
    run(shards, tmp_path / "run", **{"train.micro_batch_size": 4, "train.steps": 3})
    assert held == [False, True] * 3


def test_the_first_weights_follow_from_the_seed(shards: Path, tmp_path: Path) -> None:
    first = [weights(run(shards, tmp_path / str(n), seed=seed, **{"optim.base_lr": 0.0, "train.steps": 1}))
             for n, seed in enumerate((3, 3, 4))]  # fmt: skip
    name = "model.encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(first[0][name], first[1][name])
    assert not torch.equal(first[0][name], first[2][name])


def test_masks_and_depth_follow_from_seed_step_purpose_and_row() -> None:
    """The numbers of a step: rows of one table for the whole global batch."""
    settings = load_recipe("mae/digits", RECIPES["mae/digits"])

    def drawn(seed: int = 0, step: int = 0, purpose: str = "mask", first_row: int = 0) -> list[list[float]]:
        task = task_class("mae")(settings.task, settings.encoder, settings.optim, RunPlan(9, 3, 8, seed=seed))
        batch = example(settings, 4)
        batch.first_row = first_row
        return task.uniform(purpose, batch, 5, step).tolist()

    one = drawn()
    assert one == drawn()
    assert all(0 <= value < 1 for row in one for value in row)
    assert len({tuple(row) for row in one}) == 4
    assert drawn(first_row=2)[:2] == one[2:]
    for other in (drawn(seed=1), drawn(step=1), drawn(purpose="drop path"), drawn(first_row=4)):
        assert not set(map(tuple, other)) & set(map(tuple, one))


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"train.threads": 3}, "threads", 3),
        ({"train.deterministic": True}, "deterministic", True),
        ({"train.precision": "float64"}, "type", torch.float64),
        ({"train.precision": "float32"}, "type", torch.float32),
        ({"train.precision": "bf16"}, "type", torch.bfloat16),
    ],
)
def test_how_a_step_is_computed_is_what_is_asked_for(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, name: str, value: object
) -> None:
    task = task_class("mae")
    step, seen = task.training_step, {}

    def watched(self, batch, batch_idx=0):
        seen.update(threads=torch.get_num_threads(), deterministic=torch.are_deterministic_algorithms_enabled())
        with torch.no_grad():
            seen["type"] = self.encoder.blocks[0].mlp.fc1(torch.zeros(1, 16, dtype=self.dtype)).dtype
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", watched)
    threads = torch.get_num_threads()
    try:
        run(shards, tmp_path / "run", **{"train.steps": 1}, **changes)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert seen[name] == value
    usual = {"threads": threads, "deterministic": False, "type": torch.float32}
    assert all(seen[key] == usual[key] for key in usual if key != name)


def test_a_line_holds_the_numbers_of_its_own_step(shards: Path, tmp_path: Path) -> None:
    """And not those of the steps before, of which no line was due."""
    every = {line["step"]: line for line in metrics(run(shards, tmp_path / "all"))}
    some = metrics(run(shards, tmp_path / "some", **{"train.log_every": 3}))
    assert [line["step"] for line in some] == [3, 6, 7]
    names = ("train/loss", "lr", "train/grad_norm", "epoch")
    assert all(line[name] == every[line["step"]][name] for line in some for name in names)
