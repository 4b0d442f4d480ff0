"""Intervals cover what they say, and stand only where something varied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from shard_fixtures import overwrite, two_classes

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.data.array_images import array_samples
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.evaluate.classify import accuracy
from sslvit.evaluate.probe import ProbeTable, probe
from sslvit.evaluate.scores import format_score, independent, interval, read_scores, sampling_interval
from sslvit.evaluate.sources import LabeledSet
from sslvit.models import ViTEncoder
from sslvit.reports.bench import BenchRun
from sslvit.settings import EncoderSettings, ProbeSettings
from sslvit.settings.bench import BenchSettings, ProbeColumn, SplitSettings


def test_an_interval_is_students() -> None:
    values = [61.0, 63.5, 64.0, 60.5]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx((high - low) / 2)


def test_nothing_varied_means_no_interval() -> None:
    assert interval([61.0]) is None
    assert interval([61.0, 61.0, 61.0]) is None
    assert format_score([61.0, 61.0, 61.0]) == "61.0"
    assert format_score([61.0, 62.0]) == "61.5 ± 6.4"


def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say() -> None:
    """Three seeds with five draws each; the seed moves a score as much as the draw does."""
    source = np.random.default_rng(0)
    covered = {"per seed": 0, "pooled": 0}
    for _ in range(2000):
        scores = source.normal(size=(3, 1)) + source.normal(size=(3, 5))
        by_seed = scores.tolist()
        for name, values in (("per seed", independent(by_seed)), ("pooled", scores.ravel().tolist())):
            covered[name] += abs(np.mean(values)) <= interval(values)
    assert covered["per seed"] / 2000 == pytest.approx(0.95, abs=0.02)
    assert covered["pooled"] / 2000 < 0.8  # what it would be if draws of one seed counted as independent


def test_one_seeds_draws_are_independent_of_each_other() -> None:
    assert independent([[60.0, 62.0, 64.0]]) == [60.0, 62.0, 64.0]
    assert independent([[60.0, 62.0], [70.0]]) == [61.0, 70.0]


def test_a_score_that_is_null_leaves_the_others() -> None:
    assert read_scores({"a": {"linear": 50.0, "kNN": None}, "b": {"kNN": [1, 2]}}) == {
        "a": {"linear": [50.0]}, "b": {"kNN": [1, 2]}
    }  # fmt: skip
    assert read_scores({"a": {"kNN": None}}) == {}


def test_the_sampling_interval_is_a_binomials_at_one_half() -> None:
    assert sampling_interval(400) == pytest.approx(100 * 1.96 * 0.5 / 20)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    two_classes(tmp_path, train=60, val=40)
    torch.manual_seed(0)
    save_encoder(ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2)), tmp_path / "encoder")
    return tmp_path


def test_probe_and_bench_say_the_same_of_the_same_data(shards: Path) -> None:

    split = SplitSettings(str(shards / "train"), str(shards / "val"))
    settings = ProbeSettings(
        split.train, split.val, protocol=None, labels_per_class=5, draws=2, neighbors=[3], seeds=3, cache=None
    )
    table = probe({"mine": load_encoder(shards / "encoder")}, settings)
    bench = BenchSettings(
        encoders={"mine": [str(shards / "encoder")]}, data={"data": split}, seeds=3, baselines=["pixels", "untrained"],
        columns={
            "few": ProbeColumn(kind="few", labels_per_class=5, draws=2),
            "knn": ProbeColumn(kind="knn", neighbors=3),
        },
        out=str(shards / "bench"),
    )  # fmt: skip
    run = BenchRun(bench)
    run.folder.mkdir()
    run.claim()

    cells = run.run().to_dict()["cells"]
    of_bench = {(cell["row"], cell["column"]): (cell["mean"], cell["interval"]) for cell in cells}
    names = {"raw pixels": "raw pixels", "untrained encoder": "mine untrained", "mine": "mine"}
    of_probe = table.to_dict()
    for row, other in names.items():
        for column, short in (("linear, 5 per class", "few"), ("kNN, k = 3", "knn")):
            mine = of_probe["rows"][row][column], of_probe["intervals"][row][column]
            assert of_bench[other, short] == pytest.approx(mine), (row, column)
    assert of_probe["intervals"]["raw pixels"]["linear, 5 per class"] is not None
    assert of_probe["intervals"]["mine"]["kNN, k = 3"] is None  # the same weights, the same images: nothing varies
    assert of_probe["intervals"]["untrained encoder"]["kNN, k = 3"] is not None
    assert "mean over 3 seeds" in table.text()
    assert len(of_probe["about"]["probed"]["mine"]["scores"]["linear, 5 per class"]) == 3
    assert len(of_probe["about"]["probed"]["mine"]["scores"]["linear, 5 per class"][0]) == 2


def test_a_table_of_one_seed_names_draws() -> None:
    about = {"val_images": 100, "train_images": 100, "neighbors": [], "seeds": 1, "draws": 5, "probed": {},
             "fingerprints": {"train": "a", "val": "b"}}  # fmt: skip
    assert "mean over 5 draws of labels" in ProbeTable({"mine": {"few": [1.0, 2.0]}}, about).notes()


def test_every_draw_of_every_seed_is_another_choice_of_labels(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslvit.evaluate import probe as module

    drawn, draw = [], module.sample_labels

    def watched(labels: torch.Tensor, *given) -> torch.Tensor:
        drawn.append(draw(labels, *given))
        assert labels[drawn[-1]].bincount().tolist() == [4, 4]
        return drawn[-1]

    monkeypatch.setattr(module, "sample_labels", watched)
    settings = ProbeSettings(
        str(shards / "train"), str(shards / "val"), protocol=None, labels_per_class=4, draws=3, neighbors=[], seeds=2,
        cache=None, baselines=False,
    )  # fmt: skip
    probe({"mine": load_encoder(shards / "encoder")}, settings)
    assert len(drawn) == 6
    assert len({tuple(sorted(one.tolist())) for one in drawn}) == 6


def test_top1_and_top5_are_counted_as_torch_sorts(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    labels = np.arange(40) % 8
    images = source.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8)
    pack(array_samples(images, labels), tmp_path / "set", list("abcdefgh"))
    data = LabeledSet(load_index(tmp_path / "set"), 3)
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    shown = iter(logits.split(7))

    def of(images: torch.Tensor) -> torch.Tensor:
        part = next(shown)
        return torch.cat([part, torch.zeros(len(images) - len(part), 8)])  # a last batch is filled up

    settings = EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2)
    found = accuracy(of, data, settings, torch.device("cpu"), batch=7)
    truth = torch.from_numpy(data.index.labels_of(np.arange(40)).astype(int))
    order = logits.argsort(1, descending=True)
    assert found.top1 == pytest.approx(100 * float((order[:, 0] == truth).float().mean()))
    assert found.top5 == pytest.approx(100 * float((order[:, :5] == truth[:, None]).any(1).float().mean()))
    assert found.top5 > found.top1
    assert found.images == 40


def test_a_bench_measures_again_where_images_or_crops_changed_and_keeps_nothing_of_incomplete_sets(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    probed = BenchRun.probe

    def watched(self, context, *given):
        measured.append(type(context.source).__name__)
        return probed(self, context, *given)

    monkeypatch.setattr(BenchRun, "probe", watched)

    def rows(val: str, limit: float = 0.01) -> tuple[list[str], dict[str, float], str]:
        """What was measured, its scores, and the table in words."""
        bench = BenchSettings(
            encoders={"mine": [str(shards / "encoder")]}, baselines=["pixels"], max_unreadable_fraction=limit,
            data={"data": SplitSettings(str(shards / "train"), str(shards / val))},
            columns={"knn": ProbeColumn(kind="knn", neighbors=3)}, out=str(shards / "bench"),
        )  # fmt: skip
        measured.clear()
        run = BenchRun(bench)
        run.folder.mkdir(exist_ok=True)
        run.claim()
        cells = run.run().to_dict()["cells"]
        markdown = (shards / "bench" / "table.md").read_text()
        return measured.copy(), {cell["row"]: cell["mean"] for cell in cells}, markdown

    both = ["RawPixels", "FrozenEncoder"]
    first = rows("val")
    assert first[0] == both
    assert rows("val") == ([], *first[1:])
    two_classes(shards, other=30)
    other = rows("other")
    assert other[0] == both
    assert other[1] != first[1]
    encoder = load_encoder(shards / "encoder")
    encoder.settings.crop_fraction = 0.5
    save_encoder(encoder, shards / "encoder")
    assert rows("val")[0] == both
    # three of thirty images cannot be read: said, and measured again once they can
    encoder.settings.crop_fraction = 0.75
    save_encoder(encoder, shards / "encoder")
    index = load_index(shards / "other")
    before = overwrite(index, dict.fromkeys([0, 5, 9]))
    with pytest.raises(ValueError, match="3 of 30 images cannot be read"):
        rows("other")
    found = rows("other", 0.2)
    assert found[0] == both
    assert "27 of 30 images (3 cannot be read)" in found[2]
    assert rows("other", 0.2)[0] == both
    overwrite(index, before)
    whole = rows("other", 0.2)
    assert whole[0] == both
    assert "on 30 images of" in whole[2]
    assert rows("other", 0.2)[0] == []
