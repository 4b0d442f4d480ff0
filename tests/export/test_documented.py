"""The examples of docs/export.md run as they stand there, and do what they are for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from export_fixtures import saved
from PIL import Image

from sslvit.cli import main

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
COMMANDS, PYTHON = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("sh", "python"))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A run, two classes of photographs, and what the first block of commands exports."""
    folder = tmp_path_factory.mktemp("documented")
    saved(folder / "runs" / "photos" / "encoder", image_size=32, patch=8, interpolate_antialias=False)
    for label, kind in enumerate(("bright", "dark")):
        (folder / "photos" / kind).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).normal(200 - 130 * label, 20, (8, 10, 3)).clip(0, 255)
            image = Image.fromarray(pixels.astype(np.uint8)).resize((50, 40), Image.Resampling.BICUBIC)
            image.save(folder / "photos" / kind / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(autouse=True)
def at_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    torch.manual_seed(0)


def ran(example: str, times: int = 1) -> dict:
    """What an example leaves behind; its last lines, the loop over batches, several times."""
    before, loop = example.split("\nfor ", 1) if times > 1 else (example, "")
    left: dict = {}
    exec(compile(before, "docs/export.md", "exec"), left)
    left["losses"] = []
    for _ in range(times if loop else 0):
        exec(compile("for " + loop, "docs/export.md", "exec"), left)
        left["losses"].append(float(left["loss"]))
    return left


def test_the_commands_export(here: Path, capsys: pytest.CaptureFixture) -> None:
    for line in COMMANDS[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
        assert "reopened in" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1], ids=["timm", "transformers"])
def test_fine_tuning_elsewhere_learns(number: int) -> None:
    losses = ran(PYTHON[number], times=6)["losses"]
    assert losses[-1] < 0.5 * losses[0]


def test_onnx_runtime_gives_what_the_encoder_gives(here: Path) -> None:
    left = ran(PYTHON[2])
    assert main(["embed", "runs/photos", "photos", "-o", "features.npz"]) == 0
    own = np.load("features.npz")
    order = {Path(str(key)).name + str(label): row for key, label, row in
             zip(own["keys"], own["labels"], own["features"], strict=True)}  # fmt: skip
    for file, row in zip(left["files"], left["features"], strict=True):
        expected = order[file.name + str(int(file.parent.name == "dark"))]
        assert np.abs(row - expected).max() < 0.05 * np.abs(expected).max()  # another library's resizing, in 8 bits
