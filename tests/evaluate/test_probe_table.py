"""The table: baselines, seeds, caches, ranks, and data that is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_fixtures import files_up_to
from PIL import Image

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.data.python_data import python_index
from sslvit.evaluate import features as features_module
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.embed import embed
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.probe import probe
from sslvit.evaluate.scores import format_score, format_table, interval, markdown_table
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet, RawPixels
from sslvit.evaluation import compare
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, ProbeSettings
from sslvit.settings.protocols import DINOProbeSettings

SMALL = {"image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}


def make(seed: int = 0, **changes) -> ViTEncoder:
    torch.manual_seed(seed)
    return ViTEncoder(EncoderSettings(**SMALL | changes)).eval()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 15)):
        labels = source.integers(0, 2, count)
        images = (
            source.integers(0, 100, (count, 8, 8, 3)).astype(np.uint8)
            + (labels * 100).astype(np.uint8)[:, None, None, None]
        )
        pack(array_samples(images, labels), tmp_path / name, ["dark", "light"])
    return tmp_path


def settings_of(shards: Path, **changes) -> ProbeSettings:
    usual = {"neighbors": [3], "cache": None}
    return ProbeSettings(str(shards / "train"), str(shards / "val"), **usual | changes)


def test_features_do_not_depend_on_the_batch(shards: Path) -> None:
    source, data = FrozenEncoder(make()), LabeledSet(load_index(shards / "val"), 3)
    readouts = source.readouts(None, 1, None)
    one, other = (FeatureExtractor(batch).features(source, data, readouts).at(readouts) for batch in (4, 15))
    assert len(one) == 15
    torch.testing.assert_close(one.values, other.values)
    assert torch.equal(one.labels, torch.from_numpy(data.reader.labels_of(slice(None))))
    pixels = RawPixels(EncoderSettings(image_size=64, patch=4, width=16, depth=1, heads=2))
    assert FeatureExtractor().features(pixels, data, [(0, "pixels")]).columns[0, "pixels"].shape == (15, 3 * 32 * 32)


def test_a_data_set_that_nobody_holds_any_more_gives_its_features_to_no_other(shards: Path) -> None:
    indices = [load_index(shards / part) for part in ("train", "val")]
    extractor, source = FeatureExtractor(), RawPixels(make().settings)
    found = [extractor.features(source, LabeledSet(index, 3), [(0, "pixels")]) for index in indices for _ in range(3)]
    assert [len(table.samples) for table in found] == [len(index) for index in indices for _ in range(3)]


def test_the_places_of_a_probe() -> None:
    source = FrozenEncoder(make(depth=4, class_token=True))
    assert source.readouts(None, 1, None) == [(4, "class")]
    assert source.readouts(3, 2, "mean") == [(2, "mean"), (3, "mean")]
    assert source.readouts(None, 4, "class+mean") == [*((i, "class") for i in (1, 2, 3, 4)), (4, "mean")]
    for wrong, message in [
        ((5, 1, None), "--layer 5: this encoder has blocks 1 to 4"),
        ((2, 3, None), "--blocks 3: there are only 2 blocks up to layer 2"),
        ((None, 1, "attention"), "no attention pool"),
    ]:
        with pytest.raises(ValueError, match=message):
            source.readouts(*wrong)
    with pytest.raises(ValueError, match="--pooling class: this encoder has no class token"):
        FrozenEncoder(make(class_token=False, pooling="mean")).readouts(None, 1, "class")


def test_raw_pixels_of_large_images_are_shrunk_smoothly() -> None:
    images = torch.randn(2, 3, 96, 64)
    pixels = RawPixels(EncoderSettings(image_size=[96, 64], patch=4, width=16, depth=1, heads=2))
    (values,) = pixels.features_at(images, [(0, "pixels")])
    shrunk = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(values, shrunk.flatten(1))
    (values,) = pixels.features_at(images[:, :, :24, :24], [(0, "pixels")])
    assert torch.equal(values, images[:, :, :24, :24].flatten(1))  # small ones as they are


@torch.no_grad()
def test_one_pass_gives_every_layer_and_pooling() -> None:
    encoder, images = make(depth=3), torch.randn(2, 3, 8, 8)
    readouts = [(3, "class"), (1, "mean"), (3, "mean"), (2, "class")]
    for (layer, pooling), found in zip(readouts, FrozenEncoder(encoder).features_at(images, readouts), strict=True):
        assert torch.equal(found, encoder.features(images, layer, pooling))
    (block,) = encoder.intermediates(images, [2], norm=True)
    torch.testing.assert_close(block.patch_map().mean((2, 3)), encoder.features(images, 2, "mean"))
    assert block.patch_map().shape == (2, 16, 2, 2)


def test_the_table_has_baselines_and_solves_an_easy_set(shards: Path) -> None:
    settings = settings_of(shards, labels_per_class=5, labels_percent=50.0, draws=2)
    table = probe({"mine": make()}, settings)
    assert list(table.rows) == ["raw pixels", "untrained encoder", "mine"]
    assert list(table.rows["mine"]) == [
        "linear, all labels", "linear, 5 per class", "linear, 50 % of labels", "kNN, k = 3"
    ]  # fmt: skip
    assert table.rows["raw pixels"]["linear, all labels"] == 100
    assert [len(values) for values in table.scores["mine"].values()] == [1, 2, 2, 1]
    assert probe({"again": make()}, settings).rows["raw pixels"] == table.rows["raw pixels"]
    assert "raw pixels" in table.text()
    assert "images: up to ± 25.3 (95 %)" in table.text()
    assert table.to_dict()["intervals"]["mine"]["kNN, k = 3"] is None


@pytest.mark.parametrize("command", ["probe", "knn"])
def test_training_data_as_test_data_is_refused_or_said_below_the_table(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    save_encoder(make(), tmp_path / "encoder")
    words = [command, str(tmp_path / "encoder"), "--train", str(shards / "train"), "--val", str(shards / "train")]
    words += ["--neighbors", "3", "--cache", "none", "--no-baselines"]
    assert main(words) == 1
    assert "train: the same images. Scores of images that were trained on" in capsys.readouterr().err
    assert main([*words, "--allow-same-data"]) == 0
    said = capsys.readouterr().out
    assert "the scored images are those that heads were fitted on: these scores say nothing of others" in said


def test_a_table_without_columns_is_refused(shards: Path) -> None:
    for score in (sslvit.knn, partial(sslvit.probe, protocol=None)):
        with pytest.raises(ValueError, match=r"neighbors=\[\]: there is nothing to score by"):
            score(make(), shards / "train", shards / "val", neighbors=[], device="cpu", cache=None)


def test_seeds_draw_the_untrained_weights_anew(shards: Path) -> None:
    settings = settings_of(shards, seeds=3)
    table = probe({"mine": make()}, settings)
    alone = [probe({"mine": make()}, replace(settings, seeds=1, seed=seed)) for seed in range(3)]
    for row in table.scores:
        for column, values in table.scores[row].items():
            drawn = 1 if column == "kNN, k = 3" and row != "untrained encoder" else 3  # nothing is drawn there
            assert values == [one.scores[row][column][0] for one in alone][:drawn]


def test_intervals_are_students() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 * 1 / 3**0.5, rel=1e-3)  # t, 2 degrees of freedom
    assert format_score([60.0]) == "60.0"
    assert format_score([59.0, 61.0]) == "60.0 ± 12.7"
    rows = {"a": {"x": [12.345]}, "b": {"x": [1.0], "y": [2.0]}}
    assert format_table(rows).splitlines()[1].split() == ["a", "12.3", "–"]
    assert markdown_table(rows).splitlines() == [
        "| | x | y |",
        "|---|---|---|",
        "| a | 12.3 | – |",
        "| b | 1.0 | 2.0 |",
    ]


def test_encoders_that_are_built_alike_share_an_untrained_row(shards: Path) -> None:
    settings = settings_of(shards, pooling="mean")
    encoders = {"a": make(), "b": make(width=32), "c": make()}
    table = probe(encoders, settings)
    assert list(table.rows) == ["raw pixels", "a, c untrained", "a", "b untrained", "b", "c"]
    assert {table.about["probed"][name]["features"] for name in "abc"} == {"layer 1, mean pooling"}
    alone = probe({"a": encoders["a"]}, settings)
    assert alone.rows["untrained encoder"] == table.rows["a, c untrained"]
    assert alone.rows["a"] == table.rows["a"]
    with pytest.raises(ValueError, match="a, gray: these encoders take images of different channels"):
        probe({"a": encoders["a"], "gray": make(channels=1)}, settings)


def test_a_comparison_states_the_view_and_the_features_of_each_encoder_where_they_differ(shards: Path) -> None:
    encoders = {"small": make(), "large": make(image_size=16, depth=2, crop_fraction=0.75), "other": make(seed=1)}
    table = compare(encoders, shards / "train", shards / "val", neighbors=[3], cache=None, device="cpu")
    small, large = (encoders[name].settings.crop_in_words for name in ("small", "large"))
    said = table.heading()
    assert f"each image, for raw pixels, small, other untrained, small, other: {small}" in said
    assert f"each image, for large untrained, large: {large}" in said
    assert "few labels and kNN: layer 1, class pooling (small, other untrained, small, other), layer 2" in said
    about = table.to_dict()["about"]
    assert (about["view"], about["image_size"]) == (None, None)
    assert about["views"]["large"] == {"view": large, "image_size": [16, 16]}
    alike = compare({name: encoders[name] for name in ("small", "other")}, shards / "train", shards / "val",
                    neighbors=[3], cache=None, device="cpu")  # fmt: skip
    assert f"\neach image: {small}\n" in alike.heading()
    assert (alike.about["view"], alike.about["image_size"]) == (small, [8, 8])
    pack(array_samples(np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3)).astype(np.uint8)), shards / "plain")
    measured = compare(encoders, shards / "plain", device="cpu", precision="bf16")
    assert f"each image, for raw pixels, small, other: {small}; features computed in bf16" in measured.heading
    assert f"each image, for large: {large}; features computed in bf16" in measured.heading
    seen = {row: of["view"] for row, of in measured.about["views"].items()}
    assert seen == {"raw pixels": small, "small": small, "large": large, "other": small}
    assert (measured.about["view"], measured.about["image_size"]) == (None, None)


def test_a_penalty_that_no_held_out_image_can_select_is_fixed_and_said(shards: Path) -> None:
    usual = {"neighbors": [], "cache": None, "device": "cpu", "baselines": False}
    table = sslvit.probe(make(), shards / "train", shards / "val", labels_per_class=1, draws=2, **usual)
    assert len(table.scores["encoder"]["linear, 1 per class"]) == 2
    assert "linear, 1 per class: L2 penalty 1 / labels, fixed, since no class has two labels to hold one out" in str(
        table
    )
    assert "l2 chosen on held-out training images" in str(table)
    more = sslvit.probe(make(), shards / "train", shards / "val", labels_per_class=2, draws=2, **usual)
    assert "fixed" not in str(more)
    pack(array_samples(np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8), [0, 1]),
         shards / "two", ["dark", "light"])  # fmt: skip
    one_each = sslvit.probe(make(), shards / "two", shards / "val", **usual)
    linear = one_each.about["probed"]["encoder"]["linear"]
    assert linear["l2"] == 1 / 2
    assert "l2 0.5; l2 chosen on nothing: 1 / labels, fixed, since no class has two labels to hold one out" in str(
        one_each
    )
    assert "accuracy on held-out" not in str(one_each)
    with pytest.raises(
        ValueError, match="the best layer is selected on held-out training images, and no class has two"
    ):
        sslvit.probe(make(), shards / "two", shards / "val", layers="all", **usual)


def test_unlabeled_or_different_data_is_refused(shards: Path) -> None:
    pack(array_samples(np.zeros((4, 8, 8, 3), np.uint8)), shards / "plain")
    pack(array_samples(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]), shards / "other", ["dark", "bright"])
    settings = settings_of(shards)
    for changes, message in [
        ({"val": str(shards / "plain")}, "have no labels"),
        ({"val": str(shards / "other")}, "different classes: light only in .*train; bright only in .*other"),
        ({"labels_per_class": 30}, r"--labels-per-class 30: class (dark|light) has only"),
        ({"neighbors": [5000]}, "--neighbors 5000: there are only 40 training images"),
        ({"protocol": DINOProbeSettings(), "blocks": 2}, "--blocks 2: dino has --protocol.blocks"),
        ({"cache": __file__}, "not a folder. Give one, or none"),
        ({"labels_percent": 2.0}, r"--labels-percent 2: of class .* none would be drawn"),
    ]:
        with pytest.raises(ValueError, match=message):
            probe({"mine": make()}, replace(settings, **changes))
    for wrong, message in [
        ({"labels_per_class": 0}, "--labels-per-class 0"),
        ({"labels_percent": 100.0}, "--labels-percent 100"),
        ({"neighbors": [0]}, "--neighbors"),
        ({"pooling": "max"}, "--pooling: 'max' is not one of class, mean"),
        ({"temperature": 0}, "--temperature 0"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
        ({"workers": -1}, "--workers -1: must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            ProbeSettings("a", "b", **wrong)


@pytest.mark.parametrize("classes", [["dark"], ["dark", "light"]])
def test_images_of_one_class_are_refused(tmp_path: Path, classes: list[str]) -> None:
    for name in ("train", "val"):
        images = np.random.default_rng(len(name)).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
        pack(array_samples(images, np.zeros(12, int)), tmp_path / name, classes)
    with pytest.raises(ValueError, match=r"--train: all images are of one class \('?dark'?\), so any answer is right"):
        probe({"mine": make()}, settings_of(tmp_path))


def test_a_second_probe_reads_features_from_the_cache(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(shards, cache=str(shards / "cache"))
    first = probe({"mine": make()}, settings)
    monkeypatch.setattr(features_module, "evaluation_loader", None)  # a pass would fail
    assert probe({"mine": make()}, settings).scores == first.scores
    with pytest.raises(TypeError):
        probe({"mine": make(seed=1)}, settings)  # other weights
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        probe({"mine": make()}, replace(settings, batch=7))  # other last digits
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        probe({"mine": make(mean=[0.4] * 3)}, settings)  # seen otherwise


def test_one_image_that_changes_in_a_data_set_from_python_has_features_of_its_own(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3)).astype(np.uint8)
    same, source = python_index(list(images)), FrozenEncoder(make())
    for number in range(100):
        changed = images.copy()
        changed[number] = 255 - changed[number]
        other = python_index(list(changed))
        if other.fingerprint() == same.fingerprint():
            break  # one that is not among those of the fingerprint
    extractor = FeatureExtractor(cache=FeatureCache(tmp_path / "cache"))
    one, two = (
        extractor.features(source, LabeledSet(index, 3), [(1, "class")]).columns[1, "class"] for index in (same, other)
    )
    assert (one != two).any(1).nonzero().flatten().tolist() == [number]


def test_the_cache_tells_views_and_data_apart(shards: Path, tmp_path: Path) -> None:
    from sslvit.evaluate.cache import key_of
    from sslvit.settings.views import CenterSettings

    source = FrozenEncoder(make())
    train, val = (LabeledSet(load_index(shards / name), 3) for name in ("train", "val"))
    some = LabeledSet(train.index, 3, np.arange(4))
    keys = [
        key_of(source, data, CenterSettings(fraction=fraction), batch)
        for data, fraction, batch in [
            (train, 1.0, 4),
            (val, 1.0, 4),
            (some, 1.0, 4),
            (train, 0.875, 4),
            (train, 1.0, 5),
        ]
    ]
    assert len(set(keys)) == 5


def test_a_damaged_cache_is_made_anew_and_a_full_one_forgets_the_oldest(shards: Path) -> None:
    cache = FeatureCache(shards / "cache")
    source, data = FrozenEncoder(make(depth=2)), LabeledSet(load_index(shards / "val"), 3)
    wanted = FeatureExtractor(cache=cache).features(source, data, [(1, "class"), (2, "mean")])
    (entry,) = cache.folder.iterdir()
    for name in ("1-class.safetensors", "rows.safetensors"):
        (entry / name).write_bytes(b"half")
        again = FeatureExtractor(cache=cache).features(source, data, [(1, "class"), (2, "mean")])
        assert torch.equal(again.columns[1, "class"], wanted.columns[1, "class"])
        assert torch.equal(again.labels, wanted.labels)
    small = FeatureCache(cache.folder, limit_gb=1e-9)
    FeatureExtractor(cache=small).features(FrozenEncoder(make(seed=1)), data, [(1, "class")])
    assert [path.name for path in cache.folder.iterdir()] != [entry.name]
    assert len(list(cache.folder.iterdir())) == 1


def test_a_disk_that_takes_no_more_is_said_and_ends_no_probe(shards: Path, capsys: pytest.CaptureFixture) -> None:
    source, data = FrozenEncoder(make(depth=2)), LabeledSet(load_index(shards / "val"), 3)
    cache = FeatureCache(shards / "cache")
    with files_up_to(50):
        found = FeatureExtractor(cache=cache).features(source, data, [(1, "class")])
    assert len(found.labels) == len(data.index)
    said = capsys.readouterr().out
    assert "features are not cached: " in said
    assert "rows.safetensors: could not be written (" in said
    assert not [file for file in cache.folder.rglob("*") if file.is_file()]


def test_a_full_cache_leaves_the_files_of_others(shards: Path) -> None:
    """Also a folder that looks like one of its own, and one of its own that somebody put a file into."""
    cache = FeatureCache(shards / "cache", limit_gb=1e-9)
    others = [cache.folder / "thesis" / "rows.safetensors", cache.folder / ("0" * 32) / "thesis.txt"]
    for file in (*others, cache.folder / ("0" * 32) / "rows.safetensors"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    FeatureExtractor(cache=cache).features(
        FrozenEncoder(make()), LabeledSet(load_index(shards / "val"), 3), [(1, "class")]
    )
    assert all(file.exists() for file in others)


def test_the_command_says_what_is_needed_to_quote_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_encoder(make(), tmp_path / "encoder")
    words = [str(tmp_path / "encoder"), "--train", str(shards / "train"), "--val", str(shards / "val"),
             "--neighbors", "3", "5", "--cache", "none"]  # fmt: skip
    assert main(["probe", *words, "-o", str(tmp_path / "scores.json")]) == 0
    said = capsys.readouterr().out
    assert "linear probe: logreg" in said
    assert "l2 chosen on held-out training images" in said
    assert "kNN, k = 5" in said
    assert main(["knn", *words, "--no-baselines"]) == 0
    said = capsys.readouterr().out
    assert "linear," not in said
    assert "raw pixels" not in said
    assert main(["probe", *words, "--protocol", "mae", "--protocol.epoch", "3"]) == 1
    assert "protocol.epoch: no such setting. Did you mean protocol.epochs?" in capsys.readouterr().err
    assert main(["probe", *words, "--epochs", "3"]) == 1
    assert "--epochs" in capsys.readouterr().err


RANKS = """
import json, sys
import torch
from sslvit.checkpoint import load_encoder
from sslvit.data.index import load_index
from sslvit.evaluate.embed import embed
from sslvit.evaluate.probe import probe
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet
from sslvit.ranks import all_ranks, is_first_rank
from sslvit.settings import ProbeSettings
from sslvit.settings.protocols import PROTOCOLS
torch.set_num_threads(1)
encoder, train, val = sys.argv[1:]
short = {"batch": 16, "epochs": 2}
changes = {"logreg": {}, "mae": short | {"warmup_epochs": 1}, "dino": short, "dinov2": {
    "batch": 16, "iterations": 5, "lrs": [0.1, 1.0], "blocks": [1]}}
found = {}
with all_ranks():
    for name, changed in changes.items():
        settings = ProbeSettings(train, val, PROTOCOLS[name](**changed), labels_per_class=4, draws=2, batch=4,
                                 neighbors=[3], cache=None)
        found[name] = probe({"mine": load_encoder(encoder)}, settings).scores
    made = embed(FrozenEncoder(load_encoder(encoder)), LabeledSet(load_index(train), 3), [(1, "class")], batch=4)
    if is_first_rank():
        found["embed"] = [made.keys.tolist(), made.labels.tolist(), made.features.tolist()]
        print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_scores_are_the_same_on_one_two_and_three_ranks(shards: Path, tmp_path: Path) -> None:
    save_encoder(make(), tmp_path / "encoder")
    (tmp_path / "probe.py").write_text(RANKS)
    arguments = [tmp_path / "probe.py", tmp_path / "encoder", shards / "train", shards / "val"]
    found = []
    for ranks in (1, 2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, timeout=240,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        found.append(line)
    assert set(json.loads(found[0].removeprefix("RESULT"))) == {"logreg", "mae", "dino", "dinov2", "embed"}
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("mode", "fraction"), [("center", 0.5), ("squash", 1.0), ("center", 1.0)])
def test_what_is_probed_and_embedded_is_the_crop_that_the_encoder_names(
    tmp_path: Path, mode: str, fraction: float
) -> None:
    source = np.random.default_rng(0)
    images = source.integers(0, 256, (6, 16, 32, 3)).astype(np.uint8)
    pack(array_samples(images, np.arange(6) % 2), tmp_path / "shards", ["a", "b"])
    index = load_index(tmp_path / "shards")
    encoder = make(crop_mode=mode, crop_fraction=fraction)
    data = LabeledSet(index, 3)
    seen = []
    for number in range(6):
        image = Image.open(io.BytesIO(data.reader.read(number)))
        height, width = (16, 32) if mode == "squash" else (16 * fraction, 16 * fraction)
        left, top = (32 - width) / 2, (16 - height) / 2
        resized = image.resize((8, 8), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        seen.append(torch.from_numpy(np.array(resized, np.float32)).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.settings.mean, encoder.settings.std))
    with torch.no_grad():
        expected = encoder.features((torch.stack(seen) - mean) / std)
    features = FeatureExtractor().features(FrozenEncoder(encoder), data, [(1, "class")]).columns[1, "class"]
    torch.testing.assert_close(features, expected, atol=0.02, rtol=0)
    assert torch.equal(torch.from_numpy(embed(FrozenEncoder(encoder), data, [(1, "class")]).features), features)
    other = make(crop_mode=mode, crop_fraction=0.75)
    difference = FeatureExtractor().features(FrozenEncoder(other), data, [(1, "class")]).columns[1, "class"] - features
    assert difference.abs().max() > 0.1


def test_raw_pixels_of_two_sizes_are_kept_apart(shards: Path, tmp_path: Path) -> None:
    data, extractor = (
        LabeledSet(load_index(shards / "val"), 3),
        FeatureExtractor(cache=FeatureCache(tmp_path / "cache")),
    )
    for side in (8, 4, 8):
        settings = EncoderSettings(image_size=side, patch=4, width=16, depth=1, heads=2)
        for one in (extractor, FeatureExtractor()):  # from the cache or not
            table = one.features(RawPixels(settings), data, [(0, "pixels")])
            assert table.columns[0, "pixels"].shape == (15, 3 * side * side)
    normalized = replace(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2), mean=[0.0] * 3)
    other = extractor.features(RawPixels(normalized), data, [(0, "pixels")]).columns[0, "pixels"]
    assert not torch.equal(
        other, FeatureExtractor().features(RawPixels(make().settings), data, [(0, "pixels")]).columns[0, "pixels"]
    )
