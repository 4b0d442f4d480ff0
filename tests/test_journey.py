"""One walk from images to an exported encoder, with the commands of the README, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sslvit.checkpoint import load_encoder
from sslvit.cli import main
from sslvit.data.index import load_index
from sslvit.reports import demo as module
from sslvit.reports.demo import demo, pack_digits
from sslvit.settings.demo import RECIPES, split_changes

SHORT = {
    "train.steps": 4, "train.log_every": 2, "encoder.width": 32, "encoder.depth": 1, "encoder.feature_layer": 1,
    "task.decoder_width": 16,
}  # fmt: skip


def stripes(folder: Path) -> Path:
    """Two classes of images: stripes that run down, and stripes that run across."""
    source = np.random.default_rng(0)
    for label in ("across", "down"):
        (folder / label).mkdir(parents=True)
        for i in range(60):
            wave = 127 + 120 * np.sin(np.arange(16) * source.uniform(0.8, 1.2) + source.uniform(0, 6))
            image = np.tile(wave, (16, 1)) + source.normal(0, 10, (16, 16))
            image = image if label == "down" else image.T
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / label / f"{i:02d}.png")
    return folder


def test_images_become_an_encoder_that_timm_opens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, shards, out = stripes(tmp_path / "images"), tmp_path / "shards", tmp_path / "run"
    assert main(["shards", "pack", str(images), str(shards), "--holdout", "0.25"]) == 0
    settings = {
        "encoder.image_size": 16, "encoder.patch": 4, "encoder.width": 32, "encoder.depth": 2,
        "data.view.kind": "crop", "data.global_batch_size": 30, "optim.base_lr": "2e-2",
        "train.epochs": 20, "train.log_every": 1,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    train = ["pretrain", "--config", "mae/digits", "--data", str(shards / "train"), "--out", str(out)]
    assert main([*train, *words]) == 0
    losses = [json.loads(line)["train/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    scores = tmp_path / "scores.json"
    probe = [
        "probe",
        str(out),
        "--train",
        str(shards / "train"),
        "--val",
        str(shards / "val"),
        "--labels-per-class",
        "5",
    ]
    assert main([*probe, "-o", str(scores)]) == 0
    table = json.loads(scores.read_text())
    assert table["rows"]["encoder"]["linear, all labels"] > 80
    assert table["about"]["val_images"] == 30
    assert main(["export", str(out), str(tmp_path / "timm"), "--format", "timm"]) == 0
    assert "reopened in timm and compared" in capsys.readouterr().out
    pictures = torch.randn(2, 1, 16, 16)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), load_encoder(out).features(pictures), atol=1e-5, rtol=1e-5)


def test_the_demo_writes_what_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cpu_cores", lambda: 1)  # in this process
    out = tmp_path / "demo"
    table = demo(out=str(out), changes=SHORT)
    assert list(table["rows"]) == ["raw pixels", "MAE untrained", "MAE", "DINO untrained", "DINO",
                                  "iGPT untrained", "iGPT"]  # fmt: skip
    assert list(table["rows"]["MAE"]) == ["linear, all labels", "linear, 10 per class", "whitened kNN, k = 20"]
    named = [Path(line.split()[0]) for line in capsys.readouterr().out.split("Open these:")[1].strip().splitlines()]
    assert len(named) == 11
    assert all(path.exists() for path in named)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 13
    assert 'src="http' not in page
    assert "no digit is in both parts" in page
    with pytest.raises(ValueError, match="Pass --overwrite"):
        demo(out=str(out), changes=SHORT)


def test_the_demo_gives_each_task_the_changes_that_it_knows() -> None:
    changes = {"train.steps": 3, "task.mask_ratio": 0.5, "task.out_dim": 9, "data.view.side": [0.5, 1.0], "oops": 1}
    split = split_changes(RECIPES["digits"], changes)
    assert split == {
        "mae": {"train.steps": 3, "task.mask_ratio": 0.5, "data.view.side": [0.5, 1.0], "oops": 1},
        "dino": {"train.steps": 3, "task.out_dim": 9, "oops": 1},  # for the recipe to refuse
        "igpt": {"train.steps": 3, "task.mask_ratio": 0.5, "data.view.side": [0.5, 1.0], "oops": 1},
    }


def test_no_digit_is_in_both_splits_and_drawings_are_fixed(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        pack_digits(folder)
    digits = {}
    for name, count in (("pretrain", 1437), ("train", 1437), ("test", 360)):
        index, again = (load_index(folder / name) for folder in (one, two))
        assert len(index) == count
        assert index.fingerprint() == again.fingerprint()
        digits[name] = {index.key(sample) for sample in range(count)}
    assert digits["pretrain"] == digits["train"]
    assert not digits["train"] & digits["test"]
    assert len(digits["train"] | digits["test"]) == len(load_digits().images)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_cifar_demo_takes_a_local_archive_of_class_folders(tmp_path: Path, wrapped: bool) -> None:
    import tarfile

    from sslvit.reports.demo import pack_cifar10

    stripes(tmp_path / "train")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for folder in sorted((tmp_path / "train").iterdir()):
            tar.add(folder, f"train/{folder.name}" if wrapped else folder.name)
    index = pack_cifar10(tmp_path / "shards", str(tmp_path / "a.tar.gz"), tmp_path / "download")
    assert len(index) == 108
    assert json.loads((tmp_path / "shards" / "test" / "_info.json").read_text())["splits"]["test"]["num_samples"] == 12
    (tmp_path / "no.tar.gz").write_text("text")
    with pytest.raises(ValueError, match="not a readable tar archive"):
        pack_cifar10(tmp_path / "x", str(tmp_path / "no.tar.gz"), tmp_path / "y")
