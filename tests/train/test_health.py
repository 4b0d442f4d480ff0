"""A collapse is noticed, explained and written down; a healthy run is left in peace."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sslvit.data.pack import pack
from sslvit.data.sources import array_samples
from sslvit.evaluate.health import feature_std, largest_prototype_share, mean_entropy, rankme
from sslvit.settings import DINOSettings, OptimSettings
from sslvit.settings.load import load_recipe
from sslvit.train.folder import RunFolder
from sslvit.train.health import find_sign, measure
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
    shares = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0.1, 0.9]])
    entropy = (0 + math.log(2) + math.log(4) - 0.1 * math.log(0.1) - 0.9 * math.log(0.9)) / 4
    assert mean_entropy(shares) == pytest.approx(entropy, abs=1e-6)
    assert largest_prototype_share(shares) == 0.75
    looked = measure({"features": torch.randn(4, 8), "targets": shares})
    assert looked["teacher_uniform_kl"] == pytest.approx(math.log(4) - entropy, abs=1e-6)


HEALTHY = {"loss": 3.4, "teacher_entropy": 2.7, "largest_prototype_share": 0.2, "feature_std": 0.5, "rankme": 20.0}


@pytest.mark.parametrize(
    ("seen", "task", "name", "knob"),
    [
        ({}, {}, None, ""),
        ({"teacher_entropy": math.log(256), "loss": 5.545}, {"teacher_temperature": 0.3}, "even", "teacher_temp"),
        ({"teacher_entropy": math.log(256)}, {"teacher_temperature": 0.08}, "even", "Lower task.teacher_temperature"),
        ({"teacher_entropy": math.log(256)}, {}, "even", "Lower optim.base_rate"),
        ({"largest_prototype_share": 0.97}, {"centre_momentum": 1.0}, "one prototype", "task.centre_momentum"),
        ({"largest_prototype_share": 0.97}, {}, "one prototype", "task.centring: sinkhorn"),
        ({"loss": math.log(256)}, {}, "stuck", "optim.base_rate"),
        ({"feature_std": 0.004}, {}, "features", "optim.base_rate"),
        ({"loss": float("nan")}, {}, "not finite", "optim.clip"),
    ],
)
def test_each_sign_names_its_knob(seen: dict, task: dict, name: str | None, knob: str) -> None:
    settings = DINOSettings(**{"out_dim": 256, "teacher_temperature": 0.04} | task)
    sign = find_sign(HEALTHY | seen, settings, OptimSettings())
    assert (sign.name if sign else None) == name
    assert sign is None or knob in sign.remedy


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.round(load_digits().images[:320] * (255 / 16)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("digits")
    pack(array_samples(images), folder / "shards")
    return folder / "shards"


TINY = {
    "encoder.tokens": "conv_stem", "encoder.patch": 2, "encoder.width": 32, "encoder.depth": 1, "encoder.heads": 2,
    "encoder.pooling": "class", "data.global_batch": 32, "data.view.local_crops": 2, "data.view.local_size": 6,
    "task.out_dim": 64, "task.head_width": 64, "task.bottleneck": 16, "task.momentum": 0.98, "task.koleo": 0,
    "optim.base_rate": 1.6e-2, "train.steps": 120, "train.log_every": 10,
}  # fmt: skip


def train(shards: Path, out: Path, **changes) -> RunFolder:
    settings = load_recipe("dino/digits", TINY | {"data.shards": str(shards), "out": str(out)} | changes)
    return pretrain(settings)


BROKEN = {
    "no centring": ({"task.centre_momentum": 1.0}, "one prototype", "lower task.centre_momentum"),
    "no sharpening": (
        {"task.teacher_temperature": 0.1, "task.warmup_teacher_temperature": 0.1},
        "even",
        "Set task.teacher_temperature .0.1. well below",
    ),
    "hot teacher": ({"task.teacher_temperature": 1.0}, "even", "Set task.teacher_temperature .1. well below"),
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


@pytest.mark.parametrize("changes", [{}, {"task.koleo": 0.01}, {"task.centring": "sinkhorn"}])
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
