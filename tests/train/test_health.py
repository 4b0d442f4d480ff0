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
from sklearn.datasets import load_digits

from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate.health import feature_std, rankme
from sslvit.settings import DINOSettings, EncoderSettings, OptimSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks.base import Task
from sslvit.train.callbacks.health import Health, Sign, find_sign, measure
from sslvit.train.folder import RunFolder
from sslvit.train.run import pretrain


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


def test_prototype_measures() -> None:
    task = Task(DINOSettings(), EncoderSettings(32), OptimSettings(), 9, steps_per_epoch=3, global_batch_size=4)
    shares = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0.1, 0.9]])
    task.watch(torch.randn(4, 8), shares)
    assert not task.watched  # nobody looks at this step
    task.is_watched = True
    task.watch(torch.randn(4, 8), shares)
    looked = measure({name: torch.cat(parts) for name, parts in task.watched.items()})
    entropy = (0 + math.log(2) + math.log(4) - 0.1 * math.log(0.1) - 0.9 * math.log(0.9)) / 4
    assert looked["teacher_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert looked["teacher_uniform_kl"] == pytest.approx(math.log(4) - entropy, abs=1e-6)
    assert looked["largest_prototype_share"] == 0.75


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
def test_each_sign_names_its_knob(seen: dict, task: dict, name: str | None, knob: str) -> None:
    settings = DINOSettings(**{"out_dim": 256, "teacher_temp": 0.04} | task)
    seen = HEALTHY | seen
    seen["teacher_uniform_kl"] = math.log(256) - seen["teacher_entropy"]
    sign = find_sign(seen, 64, settings, OptimSettings())
    assert (sign.name if sign else None) == name
    assert sign is None or knob in sign.remedy


def test_a_remedy_is_not_what_is_set_already() -> None:
    settings = DINOSettings(out_dim=256, teacher_temp=0.04, centering="sinkhorn", batch_norm=True)
    one = find_sign(HEALTHY | {"largest_prototype_share": 1.0}, 64, settings, OptimSettings(clip_grad=3.0))
    assert "sinkhorn" not in one.remedy
    assert "batch_norm" not in one.remedy
    assert "clip" not in find_sign(HEALTHY | {"loss": math.inf}, 64, settings, OptimSettings(clip_grad=3.0)).remedy
    few = HEALTHY | {"largest_prototype_share": 1.0, "feature_std": 0.0}
    assert find_sign(few, 2, settings, OptimSettings()) is None  # two images can be alike by chance


def judged(tmp_path: Path, looks: str, total: int = 1000, young: int = 0) -> list[str]:
    """The verdict after each look: e(ven), o(ne prototype), n(ot finite) or . for a healthy one."""
    folder = RunFolder(tmp_path)
    health = Health(folder, total, every=10)
    names = {"e": "even", "o": "one prototype", "n": "not finite"}
    verdicts = []
    for number, look in enumerate(looks, start=1):
        health.step = 10 * number
        sign = Sign(names[look], "seen", "Remedy.") if look in names else None
        health.judge(sign, {"loss": 1.0}, is_young=number <= young)
        verdicts.append(json.loads(folder.health.read_text())["verdict"])
        again = Health(folder, total, every=10)  # as a resumed run
        again.load_state_dict(json.loads(json.dumps(health.state_dict())))
        health = again
    return verdicts


def test_a_verdict_rests_on_several_looks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert judged(tmp_path, "..e..") == ["healthy", "healthy", "suspicious", "healthy", "healthy"]
    assert capsys.readouterr().out == ""
    assert judged(tmp_path, "eeee", young=3)[:3] == ["too early to say"] * 3
    assert judged(tmp_path, "eoeo")[-1] == "collapsed"  # it swings between two ways to fail
    capsys.readouterr()
    assert judged(tmp_path, "eee.ee...") == [
        "suspicious", "suspicious", *["collapsed"] * 6, "healthy",
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["step 30", "step 90"]
    assert said[1].endswith("this run has recovered from its collapse.")
    assert judged(tmp_path, "n") == ["collapsed"]
    assert judged(tmp_path, "ee", total=20) == ["suspicious", "collapsed"]  # a short run has no third look
    assert judged(tmp_path, "ee.ee", total=2500)[-1] == "collapsed"  # four of the five looks that it needs
    assert judged(tmp_path, "e.e.e", total=2500)[-1] == "suspicious"
    assert judged(tmp_path, "eeeee.e...", total=2500)[-2:] == ["collapsed", "healthy"]  # two, then one of five
    long = judged(tmp_path, "e" * 30, total=10_000)  # a fiftieth of it: 20 looks
    assert [long.index("collapsed"), long.count("collapsed")] == [19, 11]


def test_a_network_is_young_up_to_the_step_that_its_task_names(tmp_path: Path) -> None:
    """A loss that is not finite aside, what it shows until then is no sign."""
    settings = load_recipe("dino/digits", {})
    health = Health(RunFolder(tmp_path), 100, every=1)
    verdicts = []
    for health.step in range(1, 8):
        even = {"features": torch.randn(32, 8), "entropy": torch.full((32,), math.log(64)),
                "uniform_kl": torch.zeros(32), "choice": torch.arange(32)}  # fmt: skip
        module = SimpleNamespace(
            is_watched=True, is_skipped=False, watched={name: [value] for name, value in even.items()},
            records={"loss": [torch.tensor(4.1)]}, record=lambda name, value: None, young_until=3,
            settings=settings.task.fitted(10_000, 32, 1000), optim=settings.optim,
        )  # fmt: skip
        health.on_step(SimpleNamespace(is_global_zero=True, world_size=1), module)
        verdicts.append(health.verdict)
    assert verdicts == ["too early to say"] * 3 + ["suspicious"] * 2 + ["collapsed"] * 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.round(load_digits().images[:320] * (255 / 16)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("digits")
    pack(array_samples(images), folder / "shards")
    return folder / "shards"


TINY = {
    "encoder.tokens": "conv_stem", "encoder.patch": 2, "encoder.width": 32, "encoder.depth": 1, "encoder.heads": 2,
    "encoder.pooling": "class", "data.global_batch_size": 32, "data.view.local_crops": 2, "data.view.local_size": 6,
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
    changes, sign, remedy = BROKEN[fault]
    folder = train(shards, tmp_path / "run", **{"task.batch_norm": False} | changes)
    health = json.loads(folder.health.read_text())
    assert health["verdict"] == "collapsed"
    assert [message["sign"] for message in health["messages"]] == [sign]
    said = [line for line in capsys.readouterr().out.splitlines() if "collapsed" in line]
    assert said == [health["messages"][0]["message"]]
    assert re.search(remedy, said[0])


@pytest.mark.parametrize("changes", [{}, {"task.koleo": 0.01}, {"task.centering": "sinkhorn"}])
def test_a_healthy_run_is_left_in_peace(
    shards: Path, tmp_path: Path, changes: dict, capsys: pytest.CaptureFixture
) -> None:
    folder = train(shards, tmp_path / "run", **changes)
    health = json.loads(folder.health.read_text())
    assert (health["verdict"], health["messages"], health["step"]) == ("healthy", [], 120)
    assert "collapsed" not in capsys.readouterr().out
    last = folder.read_metrics()[-1]
    assert last["teacher_entropy"] == pytest.approx(health["measures"]["teacher_entropy"])
    assert {"teacher_uniform_kl", "feature_std", "rankme", "largest_prototype_share"} <= last.keys()


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
    assert [message["sign"] for message in health["messages"]] == ["not finite"]
    if recipe != "igpt/digits":  # a norm keeps its outputs finite
        assert "no pictures: what the encoder gives is not finite" in capsys.readouterr().out
