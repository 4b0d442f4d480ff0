"""Tasks, views, tokenizers and exporters from outside the package: only of modules that the user names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from shard_fixtures import two_classes

import sslvit
from sslvit import plugins
from sslvit.cli import main
from sslvit.data.index import load_index
from sslvit.plugins import find_plugin
from sslvit.settings.load import load_recipe
from sslvit.weight_files import read_torch_file

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SMALL = {
    "data.global_batch_size": 8, "data.workers": 0, "train.steps": 12, "train.log_every": 2, "encoder.depth": 1,
    "encoder.width": 16, "encoder.heads": 2, "encoder.image_size": 8, "encoder.patch": 4, "train.precision": "float32",
    "train.accelerator": "cpu", "optim.base_lr": 0.05, "optim.warmup_epochs": 0.0,
}  # fmt: skip
SIMMIM = {"task.name": "simmim:SimMIM", "encoder.mask_token": True}


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_named", set())
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def simmim() -> None:
    sslvit.use_plugin(str(EXAMPLES / "simmim.py"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return two_classes(tmp_path, train=40) / "train"


def test_simmim_trains_resumes_and_is_probed_without_a_line_in_the_package(
    simmim: None, shards: Path, tmp_path: Path
) -> None:
    whole = sslvit.pretrain("mae/digits", shards, tmp_path / "whole", **SMALL | SIMMIM)
    lines = whole.read_metrics()
    assert lines[-1]["train/loss"] < 0.9 * lines[0]["train/loss"]
    assert json.loads(whole.health.read_text())["verdict"] == "not checked"  # it names no symptoms
    sslvit.pretrain("mae/digits", shards, tmp_path / "cut", **SMALL | SIMMIM | {"train.steps": 6, "train.epochs": 1})
    resumed = sslvit.resume(tmp_path / "cut", **{"train.steps": 12})
    state = read_torch_file(resumed.checkpoint)["state_dict"]
    assert state["model.head.weight"].shape == (16, 16)
    encoder = sslvit.load_encoder(whole.path)
    assert encoder(torch.zeros(1, 1, 8, 8)).shape == (1, 5, 16)
    assert len(load_index(shards)) == 40


def test_a_loss_depends_on_hidden_patches_alone(simmim: None) -> None:
    SimMIMModel, SimMIMSettings = sys.modules["simmim"].SimMIMModel, sys.modules["simmim"].SimMIMSettings

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
def test_what_is_not_named_as_a_plugin_is_not_imported(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("simmim", None)
    with pytest.raises(ValueError, match=r'simmim:SimMIM is code outside sslvit.*add sslvit.use_plugin\("simmim"\)'):
        load_recipe("mae/digits", changes)
    assert "simmim" not in sys.modules


def test_from_python_the_remedy_is_a_call(simmim: None) -> None:
    with pytest.raises(ValueError, match=r'add sslvit\.use_plugin\("json.decoder"\)'):
        sslvit.pretrain("mae/digits", data="x", **{"task.name": "json.decoder:JSONDecoder"})


def test_a_module_that_is_allowed_allows_those_below_it_alone() -> None:
    sslvit.use_plugin("json, email")
    assert find_plugin("task.name", "json.decoder:JSONDecoder") is json.JSONDecoder
    for name in ("jsonschema:x", "csv:reader", ":x", "js:x"):
        with pytest.raises(ValueError, match="is code outside sslvit"):
            find_plugin("task.name", name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("simmim:Nothing", "cannot be imported"),
        ("simmim.below:Nothing", "cannot be imported"),
        ("simmim:SimMIMModel", "is no task"),
        ("simmim:patchify", "is no task"),
    ],
)
def test_what_is_no_task_is_refused_by_name(simmim: None, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"task.name: {name} {said}"):
        load_recipe("mae/digits", {"task.name": name})


def test_what_is_no_plugin_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "broken.py").write_text("raise SystemError('two\\nlines')")
    (tmp_path / "json.py").write_text("")
    for module, said in [
        ("nowhere_at_all", "nowhere_at_all: cannot be imported (ModuleNotFoundError: No module named"),
        (str(tmp_path / "none.py"), "none.py: cannot be imported (FileNotFoundError: no such file)."),
        (str(tmp_path / "broken.py"), "broken.py: cannot be imported (SystemError: two lines)."),
        (str(tmp_path / "json.py"), "json.py: there is another module called json. Rename the file."),
    ]:
        assert main(["settings", "seed", "--plugin", module]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_an_installed_package_registers_names(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "own_tasks-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sslvit.tasks]\nsimmim = simmim:SimMIM\nmae = json:JSONDecoder\nlost = simmim:Lost\n"
        "[sslvit.views]\ncorner = own_corner:Corner\n"
    )
    (tmp_path / "site" / "own_corner.py").write_text(VIEW)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = load_recipe("mae/digits", {"task.name": "simmim", "task.mask_ratio": 0.3})
    assert type(settings.task).__name__ == "SimMIMSettings"
    assert settings.task.mask_ratio == 0.3
    run = sslvit.pretrain("mae/digits", shards, tmp_path / "run", **SMALL | SIMMIM | {"task.name": "simmim"})
    assert run.read_config()["task"]["name"] == "simmim"
    changes = SMALL | {"data.view.kind": "corner", "data.view.side": 8}
    run = sslvit.pretrain("mae/digits", shards, tmp_path / "corners", **changes)
    assert run.read_config()["data"]["view"] == {"kind": "corner", "side": 8}
    assert type(load_recipe("mae/digits").task).__name__ == "MAESettings"  # ours keep their names
    with pytest.raises(ValueError, match="task.name: lost is simmim:Lost of an installed package and cannot be"):
        load_recipe("mae/digits", {"task.name": "lost"})


def test_settings_tells_those_of_a_plugins_task(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bare.py").write_text(
        "from dataclasses import dataclass\nfrom sslvit.settings import TaskSettings\n@dataclass\n"
        "class Bare(TaskSettings):\n    strength: float = 0.5\nclass Task:\n    settings_class = Bare\n"
    )
    assert main(["settings", "bare:Task", "--plugin", str(tmp_path / "bare.py")]) == 0
    assert "task.strength (0.5):" in capsys.readouterr().out
    assert main(["settings", "simmim:SimMIM", "--plugin", str(EXAMPLES / "simmim.py")]) == 0
    assert "task.mask_ratio (0.6): Fraction of patches that are hidden." in capsys.readouterr().out


STEM = """
import torch
from torch import nn
from sslvit.models.tokens import gather_tokens

class Stem(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.pool = nn.AvgPool2d(settings.patch)
        self.color = nn.Linear(settings.channels, settings.width)

    def forward(self, images, visible=None):
        return gather_tokens(self.color(self.pool(images).flatten(2).transpose(1, 2)), visible)

class Short(Stem):
    def forward(self, images, visible=None):
        return super().forward(images, visible)[:, 1:]

def stem(settings):
    return Stem(settings)
"""


def test_a_tokenizer_from_outside_is_trained_and_opened_where_it_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "stem.py").write_text(STEM)
    sslvit.use_plugin(str(tmp_path / "stem.py"))
    run = sslvit.pretrain("dino/digits", shards, tmp_path / "run", **SMALL | {
        "train.steps": 2, "encoder.tokens": "stem:Stem", "task.out_dim": 16, "data.view.local_size": 8,
    })  # fmt: skip
    encoder = sslvit.load_encoder(run)
    images = torch.rand(2, 1, 8, 8)
    expected = encoder.patch_embed.color(images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1)).flatten(2).mT)
    torch.testing.assert_close(encoder.patch_embed(images), expected)
    plugins._named.clear()
    sys.modules.pop("stem")
    words = ["embed", str(tmp_path / "run"), str(shards), "-o", str(tmp_path / "features.npz")]
    assert main(words) == 1
    assert "encoder.json: encoder.tokens: stem:Stem is code outside sslvit. If you trust" in (
        error := capsys.readouterr().err
    )
    assert error.rstrip().endswith("add --plugin stem.")
    assert "stem" not in sys.modules
    assert main([*words, "--plugin", str(tmp_path / "stem.py")]) == 0
    for name, said in [
        ("stem:stem", "is no tokenizer"), ("stem:Short", "makes 1 x 3 x 16 numbers of an image, not 1 x 4 x 16"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"encoder.tokens: {name} {said}"):
            sslvit.ViTEncoder(sslvit.EncoderSettings(image_size=8, patch=4, width=16, heads=2, tokens=name))
    with pytest.raises(ValueError, match="encoder.tokens: 'patches' is not one of patch, .* Did you mean patch?"):
        sslvit.EncoderSettings(tokens="patches")
    with pytest.raises(ValueError, match="encoder.tokens: 5 is not one of patch, "):
        sslvit.EncoderSettings(tokens=5)


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
    sslvit.use_plugin(str(tmp_path / "corner.py"))
    try:
        changes = {"data.view.kind": "corner:Corner", "data.view.side": 8}
        folder = sslvit.pretrain("mae/digits", shards, tmp_path / "run", **SMALL | changes | {"train.steps": 2})
        assert folder.read_config()["data"]["view"] == {"kind": "corner:Corner", "side": 8}
        settings = load_recipe("mae/digits", SMALL | changes | {"data.shards": str(shards)})
        batch = sslvit.ShardDataModule.from_settings(settings).examples(2)
        whole = load_recipe("mae/digits", SMALL | {"data.view.kind": "center", "data.shards": str(shards)})
        torch.testing.assert_close(batch.views[0], sslvit.ShardDataModule.from_settings(whole).examples(2).views[0])
        with pytest.raises(ValueError, match="data.view.kind: corner:nothing is no view"):
            load_recipe("mae/digits", {"data.view.kind": "corner:nothing"})
    finally:
        sys.modules.pop("corner", None)


def test_an_exporter_from_outside_is_reopened_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = sslvit.EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2)
    sslvit.save_encoder(sslvit.ViTEncoder(settings), tmp_path / "encoder")
    (tmp_path / "mine.py").write_text("import sslvit.exporters.safetensors as exporter\n")
    try:
        plugin = str(tmp_path / "mine.py")
        words = ["export", str(tmp_path / "encoder"), str(tmp_path / "out"), "--format", "mine:exporter"]
        assert main(words) == 1
        assert "--format: mine:exporter is code outside sslvit" in capsys.readouterr().err
        assert "mine" not in sys.modules
        assert main([*words, "--plugin", plugin]) == 0
        assert json.loads((tmp_path / "out" / "verdict.json").read_text())["passed"]
        words[-1], plugin = "json:loads", "json"
        assert main([*words, "--plugin", plugin]) == 1
        assert "not an exporter (no check, write, reopen, weights, usage" in capsys.readouterr().err
    finally:
        sys.modules.pop("mine", None)
