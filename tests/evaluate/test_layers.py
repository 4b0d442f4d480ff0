"""An encoder probed block by block."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sslvit.checkpoint import fingerprint, save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate import layers
from sslvit.evaluate.layers import HELD_OUT, LINEAR, layer_numbers, plot_layers, probe_layers
from sslvit.evaluate.probe import probe
from sslvit.evaluate.sources import FrozenEncoder
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, ProbeSettings


def make(**changes) -> ViTEncoder:
    torch.manual_seed(0)
    small = {"image_size": 8, "patch": 4, "width": 16, "depth": 3, "heads": 2, "pooling": "mean"}
    encoder = ViTEncoder(EncoderSettings(**small | changes))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


@pytest.fixture
def shards(tmp_path: Path) -> ProbeSettings:
    source = np.random.default_rng(0)
    for name, count in (("train", 60), ("val", 20)):
        labels = source.integers(0, 3, count)
        images = source.integers(0, 100, (count, 8, 8, 3)) + (labels * 20)[:, None, None, None]
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["a", "b", "c"])
    return ProbeSettings(str(tmp_path / "train"), str(tmp_path / "val"), neighbors=[3], cache=None)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["final", "next"])
def test_one_pass_gives_what_a_pass_for_each_layer_gives(norm: str) -> None:
    encoder, images = make(feature_norm=norm), torch.randn(2, 3, 8, 8)
    together = FrozenEncoder(encoder).features_at(images, [(number, "mean") for number in (3, 1, 2)])
    for number, features in zip([3, 1, 2], together, strict=True):
        assert torch.equal(features, encoder.features(images, number))
    with pytest.raises(ValueError, match=r"layers \[0\] do not exist: this encoder has blocks 1 to 3"):
        encoder.features(images, 0)


def test_each_layer_scores_as_it_does_alone(shards: ProbeSettings, tmp_path: Path) -> None:
    encoder = make()
    table = probe_layers(encoder, shards, [1, 2, 3])
    plot_layers(table, [1, 2, 3], tmp_path / "layers.png")
    assert list(table.rows) == [*(f"layer {i}" for i in (1, 2, 3)), *(f"untrained, layer {i}" for i in (1, 2, 3)),
                                "raw pixels"]  # fmt: skip
    assert (tmp_path / "layers.png").exists()
    for number in (1, 3):
        alone = probe(
            {"e": encoder}, ProbeSettings(shards.train, shards.val, layer=number, neighbors=[3], cache=None)
        ).rows
        for row, name in ((f"layer {number}", "e"), (f"untrained, layer {number}", "untrained encoder")):
            assert {key: value for key, value in table.rows[row].items() if key != HELD_OUT} == alone[name]
        assert table.rows["raw pixels"][LINEAR] == alone["raw pixels"][LINEAR]


def test_the_best_layer_is_chosen_without_the_reported_images(
    shards: ProbeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([(60.0, 90.0), (70.0, 50.0), (70.0, 80.0)])  # held out, reported; the shallower of equals is taken

    def give(*_) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], dict]:
        held_out, reported = next(scores)
        return {LINEAR: [reported]}, {"linear": {layers.HELD_OUT_ACCURACY: held_out}}, {}

    monkeypatch.setattr(layers, "score", give)
    settings = ProbeSettings(shards.train, shards.val, baselines=False, cache=None)
    table = probe_layers(make(), settings, [1, 2, 3])
    assert (table.best, table.last) == (2, 3)
    assert "best layer, by held-out training images: 2 (linear 50.0; the last probed, 3: 80.0)" in table.text()


def test_a_table_of_layers_states_its_precision_its_data_and_its_errors(shards: ProbeSettings) -> None:
    settings = replace(
        shards, val=shards.train, precision="bf16", labels_per_class=2, draws=2, baselines=False, allow_same_data=True
    )
    text = probe_layers(make(), settings, [1, 2]).text()
    for words in (
        "; features computed in bf16\n",
        f"(heads fitted on 60 of {settings.train})",
        "± is half the 95 % interval of a mean over 2 draws of labels",
        "sampling error of an accuracy on 60 images: up to ± 12.7 (95 %)",
        "these scores say nothing of others",
    ):
        assert words in text


def test_what_each_block_was_probed_with_is_stated(shards: ProbeSettings) -> None:
    encoder = make()
    table = probe_layers(encoder, replace(shards, labels_per_class=1, draws=2, baselines=False), [1, 3])
    assert "linear, 1 per class: L2 penalty 1 / labels, fixed" in table.text()
    probed = table.to_dict()["about"]["probed"]
    assert set(probed) == {"layer 1", "layer 3"}
    for number in (1, 3):
        row = probed[f"layer {number}"]
        assert row["features"] == f"layer {number}, mean pooling"
        assert row["fingerprint"] == fingerprint(encoder)
        assert row["linear"]["l2"] > 0


def test_held_out_scores_are_of_images_that_the_fit_has_not_seen(shards: ProbeSettings) -> None:
    from sslvit.evaluate.linear import fit_probe
    from sslvit.evaluate.sources import Features

    values = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 4  # nothing to learn: a perfect fit of what is seen, chance on what is not
    head = fit_probe(Features(values, labels), 4)
    assert head.held_out < 45
    assert fit_probe(Features(values + 10 * labels[:, None], labels), 4).held_out > 90


@pytest.mark.parametrize("text", ["some", "0,1", "4", "1;2", ""])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected all, or numbers from 1 to 3 as in 1,3"):
        layer_numbers(text, 3)


def test_layers_by_name_and_number() -> None:
    assert layer_numbers("all", 3) == [1, 2, 3]
    assert layer_numbers("3,1", 3) == [1, 3]


def test_the_command_writes_table_and_picture(
    shards: ProbeSettings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    save_encoder(make(), run / "encoder")
    (run / "figures").mkdir()
    words = ["probe", str(run), "--train", shards.train, "--val", shards.val, "--layers", "all", "--cache", "none"]
    assert main([*words, "-o", str(tmp_path / "layers.json")]) == 0
    written = json.loads((tmp_path / "layers.json").read_text())
    assert written["best"] in (1, 2, 3)
    assert (run / "figures" / "layers.png").exists()
    assert "best layer, by held-out training images" in capsys.readouterr().out
    assert main(words) == 1
    assert "layers.png: already exists" in capsys.readouterr().err
    assert main([*words, "--layer", "1"]) == 1
    assert "--layer and --layers exclude each other" in capsys.readouterr().err
