"""A collapse is noticed, explained and written down; a healthy run is left in peace."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_fixtures import run
from sklearn.datasets import load_digits

from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate.health import feature_std, rankme
from sslvit.models.mae import MAEModel, mask_of, patchify
from sslvit.run_plan import RunPlan
from sslvit.settings import DINOSettings, EncoderSettings, MAESettings, OptimSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.tasks.base import StepOutput, Task, as_batch
from sslvit.tasks.symptoms import Symptom, not_learning
from sslvit.train.callbacks.health import Health, checked_every, measure, not_finite
from sslvit.train.folder import RunFolder, append_lines
from sslvit.train.run import pretrain

PLAN = RunPlan(total_steps=1000, steps_per_epoch=100, global_batch_size=32)


def test_feature_std_is_0_for_one_and_1_for_independent_channels() -> None:
    assert feature_std(torch.ones(50, 8) * 3) == 0
    assert feature_std(torch.randn(4000, 64) * 7) == pytest.approx(1, abs=0.02)
    halves = torch.cat([torch.ones(4000, 32), torch.randn(4000, 32)], 1)
    assert feature_std(halves) == pytest.approx(0.5, abs=0.05)


def test_rankme_counts_directions() -> None:
    basis = torch.linalg.qr(torch.randn(40, 40)).Q
    assert rankme(basis[:, :5] @ basis[:5]) == pytest.approx(5, abs=0.05)  # five equal singular values
    assert rankme(torch.ones(30, 8)) == pytest.approx(1, abs=0.01)
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    shares = np.array([0.75, 0.25])
    assert rankme(uneven) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), abs=1e-4)


def dino(**changes) -> Task:
    """A small task with 256 prototypes."""
    task = DINOSettings(**{"out_dim": 256, "head_width": 16, "bottleneck": 8, "teacher_temp": 0.04} | changes)
    return task_class("dino")(task, EncoderSettings(8, patch=4, width=8, depth=1, heads=1), OptimSettings(), PLAN)


def test_prototype_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    task = dino()
    probs = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0.1, 0.9]])
    output = StepOutput(torch.zeros(()), {}, torch.randn(4, 8), probs)
    monkeypatch.setattr(task, "compute", lambda batch, step: output)
    batch = as_batch(torch.zeros(4, 3, 8, 8))
    task.training_step(batch)
    assert not task.logged_features  # this step is not checked
    task.logs_features = True
    task.training_step(batch)
    measures = measure({name: torch.cat(parts) for name, parts in task.logged_features.items()})
    entropy = (0 + math.log(2) + math.log(4) - 0.1 * math.log(0.1) - 0.9 * math.log(0.9)) / 4
    assert measures["teacher_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert measures["teacher_uniform_kl"] == pytest.approx(math.log(4) - entropy, abs=1e-6)
    assert measures["largest_prototype_share"] == 0.75


HEALTHY = {
    "loss": 3.4, "teacher_entropy": 2.7, "teacher_uniform_kl": math.log(256) - 2.7, "largest_prototype_share": 0.2,
    "feature_std": 0.5, "rankme": 20.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "task", "name", "knob"),
    [
        ({}, {}, None, ""),
        ({"teacher_entropy": math.log(256), "loss": 5.545}, {"teacher_temp": 0.3}, "even", "teacher_temp"),
        ({"teacher_entropy": math.log(256)}, {"teacher_temp": 0.08}, "even", "Lower task.teacher_temp"),
        ({"teacher_entropy": math.log(256)}, {}, "even", "Lower optim.base_lr"),
        ({"largest_prototype_share": 0.97}, {"center_momentum": 1.0}, "one prototype", "task.center_momentum"),
        ({"largest_prototype_share": 0.97}, {}, "one prototype", "task.centering: sinkhorn"),
        ({"loss": math.log(256)}, {}, "stuck", "optim.base_lr"),
        ({"feature_std": 0.004}, {}, "features", "optim.base_lr"),
        ({"rankme": 1.1}, {}, "features", "optim.base_lr"),
        ({"loss": float("nan")}, {}, "not finite", "optim.clip_grad"),
        ({"rankme": float("nan")}, {}, "not finite", "Lower optim.base_lr"),
        ({"teacher_entropy": 5.5}, {"warmup_teacher_temp": 0.3}, "even", "task.warmup_teacher_temp"),
    ],
)
def test_each_symptom_names_its_knob(seen: dict, task: dict, name: str | None, knob: str) -> None:
    seen = HEALTHY | seen
    seen["teacher_uniform_kl"] = math.log(256) - seen["teacher_entropy"]
    symptom = find_symptom(dino(**task), seen)
    assert (symptom.name if symptom else None) == name
    assert symptom is None or knob in symptom.suggestion


def find_symptom(task: Task, measures: dict, images: int = 64) -> Symptom | None:
    """As the health check finds it."""
    return not_finite(measures, task.optim) or next(iter(task.symptoms(measures | {"images": float(images)})), None)


def test_long_runs_are_checked_some_hundred_times() -> None:
    """The host computes spectra in a check, for which a GPU may have to wait."""
    assert [checked_every(steps, 20) for steps in (1, 4999, 5000, 9999, 10_000, 500_000)] == [20, 20, 20, 20, 40, 2000]


def test_a_suggestion_is_not_what_is_set_already() -> None:
    task = dino(centering="sinkhorn", batch_norm=True)
    one = find_symptom(task, HEALTHY | {"largest_prototype_share": 1.0})
    assert "sinkhorn" not in one.suggestion
    assert "batch_norm" not in one.suggestion
    assert "clip" not in not_finite(HEALTHY | {"loss": math.inf}, OptimSettings(clip_grad=3.0)).suggestion
    few = HEALTHY | {"largest_prototype_share": 1.0, "feature_std": 0.0}
    assert find_symptom(task, few, images=2) is None  # two images can be alike by chance


def judged(tmp_path: Path, checks: str, total: int = 1000, grace: int = 0) -> list[str]:
    """The verdict after each check: e(ven), o(ne prototype), n(ot finite) or . for a healthy one."""
    folder = RunFolder(tmp_path)
    health = Health(folder, RunPlan(total, 10, 8), every=10)
    names = {"e": "even", "o": "one prototype", "n": "not finite"}
    verdicts = []
    for number, check in enumerate(checks, start=1):
        health.step = 10 * number
        symptom = Symptom(names[check], "seen", "Do this.") if check in names else None
        health.judge(symptom, {"loss": 1.0}, is_early=number <= grace)
        verdicts.append(json.loads(folder.health.read_text())["verdict"])
        again = Health(folder, RunPlan(total, 10, 8), every=10)  # as a resumed run
        again.load_state_dict(json.loads(json.dumps(health.state_dict())))
        health = again
    return verdicts


def test_what_a_constant_guess_costs_is_that_of_the_whole_step() -> None:
    """However its images are cut into micro-batches: by hand, over all of them."""
    source = torch.Generator().manual_seed(0)
    encoder = EncoderSettings(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    model = MAEModel(MAESettings(target="raw", decoder_width=16, decoder_depth=1, decoder_heads=2), encoder)
    images = torch.randn(8, 1, 8, 8, generator=source, dtype=torch.float64) + torch.arange(8)[:, None, None, None]
    noise = torch.rand(8, 16, generator=source)
    parts = [model.target_moments(images[rows], noise[rows]) for rows in (slice(0, 4), slice(4, 8))]
    target, is_hidden = patchify(images, 2), mask_of(model.mask(noise)[1], 16)
    expected = (target[is_hidden] - target.mean((0, 1))).square().mean()
    assert measure({"target_moments": torch.stack(parts)}) == {"target_variance": pytest.approx(float(expected))}
    entropy = -sum(p * math.log(p) for p in (5 / 8, 1 / 8, 2 / 8))
    counts = torch.tensor([[4, 0, 0, 0], [1, 1, 0, 2]])
    assert measure({"color_counts": counts}) == {"unigram_entropy": pytest.approx(entropy)}


def test_a_verdict_rests_on_several_checks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert judged(tmp_path, "..e..") == ["too early to say"] * 2 + ["suspicious", "healthy", "healthy"]
    assert capsys.readouterr().out == ""
    assert judged(tmp_path, "eeee", grace=3)[:3] == ["too early to say"] * 3
    assert judged(tmp_path, "eoeo")[-1] == "collapsed"  # it swings between two ways to fail
    capsys.readouterr()
    assert judged(tmp_path, "eee.ee...") == [
        *["too early to say"] * 2, *["collapsed"] * 6, "healthy",
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["step 30", "step 90"]
    assert said[1].endswith("this run has recovered from its collapse.")
    assert judged(tmp_path, "n") == ["collapsed"]
    assert judged(tmp_path, "..", total=20) == ["too early to say"] * 2
    assert judged(tmp_path, "ee", total=20) == ["too early to say", "collapsed"]  # a short run has no third check
    assert judged(tmp_path, "ee.ee", total=2500)[-1] == "collapsed"  # four of the five checks that it needs
    assert judged(tmp_path, "e.e.e", total=2500)[-1] == "suspicious"
    assert judged(tmp_path, "eeeee.e...", total=2500)[-2:] == ["collapsed", "healthy"]  # two, then one of five
    long = judged(tmp_path, "e" * 30, total=10_000)  # a fiftieth of it: 20 checks
    assert [long.index("collapsed"), long.count("collapsed")] == [19, 11]


def test_no_symptom_counts_until_the_step_that_its_task_names(tmp_path: Path) -> None:
    """A loss that is not finite aside: a network that has just begun looks much the same."""
    task = dino(out_dim=64)
    health = Health(RunFolder(tmp_path), RunPlan(100, 10, 32), every=1)
    verdicts = []
    for health.step in range(1, 8):
        even = {"features": torch.randn(32, 8), "entropy": torch.full((32,), math.log(64)),
                "uniform_kl": torch.zeros(32), "choice": torch.arange(32)}  # fmt: skip
        module = SimpleNamespace(
            logs_features=True, guard=SimpleNamespace(skipped=False), symptoms=task.symptoms, optim=task.optim,
            logged_features={name: [value] for name, value in even.items()}, health_grace_steps=3,
            loss_shows_learning=task.loss_shows_learning,
            records={"train/loss": [torch.tensor(4.1)]}, record=lambda name, value: None,
        )  # fmt: skip
        health.on_step(SimpleNamespace(is_global_zero=True, world_size=1), module)
        verdicts.append(health.verdict)
    assert verdicts == ["too early to say"] * 5 + ["collapsed"] * 2


CURVES = json.loads((Path(__file__).parent / "curves.json").read_text())  # of MAE on digits, at three learning rates


@pytest.mark.parametrize(
    ("losses", "is_stuck"),
    [
        (CURVES["flat"], True),  # a learning rate of 1e-9
        (CURVES["flat"][:15], False),  # too few to say so
        (CURVES["flat"][:30], False),  # a fall of two percent could hide in this noise
        (CURVES["fast"][:60], False),
        (CURVES["slow"][450:], False),  # it falls by three percent, which is as much as its noise from step to step
        ([0.6 + 0.001 * (n % 2) for n in range(100)], True),
        ([0.6 - 0.0001 * n + 0.003 * (n * 7 % 5) for n in range(100)], False),
        ([0.6 + 0.001 * n for n in range(40)], True),  # it rises
    ],
)
def test_a_loss_that_has_moved_by_no_more_than_its_noise_is_told_from_one_that_falls(losses, is_stuck: bool) -> None:
    symptom = not_learning(losses, 81, OptimSettings(base_lr=1e-9))
    assert (symptom is not None) == is_stuck
    if symptom:
        assert re.search(r"the loss \(.*\) has (not fallen by more than its noise|risen) since step 81", symptom.seen)
        assert "optim.base_lr (1e-09)" in symptom.suggestion


def test_noise_without_a_trend_is_called_so_and_a_fall_of_five_errors_is_not() -> None:
    source = np.random.default_rng(0)
    flat, falling = 0, 0
    for _ in range(300):
        noise = source.normal(0, 0.01, 100)
        flat += not_learning(list(1 + noise), 1, OptimSettings()) is not None
        fallen = np.linspace(0, 5 * 0.01 * math.sqrt(12 / 100), 100)
        falling += not_learning(list(1 + noise - fallen), 1, OptimSettings()) is not None
    assert flat > 0.95 * 300
    assert falling < 0.03 * 300


@pytest.mark.parametrize("task", ["mae", "dino"])
def test_a_run_whose_loss_stays_where_it_is_is_not_learning(tmp_path: Path, capsys, task: str) -> None:
    """Said once, in the second half; a teacher that learns with its student may keep the loss where it is."""
    folder, plan = RunFolder(tmp_path), RunPlan(200, 10, 64)
    health, source = Health(folder, plan, every=1), np.random.default_rng(0)
    verdicts = []
    for health.step in range(1, 201):
        loss = 2 - 0.01 * health.step if health.step > 150 else 2 + source.normal(0, 0.01)
        module = SimpleNamespace(
            logs_features=True, guard=SimpleNamespace(skipped=False), symptoms=lambda measures: [],
            optim=OptimSettings(), logged_features={"features": [torch.randn(32, 8)]}, health_grace_steps=10,
            records={"train/loss": [torch.tensor(loss)]}, record=lambda name, value: None,
            loss_shows_learning=task_class(task).loss_shows_learning,
        )  # fmt: skip
        health.on_step(SimpleNamespace(is_global_zero=True, world_size=1), module)
        append_lines(folder.metrics, [{"step": health.step, "train/loss": loss}])
        verdicts.append(health.verdict)
    said = capsys.readouterr().out
    if task == "dino":
        assert (set(verdicts[13:]), said) == ({"healthy"}, "")
        return
    assert verdicts[12:99] == ["healthy"] * 87
    assert set(verdicts[100:150]) == {"not learning"}
    assert verdicts[-1] == "healthy"
    assert said.count("has not fallen by more than its noise since step 51") == 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.round(load_digits().images[:320] * (255 / 16)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("digits")
    pack(array_samples(images), folder / "shards")
    return folder / "shards"


TINY = {
    "encoder.tokens": "conv_stem", "encoder.patch": 2, "encoder.width": 32, "encoder.depth": 1, "encoder.heads": 2,
    "encoder.pooling": "class", "data.global_batch_size": 32, "data.view.local_crops": 2, "data.view.local_size": 6,
    "encoder.image_size": 12, "data.view.global_scale": [1.0, 2.25],
    "task.out_dim": 64, "task.head_width": 64, "task.bottleneck": 16, "task.momentum": 0.98, "task.koleo": 0,
    "optim.base_lr": 1.6e-2, "train.steps": 120, "train.log_every": 10,
}  # fmt: skip


def train(shards: Path, out: Path, **changes) -> RunFolder:
    settings = load_recipe("dino/digits", TINY | {"data.shards": str(shards), "out": str(out)} | changes)
    return pretrain(settings)


BROKEN = {
    "no centering": ({"task.center_momentum": 1.0}, "one prototype", "lower task.center_momentum"),
    "no sharpening": (
        {"task.teacher_temp": 0.1, "task.warmup_teacher_temp": 0.1},
        "even",
        "Set task.teacher_temp .0.1. well below",
    ),
    "hot teacher": ({"task.teacher_temp": 1.0}, "even", "Set task.teacher_temp .1. well below"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_settings_are_noticed_and_their_knob_is_named(
    fault: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes, symptom, suggestion = BROKEN[fault]
    folder = train(shards, tmp_path / "run", **{"task.batch_norm": False} | changes)
    health = json.loads(folder.health.read_text())
    assert health["verdict"] == "collapsed"
    assert [message["symptom"] for message in health["messages"]] == [symptom]
    said = [line for line in capsys.readouterr().out.splitlines() if "collapsed" in line]
    assert said == [health["messages"][0]["message"]]
    assert re.search(suggestion, said[0])


@pytest.mark.parametrize("changes", [{}, {"task.koleo": 0.01}, {"task.centering": "sinkhorn"}])
def test_a_healthy_run_is_left_in_peace(
    shards: Path, tmp_path: Path, changes: dict, capsys: pytest.CaptureFixture
) -> None:
    folder = train(shards, tmp_path / "run", **changes)
    health = json.loads(folder.health.read_text())
    assert (health["verdict"], health["messages"], health["step"]) == ("healthy", [], 120)
    assert "collapsed" not in capsys.readouterr().out
    last = folder.read_metrics()[-1]
    assert last["health/teacher_entropy"] == pytest.approx(health["measures"]["teacher_entropy"])
    names = ("teacher_uniform_kl", "feature_std", "rankme", "largest_prototype_share")
    assert {f"health/{name}" for name in names} <= last.keys()


@pytest.mark.parametrize("recipe", ["mae/digits", "igpt/digits"])
def test_a_run_that_learns_is_healthy_though_it_begins_above_a_constant_guess(
    recipe: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    learning = {"data.global_batch_size": 32, "train.steps": 60, "train.log_every": 10, "optim.warmup_epochs": 1}
    folder = run(shards, tmp_path / "run", recipe=recipe, **learning, **{"optim.base_lr": 1.6e-2})
    health = json.loads(folder.health.read_text())
    assert (health["verdict"], health["messages"]) == ("healthy", [])
    assert "collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["dino/digits", "mae/digits", "igpt/digits"])
def test_a_run_that_explodes_says_so_and_ends_in_order(
    recipe: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = TINY | {"optim.base_lr": 1e30, "train.steps": 8, "train.log_every": 1, "optim.warmup_epochs": 0}
    if recipe != "dino/digits":
        changes = {key: value for key, value in changes.items() if not key.startswith(("task.", "data.view."))}
        changes["encoder.tokens"] = "patch"
    if recipe == "igpt/digits":
        changes |= {
            "encoder.tokens": "pixel",
            "encoder.patch": 1,
            "encoder.pooling": "mean",
            "encoder.feature_layer": 1,
        }
    folder = pretrain(load_recipe(recipe, changes | {"data.shards": str(shards), "out": str(tmp_path / "run")}))
    health = json.loads(folder.health.read_text(), parse_constant=pytest.fail)
    assert health["verdict"] == "collapsed"
    assert [message["symptom"] for message in health["messages"]] == ["not finite"]
    if recipe != "igpt/digits":  # a norm keeps its outputs finite
        assert "no pictures: what the encoder gives is not finite" in capsys.readouterr().out


def test_a_run_without_anything_to_judge_by_is_not_checked(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that names no symptoms; a loss that is not finite says enough by itself."""
    assert Health(RunFolder(tmp_path), PLAN, every=1).verdict == "not checked"
    monkeypatch.setattr(task_class("mae"), "symptoms", Task.symptoms)
    health = json.loads(run(shards, tmp_path / "run", **{"train.steps": 4}).health.read_text())
    assert (health["verdict"], health["messages"], health["step"]) == ("not checked", [], 4)
    assert health["measures"].keys() >= {"loss", "rankme", "target_variance"}
    broken = run(shards, tmp_path / "broken", **{"train.steps": 4, "optim.base_lr": 1e30, "optim.warmup_epochs": 0})
    assert json.loads(broken.health.read_text())["verdict"] == "collapsed"


@pytest.mark.parametrize("recipe", ["mae/digits", "igpt/digits"])
def test_a_loss_no_better_than_a_constant_guess_is_a_symptom(recipe: str, shards: Path, tmp_path: Path) -> None:
    """Its reference stands beside it in each line; at a rate of zero nothing is learned."""
    stuck = {"optim.base_lr": 0.0, "optim.min_lr": 0.0, "data.global_batch_size": 32, "train.steps": 20}
    folder = run(shards, tmp_path / "run", recipe=recipe, **stuck)
    health = json.loads(folder.health.read_text())
    assert (health["verdict"], health["messages"][0]["symptom"]) == ("collapsed", "trivial")
    reference = "target_variance" if recipe == "mae/digits" else "unigram_entropy"
    assert all(line["train/loss"] > 0.98 * line[f"health/{reference}"] > 0 for line in folder.read_metrics())
    assert "optim.base_lr (0)" in health["messages"][0]["message"]
