"""A fourth task from outside the package: found by import path, behind an explicit flag."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from shard_fixtures import two_classes

import sslvit
from sslvit.cli import main
from sslvit.data.index import load_index
from sslvit.settings.load import load_recipe
from sslvit.weight_files import read_torch_file

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SMALL = {
    "data.global_batch_size": 8, "data.workers": 0, "train.steps": 12, "train.log_every": 2, "encoder.depth": 1,
    "encoder.width": 16, "encoder.heads": 2, "encoder.image_size": 8, "encoder.patch": 4, "train.precision": "float32",
    "train.accelerator": "cpu", "optim.base_lr": 0.05, "optim.warmup_epochs": 0.0,
}  # fmt: skip
SIMMIM = {"task.name": "simmim:SimMIM", "encoder.mask_token": True, "allow_foreign_code": True}


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return two_classes(tmp_path, train=40) / "train"


def test_simmim_trains_resumes_and_is_probed_without_a_line_in_the_package(shards: Path, tmp_path: Path) -> None:
    whole = sslvit.pretrain("mae/digits", shards, tmp_path / "whole", **SMALL | SIMMIM)
    lines = whole.read_metrics()
    assert lines[-1]["train/loss"] < 0.9 * lines[0]["train/loss"]
    assert json.loads(whole.health.read_text())["verdict"] == "not checked"  # it names no symptoms
    sslvit.pretrain("mae/digits", shards, tmp_path / "cut", **SMALL | SIMMIM | {"train.steps": 6, "train.epochs": 1})
    resumed = sslvit.resume(tmp_path / "cut", allow_foreign_code=True, **{"train.steps": 12})
    state = read_torch_file(resumed.checkpoint)["state_dict"]
    assert state["model.head.weight"].shape == (16, 16)
    encoder = sslvit.load_encoder(whole.path)
    assert encoder(torch.zeros(1, 1, 8, 8)).shape == (1, 5, 16)
    assert len(load_index(shards)) == 40


def test_a_loss_depends_on_hidden_patches_alone() -> None:
    from simmim import SimMIMModel, SimMIMSettings

    torch.manual_seed(0)
    settings = sslvit.EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2, mask_token=True)
    model = SimMIMModel(SimMIMSettings(mask_ratio=0.5), settings)
    images, noise = torch.randn(1, 3, 8, 8), torch.tensor([[0.1, 0.9, 0.8, 0.2]])
    loss, tokens = model.loss(images, noise)
    hidden = [images[:, :, :4, :4], images[:, :, 4:, 4:]]  # the two of the lowest noise
    expected = [(model.head(tokens[:, n]) - part.permute(0, 2, 3, 1).flatten(1)).abs().mean()
                for n, part in zip((0, 3), hidden, strict=True)]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {"task.name": "simmim:SimMIM"},
        {"task": {"name": "simmim:SimMIM"}},
        {"task": "simmim:SimMIM"},
        {"data.view.kind": "simmim:SimMIM"},
        {"data": {"view": {"kind": "simmim:SimMIM"}}},
    ],
)
def test_without_the_flag_nothing_is_imported(changes: dict) -> None:
    sys.modules.pop("simmim", None)
    with pytest.raises(ValueError, match=r"simmim:SimMIM would run code.*--allow_foreign_code true"):
        load_recipe("mae/digits", changes)
    assert "simmim" not in sys.modules


def test_no_file_can_allow_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sys.modules.pop("simmim", None)
    (tmp_path / "own.yaml").write_text("allow_foreign_code: true\ntask:\n  name: simmim:SimMIM\n")
    assert main(["pretrain", "--config", str(tmp_path / "own.yaml"), "--data", "x", "--out", str(tmp_path / "r")]) == 1
    assert "allow_foreign_code is for you to give, not for a file" in capsys.readouterr().err
    assert "simmim" not in sys.modules


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:Task", "cannot be imported"),
        ("simmim:Nothing", "cannot be imported"),
        (":x", "cannot be imported"),
        ("json:JSONDecoder", "not a task"),
        ("simmim:patchify", "not a task"),
    ],
)
def test_what_is_no_task_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"task.name '?{name}'?: {said}"):
        load_recipe("mae/digits", {"task.name": name, "allow_foreign_code": True})


VIEW = """
from dataclasses import dataclass
import numpy as np
from sslvit.data.resample import Boxes

@dataclass
class Corner:
    kind: str = "corner:Corner"
    side: int = 4
    \"\"\"Side of the corner that is seen.\"\"\"

    def specs(self, size):
        def boxes(uniform, heights, widths, size):
            zeros = np.zeros(len(heights))
            return Boxes(zeros, zeros, zeros + self.side, zeros + self.side, zeros > 0)
        return [(size, boxes)]

def nothing():
    pass
"""


def test_a_view_from_outside_is_what_training_sees(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "corner.py").write_text(VIEW)
    sys.path.insert(0, str(tmp_path))
    try:
        changes = {"data.view.kind": "corner:Corner", "data.view.side": 8, "allow_foreign_code": True}
        folder = sslvit.pretrain("mae/digits", shards, tmp_path / "run", **SMALL | changes | {"train.steps": 2})
        assert folder.read_config()["data"]["view"] == {"kind": "corner:Corner", "side": 8}
        settings = load_recipe("mae/digits", SMALL | changes | {"data.shards": str(shards)})
        batch = sslvit.ShardDataModule.from_settings(settings).examples(2)
        whole = load_recipe("mae/digits", SMALL | {"data.view.kind": "center", "data.shards": str(shards)})
        torch.testing.assert_close(batch.views[0], sslvit.ShardDataModule.from_settings(whole).examples(2).views[0])
        with pytest.raises(ValueError, match="data.view.kind .*not a view"):
            load_recipe("mae/digits", {"data.view.kind": "corner:nothing", "allow_foreign_code": True})
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("corner", None)


def test_an_exporter_from_outside_is_reopened_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = sslvit.EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2)
    sslvit.save_encoder(sslvit.ViTEncoder(settings), tmp_path / "encoder")
    (tmp_path / "mine.py").write_text("import sslvit.exporters.safetensors as exporter\n")
    sys.path.insert(0, str(tmp_path))
    try:
        words = ["export", str(tmp_path / "encoder"), str(tmp_path / "out"), "--format", "mine:exporter"]
        assert main(words) == 1
        assert "mine:exporter: would run code" in capsys.readouterr().err
        assert "mine" not in sys.modules
        assert main([*words, "--allow-foreign-code"]) == 0
        assert json.loads((tmp_path / "out" / "verdict.json").read_text())["passed"]
        words[-1] = "json:loads"
        assert main([*words, "--allow-foreign-code"]) == 1
        assert "not an exporter (no check, write, reopen, weights, usage" in capsys.readouterr().err
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("mine", None)
