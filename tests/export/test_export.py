"""An export is reopened and compared before it stands there, says where it comes from, and replaces nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from disk_fixtures import files_up_to
from export_fixtures import SMALL, saved, shaken
from run_fixtures import run, weights
from safetensors.torch import load_file, save_file

import sslvit
from sslvit.checkpoint import fingerprint, load_encoder, save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate.scores import MeasureTable
from sslvit.exporters import export_encoder
from sslvit.exporters import timm as timm_format
from sslvit.exporters.destination import IN_PROGRESS, move_foreign_files
from sslvit.exporters.exported import Exported
from sslvit.exporters.verify import check_inputs, compare
from sslvit.files import WriteError
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings


def test_safetensors_hold_every_encoder(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e", pos_embed="rotary_2d", norm="rms", registers=2)
    assert export_encoder(tmp_path / "e", tmp_path / "out", "safetensors")["largest_difference"] == 0
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder(tmp_path / "out").features(images), encoder.features(images))


def test_words_that_python_lets_through_are_checked(tmp_path: Path) -> None:
    """A size that is misspelled would be a fixed one, and a file by itself its letters."""
    saved(tmp_path / "e")
    with pytest.raises(ValueError, match='size="dynamc": not one of fixed, dynamic'):
        sslvit.export(tmp_path / "e", tmp_path / "out", "torch", size="dynamc")
    with pytest.raises(ValueError, match="nothing.json"):
        sslvit.export(tmp_path / "e", tmp_path / "out", "safetensors", scores=str(tmp_path / "nothing.json"))


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
    assert card["recipe"] == {"optim": {"base_lr": 1e-3}}  # and nobody's paths
    assert card["scores"]["probe.json"]["rows"]["encoder"]["linear"] == [77.7]
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("Trained by mae, 7 steps", "fingerprint f00d", "mean 0.1, 0.2, 0.3", "77.7", "bilinear"):
        assert part in text
    assert main([*words[:2], str(tmp_path / "other"), *words[3:], "--scores", str(tmp_path / "none.json")]) == 1
    assert "none.json: not readable as scores" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def probe_file(file: Path, fingerprints: dict[str, str]) -> Path:
    """As `sslvit probe -o` writes it, with more rows and columns than 400 characters of JSON."""
    rows = ("raw pixels", "untrained encoder", "the encoder")
    draws = {row: {f"a probe with a long name, {number}": [10.0 * place + number, 10.0 * place + number + 1]
                   for number in range(8)} for place, row in enumerate(rows)}  # fmt: skip
    means = {row: {column: sum(values) / 2 for column, values in of.items()} for row, of in draws.items()}
    probed = {row: {"features": "class"} | ({"fingerprint": fingerprints[row]} if row in fingerprints else {})
              for row in rows}  # fmt: skip
    about = {"probed": probed, "val": "photos/val", "val_images": 360, "fingerprints": {"val": "abc"}}
    file.write_text(json.dumps({"rows": means, "draws": draws, "intervals": {}, "about": about}))
    return file


def test_a_card_shows_the_whole_table_of_scores(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e")
    file = probe_file(tmp_path / "probe.json", {"the encoder": fingerprint(encoder), "untrained encoder": "0" * 64})
    export_encoder(tmp_path / "e", tmp_path / "out", "safetensors", scores=[file])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "probe.json: this encoder is the row the encoder. On photos/val, 360 images." in text
    for place, row in enumerate(("raw pixels", "untrained encoder", "the encoder")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
        assert [cell.split(" ")[1] for cell in line.split("|")[2:-1]] == [
            f"{10 * place + number + 0.5:.1f}" for number in range(8)
        ]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["fingerprint"] == fingerprint(encoder)


def test_a_card_shows_measures_with_the_decimals_of_the_command_that_wrote_them(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    measured = MeasureTable({"encoder": {"feature_std": 0.0277, "rankme": 79.6}}, "", 3, {"data": "d", "images": 360})
    (tmp_path / "health.json").write_text(json.dumps(measured.to_dict()))
    export_encoder(tmp_path / "e", tmp_path / "out", "safetensors", scores=[tmp_path / "health.json"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "health.json: the file does not name its encoder. On d, 360 images." in text
    assert "| encoder | 0.028 | 79.600 |" in text


def test_scores_of_another_encoder_are_refused_and_nameless_ones_said(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e")
    other = ViTEncoder(EncoderSettings(**SMALL))
    file = probe_file(tmp_path / "probe.json", {"the encoder": fingerprint(other)})
    with pytest.raises(ValueError, match=r"probe.json: scores of another encoder \(its rows the encoder are of other"):
        export_encoder(tmp_path / "e", tmp_path / "out", "safetensors", scores=[file])
    assert not (tmp_path / "out").exists()
    encoder.norm.bias.data[3] += 1e-3  # one number of one tensor
    file = probe_file(tmp_path / "probe.json", {"the encoder": fingerprint(encoder)})
    with pytest.raises(ValueError, match="scores of another encoder"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm", scores=[file])
    export_encoder(tmp_path / "e", tmp_path / "out", "timm", scores=[probe_file(tmp_path / "probe.json", {})])
    assert "probe.json: the file does not name its encoder." in (tmp_path / "out" / "README.md").read_text()


def test_names_in_a_card_are_text(tmp_path: Path) -> None:
    evil, out = "<img src=x>[y](http://z)", tmp_path / 'ou"t\n```'
    saved(tmp_path / "e", pooling="mean")
    file = tmp_path / "e" / "encoder.json"
    content = json.loads(file.read_text())
    content["provenance"] = {"task": evil, "weights": evil, "step": 3, "data": {"samples": evil, "fingerprint": evil}}
    file.write_text(json.dumps(content))
    weights = {"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    classes = json.dumps([evil, "# cat", "a|b\n---"])
    save_file(weights, tmp_path / "e" / "head.safetensors", {"classes": classes})
    (tmp_path / "<b>.json").write_text(json.dumps({"rows": {evil: {"`": [1.0]}}}))
    export_encoder(tmp_path / "e", out, "safetensors", "logits", scores=[tmp_path / "<b>.json"])
    text = (out / "README.md").read_text()
    assert "<" not in text
    assert "](" not in text.replace("\\](", "")
    assert text.count("&lt;img src=x&gt;") == 6
    code = text.split("```python\n")[1].split("\n```\n")[0]
    assert "ou" not in code.replace("outputs", "").replace("source", "")  # it runs in the folder, whatever its name
    compile(code, "card", "exec")
    assert json.loads((out / "card.json").read_text())["classes"][0] == evil


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


def test_logits_are_those_that_were_trained(tmp_path: Path) -> None:
    """The classifier reads the pooled last tokens (tasks/supervised.py), whatever layer the encoder is probed at."""
    encoder = saved(tmp_path / "e", feature_layer=1)
    weight, bias = torch.randn(2, 32), torch.randn(2)
    save_file({"head.weight": weight, "head.bias": bias}, tmp_path / "e" / "head.safetensors")
    export_encoder(tmp_path / "e", tmp_path / "out", "torch", "logits")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = encoder(images)[:, 0] @ weight.T + bias
        found = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_brings_its_own_classifier(tmp_path: Path) -> None:
    labels = np.arange(16) % 2
    pack(array_samples(np.zeros((16, 8, 8), np.uint8), labels), tmp_path / "shards", ["a", "b"])
    saved(tmp_path / "e", image_size=8, channels=1)
    words = ["finetune", str(tmp_path / "e"), "--train", str(tmp_path / "shards"), "--val", str(tmp_path / "shards")]
    changes = {"task.allow_same_data": "true", "train.steps": 4, "train.checkpoint_every": 2, "train.keep_every": 2,
               "data.global_batch_size": 8,
               "data.workers": 0, "train.precision": "float32", "optim.base_lr": 0.1}  # fmt: skip
    words += [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    earlier = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"
    export_encoder(earlier, tmp_path / "out", "safetensors", "logits")
    state = torch.load(earlier, weights_only=True)["state_dict"]
    assert torch.equal(load_file(tmp_path / "out" / "head.safetensors")["head.weight"], state["model.head.weight"])
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["task"], card["step"], card["classes"]) == ("supervised", 2, ["a", "b"])
    export_encoder(tmp_path / "run", tmp_path / "last", "timm", "logits")
    card = json.loads((tmp_path / "last" / "card.json").read_text())
    assert card["step"] == 4
    assert "top1" in card["scores"]["scores.json"]
    assert "init" not in card["recipe"]
    assert str(tmp_path / "e") not in (tmp_path / "last" / "README.md").read_text()


@pytest.mark.parametrize(
    ("state", "classes", "reason"),
    [
        ({"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}, '["a", "b"]', "names 2 classes for .* of 3"),
        ({"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}, '"abcd"', "names 4 classes"),
        ({"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}, "[", "names of its classes are damaged"),
        (
            {"head.weight": torch.zeros(3, 8), "head.bias": torch.zeros(3)},
            "[]",
            "no classifier of an encoder of width 32",
        ),
        ({"head.bias": torch.zeros(3)}, "[]", "no classifier of an encoder of width"),
        (None, "", "not a readable checkpoint"),
    ],
)
def test_a_damaged_classifier_is_refused(tmp_path: Path, state: dict | None, classes: str, reason: str) -> None:
    saved(tmp_path / "e")
    file = tmp_path / "e" / "head.safetensors"
    if state is None:
        file.write_bytes(b"junk")
    else:
        save_file(state, file, {"classes": classes})
    with pytest.raises(ValueError, match=reason):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm", "logits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


def test_a_verdict_needs_numbers_and_judges_small_logits_by_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = saved(tmp_path / "e")
    with torch.no_grad():
        encoder.norm.weight.mul_(math.inf)
    save_encoder(encoder, tmp_path / "inf")
    with pytest.raises(RuntimeError, match="differs by inf"):
        export_encoder(tmp_path / "inf", tmp_path / "out", "safetensors")
    verdict = json.loads((tmp_path / "out.part" / "verdict.json").read_text(), parse_constant=pytest.fail)
    assert verdict["largest_difference"] is None
    save_file({"head.weight": torch.randn(2, 32) * 1e-8, "head.bias": torch.zeros(2)}, tmp_path / "e/head.safetensors")
    assert export_encoder(tmp_path / "e", tmp_path / "right", "timm", "logits")["passed"]
    reopen = timm_format.reopen
    monkeypatch.setattr(timm_format, "reopen", lambda *args: lambda images: reopen(*args)(images).flip(1))
    with pytest.raises(RuntimeError, match="the reopened encoder differs"):
        export_encoder(tmp_path / "e", tmp_path / "flipped", "timm", "logits")


def test_the_worst_of_all_batches_counts_and_2e_5_is_too_much() -> None:
    encoder = shaken(ViTEncoder(EncoderSettings(**SMALL)))
    exported, inputs = Exported(encoder), check_inputs(encoder.settings, False)
    assert [batch.shape[0] for batch in inputs] == [2, 3, 1]

    def off_by(difference: float, batch: int | None = None) -> dict:
        numbers = iter(range(3))
        return compare(
            exported, lambda images: exported(images) + difference * (batch in (None, next(numbers))), inputs
        )

    for batch in range(3):
        assert off_by(2e-4, batch)["largest_difference"] == pytest.approx(2e-4, rel=0.01)
    scale = off_by(0)["largest_output"]
    assert not off_by(2e-5 * scale)["passed"]
    assert off_by(2e-6 * scale)["passed"]


def test_one_output_of_many_counts() -> None:
    encoder = shaken(ViTEncoder(EncoderSettings(**SMALL)))
    exported = Exported(encoder, "tokens")

    def off_in_one_place(images: torch.Tensor) -> torch.Tensor:
        tokens = exported(images)
        tokens[-1, -1, -1] += 3e-4
        return tokens

    verdict = compare(exported, off_in_one_place, check_inputs(encoder.settings, True))
    assert verdict["largest_difference"] == pytest.approx(3e-4, rel=0.01)
    assert not verdict["passed"]


def test_a_card_counts_all_parameters(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e")
    save_file({"head.weight": torch.randn(3, 32), "head.bias": torch.zeros(3)}, tmp_path / "e" / "head.safetensors")
    export_encoder(tmp_path / "e", tmp_path / "out", "safetensors", "logits")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["parameters"] == sum(value.numel() for value in encoder.state_dict().values()) + 3 * 32 + 3


def test_a_library_that_fails_leaves_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise KeyError("a part of timm")

    saved(tmp_path / "e")
    monkeypatch.setattr(timm_format, "reopen", fail)
    with pytest.raises(RuntimeError, match="not written, because 'a part of timm'; what was tried"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    assert json.loads((tmp_path / "out.part" / "verdict.json").read_text())["failure"] == "'a part of timm'"
    monkeypatch.undo()
    assert export_encoder(tmp_path / "e", tmp_path / "out", "timm")["passed"]  # what failed makes way
    assert not (tmp_path / "out.part").exists()
    assert not (tmp_path / "out" / IN_PROGRESS).exists()


def test_nothing_of_the_users_is_lost(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out.part: in the way, and not of an earlier export"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    assert (tmp_path / "out.part" / "thesis.txt").exists()
    export_encoder(tmp_path / "e", tmp_path / "other", "timm")
    (tmp_path / "other" / "notes.txt").write_text("mine")
    export_encoder(tmp_path / "e", tmp_path / "other", "safetensors", overwrite=True)
    names = {path.name for path in (tmp_path / "other").iterdir()}
    assert names == {"notes.txt", "encoder.json", "encoder.safetensors", "card.json", "README.md", "verdict.json"}


def test_places_that_cannot_be_used_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out, reason in (("file", "is a file"), ("link", "is a link"), ("file/out", "is no folder that can be written")):
        with pytest.raises(ValueError, match=reason):
            export_encoder(tmp_path / "no such encoder", tmp_path / out, "timm")


def test_the_way_through_our_own_format_keeps_the_origin(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "plain", "safetensors")
    export_encoder(tmp_path / "plain", tmp_path / "timm", "timm")
    assert json.loads((tmp_path / "timm" / "card.json").read_text())["data"]["fingerprint"] == "f00d"
    save_encoder(load_encoder(tmp_path / "e"), tmp_path / "unknown")
    export_encoder(tmp_path / "unknown", tmp_path / "other", "timm")
    assert "Not known." in (tmp_path / "other" / "README.md").read_text()


def test_scores_of_one_name_or_form_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.json").write_text(json.dumps({"top1": 3}))
    files = [tmp_path / name / "probe.json" for name in ("a", "b")]
    with pytest.raises(ValueError, match="two files of this name"):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm", scores=files)
    assert export_encoder(tmp_path / "e", tmp_path / "out", "timm", scores=files[:1])["passed"]


@pytest.mark.parametrize("description", [{"encoder": [1]}, {"encoder": None}, {"encoder": {"std": [0, 0, 0]}}, []])
def test_a_damaged_description_is_refused(tmp_path: Path, description) -> None:
    saved(tmp_path / "e")
    content = description | {"format": 1} if isinstance(description, dict) else description
    (tmp_path / "e" / "encoder.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="encoder.json: "):
        export_encoder(tmp_path / "e", tmp_path / "out", "timm")


def test_only_a_runs_own_settings_are_told(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e")
    (tmp_path / "proj" / "checkpoints").mkdir(parents=True)
    (tmp_path / "proj" / "config.yaml").write_text("secret: mine")
    torch.save(encoder.state_dict(), tmp_path / "proj" / "checkpoints" / "vit.pth")
    export_encoder(tmp_path / "proj/checkpoints/vit.pth", tmp_path / "out", "timm", heads=2)
    assert "mine" not in (tmp_path / "out" / "card.json").read_text()


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
    for network, prefix in (("student", "model.encoder."), ("teacher", "model.teacher."), (None, "model.teacher.")):
        out = tmp_path / f"out-{network}"
        export_encoder(tmp_path / "run", out, "timm", weights=network)
        encoder = load_encoder(out)
        expected = ViTEncoder(encoder.settings).eval()
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        expected.load_state_dict({key: own[key] for key in expected.state_dict()})
        with torch.no_grad():
            found[network] = encoder(pixels)
            torch.testing.assert_close(found[network], expected(pixels))
        assert json.loads((out / "card.json").read_text())["weights"] == (network or "teacher")
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
    assert "Trained by mae, 7 steps" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["timm", "transformers", "torch", "safetensors"])
def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    saved(tmp_path / "e")
    with files_up_to(5_000), pytest.raises(WriteError, match="out.part.*: could not be written .*File too large"):
        export_encoder(tmp_path / "e", tmp_path / "out", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    assert export_encoder(tmp_path / "e", tmp_path / "out", kind)["passed"]


def test_an_import_that_the_disk_does_not_take_can_be_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(saved(tmp_path / "e").state_dict(), tmp_path / "vit.pth")
    words = ["import", str(tmp_path / "vit.pth"), str(tmp_path / "out"), "--heads", "2"]
    with files_up_to(5_000):
        assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"sslvit: error: {tmp_path}/out.part/encoder.safetensors: could not be written")
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "vit.pth"]
    assert main(words) == 0
    assert main(words) == 1
    assert "out: already exists. Choose another folder.\n" in capsys.readouterr().err


def test_an_encoder_has_the_mode_of_its_neighbors(tmp_path: Path) -> None:
    saved(tmp_path / "e")
    (tmp_path / "plain").write_text("")
    modes = {file.stat().st_mode for file in (*(tmp_path / "e").iterdir(), tmp_path / "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("moment", ["begun", "marked", "verdict", "empty"])
def test_what_a_killed_export_or_import_left_goes(tmp_path: Path, moment: str) -> None:
    saved(tmp_path / "e")
    part = tmp_path / "out.part"
    part.mkdir()
    leftovers = {"begun": [IN_PROGRESS], "marked": [IN_PROGRESS, "verdict.json"], "verdict": ["verdict.json"]}
    left = leftovers.get(moment, [])
    for name in left:
        (part / name).write_text("{}")
    torch.save(load_encoder(tmp_path / "e").state_dict(), tmp_path / "vit.pth")
    assert main(["import", str(tmp_path / "vit.pth"), str(tmp_path / "out"), "--heads", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.json", "encoder.safetensors"]
    assert not part.exists()


@pytest.mark.parametrize("killed", ["before the new one is in place", "before others' files moved", "at the end"])
def test_an_export_that_is_killed_while_it_replaces_another_loses_nothing(tmp_path: Path, killed: str) -> None:
    saved(tmp_path / "e")
    export_encoder(tmp_path / "e", tmp_path / "out", "timm")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    if killed != "before the new one is in place":
        export_encoder(tmp_path / "e", tmp_path / "new", "safetensors")
        (tmp_path / "new").rename(tmp_path / "out")
    if killed == "at the end":
        move_foreign_files(tmp_path / "out.replaced", tmp_path / "out")
    export_encoder(tmp_path / "e", tmp_path / "out", "torch", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"notes.txt", "model.pt2", "card.json", "README.md", "verdict.json"}


def test_a_killed_save_leaves_no_part_behind(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    left = tmp_path / "e" / f"encoder.safetensors.{2**22 + 1}.part"  # of a process that is no more
    left.write_text("half")
    mine = tmp_path / "e" / f"encoder.safetensors.{os.getppid()}.part"  # of one that runs
    mine.write_text("half")
    saved(tmp_path / "e")
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "encoder.json", "encoder.safetensors", mine.name,
    ]  # fmt: skip


def test_the_hub_reads_the_top_of_a_card(tmp_path: Path) -> None:
    encoder = saved(tmp_path / "e")
    file = probe_file(tmp_path / "probe.json", {"the encoder": fingerprint(encoder), "untrained encoder": "0" * 64})
    for name, scores in (("plain", []), ("scored", [file])):
        export_encoder(tmp_path / "e", tmp_path / name, "timm", scores=scores)
    plain, scored = (
        yaml.safe_load((tmp_path / name / "README.md").read_text().split("---\n")[1]) for name in ("plain", "scored")
    )
    assert plain == {
        "license": "unknown", "library_name": "timm", "pipeline_tag": "image-feature-extraction",
        "tags": ["sslvit", "vision-transformer", "self-supervised-learning", "mae"],
    }  # fmt: skip
    for task, tags in (("supervised", ["supervised"]), (None, [])):
        save_encoder(encoder, tmp_path / f"of {task}", {"task": task} if task else {"imported_from": "vit.pth"})
        export_encoder(tmp_path / f"of {task}", tmp_path / f"out {task}", "safetensors")
        header = yaml.safe_load((tmp_path / f"out {task}" / "README.md").read_text().split("---\n")[1])
        assert header["tags"] == ["sslvit", "vision-transformer", *tags]
    for init, base in (("hf:facebook/dino-vits16@main", "facebook/dino-vits16"), ("/home/me/run", None)):
        save_encoder(encoder, tmp_path / f"from {base is None}", {"task": "mae", "settings": {"init": init}})
        export_encoder(tmp_path / f"from {base is None}", tmp_path / f"out {base is None}", "safetensors")
        text = (tmp_path / f"out {base is None}" / "README.md").read_text()
        assert yaml.safe_load(text.split("---\n")[1]).get("base_model") == base
        assert "/home/me" not in text
    ((index,),) = (scored["model-index"],)
    (result,) = index["results"]
    assert index["name"] == "scored"
    assert result["dataset"]["name"] == "photos/val"
    content = json.loads(file.read_text())
    content["about"]["val"] = "/home/me/photos/val"
    file.write_text(json.dumps(content))
    export_encoder(tmp_path / "e", tmp_path / "absolute", "timm", scores=[file])
    text = (tmp_path / "absolute" / "README.md").read_text()
    assert "/home/me" not in text
    assert "On photos/val, " in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["model-index"][0]["results"][0]["dataset"]["name"] == "photos/val"
    assert result["metrics"][3] == {"type": "accuracy", "name": "a probe with a long name, 3", "value": 23.5}
