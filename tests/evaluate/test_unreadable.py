"""A score is of the images that it names: unreadable ones are counted, named and limited, nothing partial is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_fixtures import overwrite, two_classes

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.index import load_index
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.classify import accuracy
from sslvit.evaluate.embed import embed
from sslvit.evaluate.features import FeatureExtractor, check_finite
from sslvit.evaluate.probe import probe
from sslvit.evaluate.sources import FeatureTable, FrozenEncoder, LabeledSet
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, ProbeSettings

DAMAGED: dict[int, bytes | None] = dict.fromkeys([1, 4, 7])


def make() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=2, heads=2)).eval()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return two_classes(tmp_path, train=40, val=20)


def settings_of(shards: Path, **changes) -> ProbeSettings:
    return ProbeSettings(str(shards / "train"), str(shards / "val"), **{"neighbors": [3], "cache": None} | changes)


def test_too_many_unreadable_images_are_no_score(shards: Path) -> None:
    index = load_index(shards / "val")
    overwrite(index, DAMAGED)
    with pytest.raises(
        ValueError, match=r"val: 3 of 20 images cannot be read, more than the 1.0% .* e.g. .*: "
    ) as told:
        probe({"mine": make()}, settings_of(shards))
    assert index.key(min(DAMAGED)) in str(told.value)
    assert "--max-unreadable-fraction" in str(told.value)


def test_a_score_of_fewer_images_says_so_and_is_theirs(shards: Path, capsys: pytest.CaptureFixture) -> None:
    index = load_index(shards / "val")
    overwrite(index, DAMAGED)
    table = probe({"mine": make()}, settings_of(shards, max_unreadable_fraction=0.2, protocol=None))
    assert "warning:" in capsys.readouterr().out
    assert (table.about["val_images"], table.about["val_unreadable"]) == (17, 3)
    assert (table.about["train_images"], table.about["train_unreadable"]) == (40, 0)
    assert "on 17 images" in table.text()
    # the vote by hand, on the 17 images alone
    source = FrozenEncoder(make())
    train, val = (
        FeatureExtractor()
        .features(source, LabeledSet(load_index(shards / name), 3, chosen), [(2, "class")])
        .at([(2, "class")])
        for name, chosen in (("train", None), ("val", np.setdiff1d(np.arange(20), list(DAMAGED))))
    )
    assert len(val) == 17
    similarity = torch.nn.functional.normalize(val.values) @ torch.nn.functional.normalize(train.values).T
    best, readouts = similarity.topk(3)
    votes = torch.zeros(17, 2).scatter_add_(1, train.labels[readouts], (best / 0.07).exp())
    right = 100 * float((votes.argmax(1) == val.labels).float().mean())
    assert table.rows["mine"]["kNN, k = 3"] == pytest.approx(right)


def test_features_of_a_damaged_set_are_not_what_a_repaired_one_is_scored_by(shards: Path, tmp_path: Path) -> None:
    index, cache = load_index(shards / "val"), FeatureCache(tmp_path / "cache")
    readouts = [(2, "class")]

    def features(limit: float) -> torch.Tensor:
        data = LabeledSet(load_index(shards / "val"), 3, max_unreadable_fraction=limit)
        return FeatureExtractor(cache=cache).features(FrozenEncoder(make()), data, readouts).at(readouts).values

    whole = features(0.0)
    for entry in (tmp_path / "cache").iterdir():
        for file in entry.iterdir():
            file.unlink()
    before = overwrite(index, DAMAGED)
    assert len(features(0.5)) == 17
    assert not list((tmp_path / "cache").glob("*/*"))
    overwrite(index, before)
    assert torch.equal(features(0.0), whole)


def test_labels_beside_cached_features_are_those_of_the_index_now(shards: Path, tmp_path: Path) -> None:
    index, cache, readouts = load_index(shards / "val"), FeatureCache(tmp_path / "cache"), [(2, "class")]
    features = [FeatureExtractor(cache=cache).features(FrozenEncoder(make()), LabeledSet(index, 3), readouts)]
    index.records = index.records.copy()
    index.records["label"] = 1 - index.records["label"]  # as `shards index --labels` may change them
    features.append(FeatureExtractor(cache=cache).features(FrozenEncoder(make()), LabeledSet(index, 3), readouts))
    index.classes = None
    features.append(FeatureExtractor(cache=cache).features(FrozenEncoder(make()), LabeledSet(index, 3), readouts))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert torch.equal(features[1].labels, 1 - features[0].labels)
    assert set(features[2].labels.tolist()) == {-1}
    assert all(torch.equal(one.columns[2, "class"], features[0].columns[2, "class"]) for one in features)


def test_a_table_of_other_images_in_the_cache_is_not_used(shards: Path, tmp_path: Path) -> None:
    cache, readouts = FeatureCache(tmp_path / "cache"), [(2, "class")]
    data = LabeledSet(load_index(shards / "val"), 3)
    table = FeatureExtractor(cache=cache).features(FrozenEncoder(make()), data, readouts)
    (key,) = (entry.name for entry in (tmp_path / "cache").iterdir())
    assert cache.find(key, readouts, LabeledSet(data.index, 3, np.arange(20))) is not None
    assert cache.find(key, readouts, LabeledSet(data.index, 3, np.arange(19, -1, -1))) is None
    assert cache.find(key, readouts, LabeledSet(data.index, 3, np.arange(19))) is None
    assert torch.equal(table.samples, torch.arange(20))


def test_passes_that_see_different_images_are_refused(shards: Path) -> None:
    index = load_index(shards / "val")
    data = LabeledSet(index, 3, max_unreadable_fraction=0.5, memory_limit_mb=0)
    FeatureExtractor().features(FrozenEncoder(make()), data, [(2, "class")])
    overwrite(index, DAMAGED)
    with pytest.raises(ValueError, match="17 images could be read in this pass and 20 in an earlier one"):
        FeatureExtractor().features(FrozenEncoder(make()), data, [(2, "class")])


def test_a_classifier_is_scored_on_what_can_be_read_and_says_how_many(shards: Path) -> None:
    index = load_index(shards / "val")
    labels = torch.from_numpy(index.labels_of(np.arange(20)).astype(int))
    overwrite(index, DAMAGED)

    def always_light(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)

    data = LabeledSet(index, 3, max_unreadable_fraction=0.2)
    found = accuracy(always_light, data, make().settings, torch.device("cpu"), batch=6)
    kept = labels[np.setdiff1d(np.arange(20), list(DAMAGED))]
    assert found.top1 == pytest.approx(100 * float((kept == 1).float().mean()))
    assert (found.images, found.unreadable) == (17, 3)
    with pytest.raises(ValueError, match="3 of 20 images cannot be read"):
        accuracy(always_light, LabeledSet(index, 3), make().settings, torch.device("cpu"))


def test_logits_that_are_not_finite_are_no_score(shards: Path) -> None:
    data = LabeledSet(load_index(shards / "val"), 3)
    with pytest.raises(ValueError, match="logits are not finite"):
        accuracy(lambda images: torch.full((len(images), 2), torch.nan), data, make().settings, torch.device("cpu"))


def test_embeddings_are_of_named_images_and_limited(shards: Path, capsys: pytest.CaptureFixture) -> None:
    index = load_index(shards / "val")
    overwrite(index, DAMAGED)
    source = FrozenEncoder(make())
    made = embed(source, LabeledSet(index, 3, max_unreadable_fraction=0.2), [(2, "class")], batch=6)
    assert made.keys.tolist() == [index.key(i) for i in range(20) if i not in DAMAGED]
    save_encoder(make(), shards / "encoder")
    words = ["embed", str(shards / "encoder"), str(shards / "val"), "-o", str(shards / "made.npz")]
    assert main(words) == 1
    assert "3 of 20 images cannot be read" in capsys.readouterr().err
    assert not (shards / "made.npz").exists()
    assert main([*words, "--max-unreadable-fraction", "0.2"]) == 0
    assert "17 of 20 images (3 cannot be read)" in capsys.readouterr().out


def test_health_is_of_the_images_that_it_names(shards: Path, capsys: pytest.CaptureFixture) -> None:
    overwrite(load_index(shards / "val"), DAMAGED)
    save_encoder(make(), shards / "encoder")
    words = ["health", str(shards / "encoder"), str(shards / "val")]
    assert main(words) == 1
    assert "3 of 20 images cannot be read" in capsys.readouterr().err
    assert main([*words, "--max-unreadable-fraction", "0.2"]) == 0
    assert "17 of 20 images (3 cannot be read)" in capsys.readouterr().out


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_number_that_is_not_finite_is_enough_to_refuse_features(shards: Path, value: float) -> None:
    data = LabeledSet(load_index(shards / "val"), 3)
    columns = {(1, "class"): torch.ones(20, 4), (2, "mean"): torch.ones(20, 4)}
    check_finite(FeatureTable(columns, torch.zeros(20).long(), torch.arange(20)), data)
    columns[2, "mean"][7, 1] = value
    with pytest.raises(ValueError, match=r"features of layer 2 \(mean\) are not finite on .*val"):
        check_finite(FeatureTable(columns, torch.zeros(20).long(), torch.arange(20)), data)
