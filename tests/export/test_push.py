"""Exports pushed to the Hugging Face hub, and opened from there by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

import sslvit
from sslvit.cli import main

if TYPE_CHECKING:
    from hub_fixtures import Hub

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def encoder(tmp_path: Path) -> sslvit.ViTEncoder:
    torch.manual_seed(0)
    made = sslvit.ViTEncoder(sslvit.EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2)).eval()
    sslvit.save_encoder(made, tmp_path / "encoder")
    return made


def export(tmp_path: Path, *more: str, format: str = "safetensors") -> int:
    return main(["export", str(tmp_path / "encoder"), str(tmp_path / "out"), "--format", format, *more])


def test_what_was_pushed_opens_by_name_and_by_commit(
    encoder: sslvit.ViTEncoder, tmp_path: Path, fake_hub: Hub, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("timm")
    assert export(tmp_path, "--push", "own/vit", "--license", "apache-2.0", format="timm") == 0
    files, images = fake_hub.files("own/vit"), torch.randn(2, 3, 16, 16)
    assert {"config.json", "model.safetensors", "card.json", "README.md", "verdict.json"} < files.keys()
    assert json.loads(files["verdict.json"])["passed"] is True
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["license"] == "apache-2.0"
    assert json.loads(files["card.json"])["license"] == "apache-2.0"
    assert fake_hub.messages == [f"sslvit {sslvit.__version__}: features for timm"]
    assert fake_hub.visibility["own/vit"] is None
    commit = list(fake_hub.models["own/vit"])[-1]
    assert f"pushed: {fake_hub.address}/own/vit/commit/{commit}" in capsys.readouterr().out
    for name in ("hf:own/vit", f"hf:own/vit@{commit}"):
        torch.testing.assert_close(sslvit.load_encoder(name).features(images), encoder.features(images))


def test_python_pushes_too_and_a_new_model_may_be_private(
    encoder: sslvit.ViTEncoder, tmp_path: Path, fake_hub: Hub
) -> None:
    made = sslvit.export(tmp_path / "encoder", tmp_path / "out", "safetensors", push="own/vit", private=True)
    assert fake_hub.visibility["own/vit"] == "private"
    assert made.pushed is not None
    assert made.to_dict()["pushed"] == made.pushed
    assert yaml.safe_load(fake_hub.files("own/vit")["README.md"].decode().split("---")[1])["license"] == "unknown"
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(sslvit.load_encoder("hf:own/vit").features(images), encoder.features(images))


def test_a_model_with_files_is_left_alone_until_told(
    encoder: sslvit.ViTEncoder, tmp_path: Path, fake_hub: Hub, capsys: pytest.CaptureFixture
) -> None:
    fake_hub.models["own/vit"] = {"1" * 40: {"README.md": b"by hand", "figure.png": b"theirs"}}
    assert export(tmp_path, "--push", "own/vit") == 1
    said = capsys.readouterr().err
    assert "--push own/vit: has 2 files (README.md, figure.png). Choose another name, or pass --overwrite" in said
    assert not (tmp_path / "out").exists()
    assert export(tmp_path, "--push", "own/vit", "--overwrite") == 0
    assert fake_hub.files("own/vit")["figure.png"] == b"theirs"
    assert b"sslvit" in fake_hub.files("own/vit")["README.md"]


@pytest.mark.usefixtures("encoder")
def test_a_push_that_fails_keeps_the_export_and_says_how_to_go_on(
    tmp_path: Path, fake_hub: Hub, capsys: pytest.CaptureFixture
) -> None:
    fake_hub.refuses = (403, "You have exceeded your storage")
    assert export(tmp_path, "--push", "own/vit") == 1
    said = capsys.readouterr().err
    assert "exceeded your storage" in said
    assert f"complete in {tmp_path / 'out'}; once that is put right: hf upload own/vit {tmp_path / 'out'}" in said
    assert said.count("\n") == 1
    assert sslvit.load_encoder(tmp_path / "out").settings.width == 16


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--push", "vit"], "--push vit: expected ORG/NAME."),
        (["--push", "own/vit/more"], "--push own/vit/more: expected ORG/NAME."),
        (["--private"], "--private: is of a model on the hub. Name it with --push."),
        (["--license", "Apache 2"], "--license Apache 2: expected the hub's word for it, such as apache-2.0 or mit."),
    ],
)
def test_what_cannot_be_pushed_is_said_before_any_work(
    tmp_path: Path, fake_hub: Hub, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    assert export(tmp_path, *options) == 1
    assert said in capsys.readouterr().err
    assert not fake_hub.models
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("encoder")
def test_without_a_token_or_a_network_nothing_is_exported(
    tmp_path: Path, fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_hub.http.shutdown()
    fake_hub.http.server_close()
    assert export(tmp_path, "--push", "own/vit") == 1
    said = capsys.readouterr().err
    assert "--push own/vit: " in said
    assert "the network, or leave --push out." in said
    assert said.count("\n") == 1
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert export(tmp_path, "--push", "own/vit") == 1
    assert "--push own/vit: not logged in. Run hf auth login, or set HF_TOKEN." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
