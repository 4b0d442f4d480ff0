"""An export is reopened and compared before it stands there, says where it comes from, and replaces nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import saved
from run_fixtures import run, weights
from safetensors.torch import save_file

from sslvit.checkpoint import load_encoder
from sslvit.cli import main
from sslvit.data.pack import pack
from sslvit.data.sources import array_samples
from sslvit.export import export_encoder
from sslvit.export import timm as timm_format
from sslvit.models import ViTEncoder


def test_safetensors_hold_every_encoder(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e", positions="rotary_2d", norm="rms", registers=2)
    assert export_encoder(tmp_path / "e", tmp_path / "out", "safetensors")["largest_difference"] == 0
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder(tmp_path / "out").features(images), encoder.features(images))


def test_a_wrong_export_fails_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "e")
    reopen = timm_format.reopen
    monkeypatch.setattr(timm_format, "reopen", lambda *args: lambda images: reopen(*args)(images) + 1e-3)
    with pytest.raises(RuntimeError, match="not written, because the reopened encoder differs by 1.0e-03"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    assert json.loads((tmp_path / "out.part" / "verdict.json").read_text())["passed"] is False
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(timm_format, "reopen", lambda *args: lambda images: reopen(*args)(images) * float("nan"))
    with pytest.raises(RuntimeError, match="differs by inf"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")


def test_wrong_preprocessing_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "e")
    prepare = timm_format.preprocessing
    monkeypatch.setattr(timm_format, "preprocessing", lambda *args: lambda image: prepare(*args)(image) * 1.01)
    with pytest.raises(RuntimeError, match="not written, because its preprocessing differs"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")


def test_exports_are_not_overwritten_silently(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "out", "safetensors")
    with pytest.raises(ValueError, match="already exists"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    export_encoder(tmp_path / "e", tmp_path / "out", "timm", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="leaves it alone"):
        export_encoder(tmp_path / "e", tmp_path / "mine", "timm", overwrite=True)


def test_a_card_says_where_the_weights_come_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "e", interpolation="bilinear", mean=[0.1, 0.2, 0.3])
    (tmp_path / "probe.json").write_text(json.dumps({"rows": {"encoder": {"linear": [77.7]}}}))
    words = ["export", str(tmp_path / "e"), str(tmp_path / "out"), "--format", "timm"]
    assert main([*words, "--scores", str(tmp_path / "probe.json")]) == 0
    said = capsys.readouterr().out
    assert "reopened in timm and compared" in said
    assert "images of any size" in said
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert card["preprocessing"]["interpolation"] == "bilinear"
    assert (card["task"], card["step"], card["data"]["fingerprint"]) == ("mae", 7, "f00d")
    assert card["recipe"] == {"optim": {"base_rate": 1e-3}}  # and nobody's paths
    assert card["scores"]["probe.json"]["rows"]["encoder"]["linear"] == [77.7]
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("Trained by mae, 7 steps", "fingerprint f00d", "mean 0.1, 0.2, 0.3", "77.7", "bilinear"):
        assert part in text
    assert main([*words[:2], str(tmp_path / "other"), *words[3:], "--scores", str(tmp_path / "none.json")]) == 1
    assert "none.json: not readable as scores" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_classifier_goes_along(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "run" / "encoder", pooling="mean", fc_norm=True, final_norm=False)
    with pytest.raises(ValueError, match="has no classifier"):
        export_encoder(tmp_path / "run", tmp_path / "out", "timm", "logits")
    weight, bias = torch.randn(3, 32), torch.randn(3)
    file = tmp_path / "run" / "encoder" / "head.safetensors"
    save_file({"head.weight": weight, "head.bias": bias}, file, {"classes": '["cat", "dog", "owl"]'})
    assert export_encoder(tmp_path / "run", tmp_path / "out", "timm", "logits")["passed"]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = encoder.features(images) @ weight.T + bias
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-5)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["classes"] == ["cat", "dog", "owl"]
    assert export_encoder(tmp_path / "run", tmp_path / "own", "safetensors", "logits")["largest_difference"] == 0


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    with pytest.raises(ValueError, match="--format tflite: not one of timm, transformers, onnx, torch, safetensors"):
        export_encoder(tmp_path / "e", tmp_path / "out", "tflite")
    with pytest.raises(ValueError, match="--outputs maps: not one of tokens, features, logits"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm", "maps")
    with pytest.raises(ValueError, match="holds one network, no student beside a teacher"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm", weights="student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


def test_the_student_of_a_run_of_dino(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    pack(array_samples(images), tmp_path / "shards")
    folder = run(tmp_path / "shards", tmp_path / "run", recipe="dino/digits")
    state = weights(folder)
    pixels = torch.randn(2, 1, 8, 8)
    found = {}
    for network, prefix in (("student", "encoder."), ("teacher", "teacher."), (None, "teacher.")):
        out = tmp_path / f"out-{network}"
        export_encoder(tmp_path / "run", out, "timm", weights=network)
        encoder = load_encoder(out)
        expected = ViTEncoder(encoder.settings).eval()
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        expected.load_state_dict({key: own[key] for key in expected.state_dict()})
        with torch.no_grad():
            found[network] = encoder(pixels)
            torch.testing.assert_close(found[network], expected(pixels))
        assert json.loads((out / "card.json").read_text())["weights"] == network
    assert not torch.equal(found["student"], found["teacher"])
    assert torch.equal(found["teacher"], found[None])
    assert "the student's weights" in (tmp_path / "out-student" / "README.md").read_text()


def test_a_run_that_has_not_ended_has_a_card_too(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    pack(array_samples(images), tmp_path / "shards")
    folder = run(tmp_path / "shards", tmp_path / "run")
    shutil.rmtree(folder.encoder)
    export_encoder(tmp_path / "run", tmp_path / "out", "safetensors")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["recipe"]["task"]["name"] == "mae"
    assert "a run that had not ended" in (tmp_path / "out" / "README.md").read_text()
