"""The papers' own probes: heads and optimizers against released code, and who sees what."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_fixtures import Golden, looks_at
from run_fixtures import read_protocol

from sslvit import progress
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.evaluate import labeled, protocols
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.probe import PAPER_RULE, probe
from sslvit.evaluate.sgd_probe import BatchNormHead, HeadGrid, fit_batch_norm_head, iterate_batches
from sslvit.evaluate.sources import Features, FrozenEncoder, RawPixels
from sslvit.models import ViTEncoder
from sslvit.optim.lars import LARS
from sslvit.settings import EncoderSettings, ProbeSettings
from sslvit.settings.protocols import DINOv2ProbeSettings


@looks_at("lars", "*")
def test_lars_moves_as_in_maes_released_code(golden: Golden) -> None:
    for run in golden.config["runs"]:
        check_lars(golden, run)


def check_lars(golden: Golden, run: str) -> None:
    numbers = golden.config["runs"][run]
    parameters = {}
    for name, shape in golden.config["shapes"].items():
        parameters[name] = torch.nn.Parameter(golden[f"param/{name}"].clone())
        assert list(parameters[name].shape) == shape
    optimizer = LARS(
        parameters.values(), numbers["lr"], numbers["weight_decay"], numbers["momentum"], numbers["trust_coefficient"]
    )
    for step in range(1, golden.config["steps"] + 1):
        for name, parameter in parameters.items():
            parameter.grad = golden[f"input/grad_step{step}/{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            golden.check(f"output/{run}/step{step}/{name}", parameter.detach())
    for name, parameter in parameters.items():
        golden.check(f"output/{run}/mu/{name}", optimizer.state[parameter]["momentum"])


@looks_at("linear_probe_head", "*")
def test_the_probe_head_is_maes(golden: Golden) -> None:
    width, classes = golden.config["dim"], golden.config["classes"]
    head = BatchNormHead(width, classes)

    def start() -> None:
        state = {key.removeprefix("head."): value for key, value in golden.under("param/").items()}
        head.load_state_dict(state)
        head.train()

    start()
    for i in range(3):
        values = golden[f"input/train_features_{i}"]
        assert len(values) == golden.config["batch"]
        golden.check(f"output/train_{i}", head(values).detach())
        golden.check(f"output/after_{i}/running_mean", head[0].running_mean)
        golden.check(f"output/after_{i}/running_var", head[0].running_var)
    golden.check("output/eval", head.eval()(golden["input/eval_features"]).detach())
    start()
    optimizer = LARS(head.parameters(), lr=0.0)
    for step, rate in enumerate(golden.config["lr_per_step"], start=1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        i = step - 1
        loss = F.cross_entropy(head(golden[f"input/train_features_{i}"]), golden[f"input/train_labels_{i}"])
        loss.backward()
        optimizer.step()
        golden.check(f"output/sgd_step{step}/loss", loss.detach())
        golden.check(f"output/sgd_step{step}/head.1.weight", head[1].weight.detach())
        golden.check(f"output/sgd_step{step}/head.1.bias", head[1].bias.detach())


def test_heads_start_small_by_seed_and_without_bias() -> None:
    """From N(0, 0.01), as in the released probes of MAE, DINO and DINOv2."""
    readout = (1, "class")
    heads = [BatchNormHead(64, 50, seed) for seed in (0, 0, 1)]
    grids = [HeadGrid([[readout]], 64, [0.1, 1.0], 25, seed) for seed in (0, 0, 1)]
    for one, same, other in ([head[1].weight.detach() for head in heads], [grid.weight[0] for grid in grids]):
        assert float(one.std()) == pytest.approx(0.01, rel=0.05)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert not heads[0][1].bias.any()
    assert not grids[0].bias[0].any()


def test_a_fitted_batch_norm_head_judges_each_image_alone() -> None:
    values, labels = torch.randn(32, 6), torch.arange(32) % 3
    batches = ((step, Features(values, labels)) for step in range(5))
    head = fit_batch_norm_head(batches, 6, 3, lambda step: 0.5)
    together = head(values)
    torch.testing.assert_close(torch.cat([head(row) for row in values.split(1)]), together)


def test_a_grid_of_heads_is_as_many_heads_under_torchs_sgd() -> None:
    source = torch.Generator().manual_seed(0)
    readouts = [(1, "class"), (2, "class"), (2, "mean")]
    features = [[readouts[1]], [readouts[1], readouts[2]], readouts]
    values, labels = torch.randn(64, 12, generator=source), torch.randint(0, 3, (64,), generator=source)
    rates = [0.05, 0.5]
    grid = HeadGrid(features, 4, rates, 3, seed=1)
    columns = [range(4, 8), range(4, 12), range(12)]
    heads = []
    for number, part in enumerate(columns):
        for i, rate in enumerate(rates):
            head = torch.nn.Linear(len(part), 3)
            head.weight.data.copy_(grid.weight[number].view(2, 3, -1)[i])
            head.bias.data.zero_()
            heads.append((head, list(part), torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9), rate))
    batches = [
        (step, Features(values[16 * step : 16 * step + 16], labels[16 * step : 16 * step + 16])) for step in range(4)
    ]
    grid.fit(iter(batches), lambda step: 1 - step / 8)
    for head, part, optimizer, rate in heads:
        for step, batch in batches:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 8)
            optimizer.zero_grad()
            F.cross_entropy(head(batch.values[:, part]), batch.labels).backward()
            optimizer.step()
    scores = grid.accuracies(Features(values, labels))
    for number in range(3):
        for i in range(2):
            head, part, _, _ = heads[2 * number + i]
            torch.testing.assert_close(grid.weight[number].view(2, 3, -1)[i], head.weight.detach())
            torch.testing.assert_close(grid.bias[number].view(2, 3)[i], head.bias.detach())
            right = (head(values[:, part]).argmax(1) == labels).double().mean()
            assert scores[number, i] == pytest.approx(100 * float(right), abs=1e-3)


def test_an_epoch_is_gone_through_once_and_in_another_order_each_time() -> None:
    from sslvit.evaluate.sources import FeatureTable

    table = FeatureTable(
        {(1, "class"): torch.arange(10.0)[:, None]}, torch.zeros(10, dtype=torch.long), torch.arange(10)
    )
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    seen = [
        batch.values[:, 0].tolist() for _, batch in iterate_batches(iter([table] * 3), [(1, "class")], rows, 3, 5, 0)
    ]
    assert len(seen) == 5
    assert len({*seen[0], *seen[1]}) == 6
    assert {*seen[0], *seen[1]} <= set(range(7))
    assert seen[:2] != seen[2:4]
    other = [
        batch.values[:, 0].tolist() for _, batch in iterate_batches(iter([table] * 3), [(1, "class")], rows, 3, 5, 1)
    ]
    assert other[:2] != seen[:2]  # another seed, another order


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Classes that brightness tells apart, nine times of ten."""
    source = np.random.default_rng(0)
    for name, count in (("train", 120), ("val", 60)):
        labels = source.integers(0, 2, count)
        shift = np.where(source.uniform(size=count) < 0.9, labels, 1 - labels) * 120
        images = source.integers(0, 100, (count, 8, 8, 3)) + shift[:, None, None, None]
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["dark", "light"])
    return tmp_path


def settings_of(shards: Path, name: str, **changes) -> ProbeSettings:
    short = {"protocol.batch": 30}
    short |= (
        {"protocol.iterations": 200, "protocol.lrs": [0.1, 10.0]}
        if name == "dinov2"
        else {"protocol.epochs": 20, "protocol.base_lr": 10.0}
    )
    short |= {"protocol.warmup_epochs": 1, "protocol.base_lr": 300.0} if name == "mae" else {}
    protocol = read_protocol(name, {} if name in ("logreg", "igpt") else short | changes)
    return ProbeSettings(str(shards / "train"), str(shards / "val"), protocol, neighbors=[], cache=None)


def encoder() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=2, heads=2)).eval()


@pytest.mark.parametrize("name", ["logreg", "mae", "dino", "dinov2", "igpt"])
def test_every_protocol_learns_and_says_its_settings(shards: Path, name: str) -> None:
    table = probe({"mine": encoder()}, settings_of(shards, name))
    column = "linear, all labels" if name == "logreg" else f"linear ({name}), all labels"
    assert table.rows["mine"][column] > 65
    about = table.about["probed"]["mine"]["linear"]
    assert about["name"] == name
    assert about["features"]
    if name in ("mae", "dino"):
        assert about["effective lr"] == pytest.approx((300.0 if name == "mae" else 10.0) * 30 / 256)
        assert about["steps"] == 80
    if name == "dinov2":
        assert about["effective lrs"] == pytest.approx([0.1 * 30 / 256, 10.0 * 30 / 256])
        assert about["heads"] == 2 * 4
    assert (PAPER_RULE in table.rows["mine"]) == (name in ("dino", "dinov2"))
    assert ("the paper selected" in table.text()) == (name in ("dino", "dinov2", "igpt"))


def test_crops_differ_from_epoch_to_epoch_unless_told_otherwise(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = protocols.FeatureExtractor.run
    monkeypatch.setattr(protocols.FeatureExtractor, "run", lambda *a, **k: passes.append(run(*a, **k)) or passes[-1])
    probe({"mine": encoder()}, settings_of(shards, "mae"))
    of_one = passes[-20:]  # as many epochs
    values = [table.columns[2, "class"] for table in of_one]
    assert all(len(value) == 120 for value in values)
    assert not torch.equal(values[0], values[1])
    passes.clear()
    short = settings_of(shards, "mae", **{"protocol.epochs": 1, "protocol.warmup_epochs": 0})
    for seed in (0, 1):
        probe({"mine": encoder()}, replace(short, seed=seed, baselines=False))
    of_train = [table.columns[2, "class"] for table in passes if len(table.labels) == 120]
    assert torch.equal(of_train[0], values[0])
    assert not torch.equal(of_train[1], values[0])  # another seed, other crops
    passes.clear()
    probe({"mine": encoder()}, settings_of(shards, "mae", **{"protocol.augment": False}))
    assert len(passes) == 3 * 2  # three rows, two data sets


@pytest.mark.parametrize("name", ["logreg", "mae", "dino", "dinov2", "igpt"])
def test_selection_never_sees_the_reported_labels(shards: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, penalties and selections are the same whatever the reported images' labels are.

    The labels are planted where a selection that peeked would find them: permuted, so that another choice would be the
    best one on them.
    """
    settings = settings_of(shards, name)
    chosen = []
    features_of = protocols.ProbeContext.features
    for turn in (0, 1):

        def planted(context, data, readouts, fraction=None, turn=turn):
            features = features_of(context, data, readouts, fraction)
            return Features(features.values, (features.labels + turn) % 2) if data is context.val else features

        monkeypatch.setattr(protocols.ProbeContext, "features", planted)
        table = probe({"mine": encoder()}, settings)
        chosen.append((table.about["probed"]["mine"]["linear"], table.rows["mine"]))
    (one, score), (other, opposite) = chosen
    assert one == other
    for column in score:
        if column != PAPER_RULE:  # the same answers against the opposite labels
            assert score[column] + opposite[column] == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mae", {"protocol.epochs": 0}, "--protocol.epochs 0"),
        ("mae", {"protocol.epochs": 10}, "--protocol.warmup_epochs 10: must be below --protocol.epochs"),
        ("dinov2", {"protocol.epochs": 10}, "protocol.epochs: no such setting"),
        ("dinov2", {"protocol.lrs": []}, "--protocol.lrs"),
        ("dinov2", {"protocol.held_out": 1.5}, "--protocol.held_out"),
        ("dino", {"protocol.scale": [0.5, 2]}, "--protocol.scale"),
        ("dino", {"train.steps": 2}, "--train.steps: no such option"),
        ("knn", {}, "protocol.name: 'knn' is not one of logreg, mae"),
        ("logreg", {"protocol.batch": 2}, "protocol.batch: no such setting"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_protocol(name, changes)


def epochs_of(monkeypatch: pytest.MonkeyPatch, shards: Path, name: str, **changes) -> tuple[list, list, dict]:
    """The rows of every step, the factor or rate of every step, and the features that the head saw."""
    rows, factors, seen = [], [], {}
    real = protocols.iterate_batches

    def watched(tables, readouts, used, batch, steps, seed):
        seen.update(readouts=readouts, used=used)
        for step, features in real(tables, readouts, used, batch, steps, seed):
            rows.append(features)
            yield step, features

    monkeypatch.setattr(protocols, "iterate_batches", watched)
    fit = HeadGrid.fit

    def watched_fit(grid, batches, factor_at, momentum=0.9):
        seen.setdefault("rates", grid.lrs)

        def factor(step: int) -> float:
            factors.append(factor_at(step))
            return factors[-1]

        seen["momentum"] = momentum
        fit(grid, batches, factor, momentum)

    monkeypatch.setattr(HeadGrid, "fit", watched_fit)
    accuracies = HeadGrid.accuracies

    def watched_accuracies(grid, features):
        seen.setdefault("scored", []).append(features)
        return accuracies(grid, features)

    monkeypatch.setattr(HeadGrid, "accuracies", watched_accuracies)
    head_fit = protocols.fit_batch_norm_head

    def watched_head(batches, width, classes, lr_at, *more):
        seen["momentum"] = more[0]

        def rate(step: int) -> float:
            factors.append(lr_at(step))
            return factors[-1]

        return head_fit(batches, width, classes, rate, *more)

    monkeypatch.setattr(protocols, "fit_batch_norm_head", watched_head)
    deep = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=6, heads=2, pooling="mean")).eval()
    settings = settings_of(shards, name, **changes)
    settings.baselines = False
    seen["table"] = probe({"mine": deep}, settings)
    return rows, factors, seen


def test_the_grids_heads_never_step_on_images_that_choose_among_them(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, factors, seen = epochs_of(monkeypatch, shards, "dinov2")
    is_held = torch.ones(120, dtype=torch.bool)
    is_held[seen["used"]] = False
    assert int(is_held.sum()) == 12  # a tenth of each class of 120
    assert all(len(batch) == 30 for batch in rows)
    assert len(rows) == len(factors) == 200
    assert factors[0] == 1.0
    assert factors[100] == pytest.approx(0.5)
    assert [len(features) for features in seen["scored"]] == [12, 60]  # chosen on those held out, then reported
    fitted = {tuple(row) for batch in rows for row in batch.values.tolist()}
    assert not fitted & {tuple(row) for row in seen["scored"][0].values.tolist()}
    assert seen["momentum"] == 0.9
    assert seen["readouts"] == [*((layer, "class") for layer in (3, 4, 5, 6)), (6, "mean")]
    assert seen["table"].about["probed"]["mine"]["linear"]["chosen on"] == "12 held-out training images"


def test_dinos_probe_reads_four_class_tokens_and_slows_by_epoch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, factors, seen = epochs_of(monkeypatch, shards, "dino")
    assert seen["readouts"] == [(layer, "class") for layer in (3, 4, 5, 6)]
    assert factors[:4] == [1.0] * 4
    assert factors[40] == pytest.approx(0.5)  # epoch 10 of 20, all of its four steps
    assert factors[40:44] == [factors[40]] * 4
    assert read_protocol("dino", {}).base_lr == 1e-3
    assert [len(features) for features in seen["scored"]] == [60] * 20


def test_dinos_probe_reads_one_block_and_the_mean_of_a_wide_encoder() -> None:
    """ViT-B and wider, as in the released evaluation; four class tokens of a narrower one."""
    readouts = {}
    for width in (384, 768):
        settings = EncoderSettings(image_size=8, patch=4, width=width, depth=5, heads=6)
        source = RawPixels(settings)
        source.readouts = partial(FrozenEncoder.readouts, source)  # which readouts there are is a question of settings
        dino = read_protocol("dino", {})
        readouts[width] = protocols._dino_readouts(source, ProbeSettings("t", "v", dino, cache=None), dino)
    assert readouts[384] == [(layer, "class") for layer in (2, 3, 4, 5)]
    assert readouts[768] == [(5, "class"), (5, "mean")]


@pytest.mark.parametrize("name", ["mae", "dino", "dinov2"])
def test_a_protocols_momentum_reaches_its_optimizer(shards: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"protocol.iterations": 4} if name == "dinov2" else {"protocol.epochs": 2}
    _, _, seen = epochs_of(monkeypatch, shards, name, **short, **{"protocol.momentum": 0.25})
    assert seen["momentum"] == 0.25


def test_images_are_held_out_of_every_class_one_at_least() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 15)
    is_held = protocols.sample_held_out(labels, DINOv2ProbeSettings(), seed=0)
    assert [int(is_held[labels == label].sum()) for label in range(3)] == [10, 1, 2]
    assert torch.equal(is_held, protocols.sample_held_out(labels, DINOv2ProbeSettings(), seed=0))
    assert not torch.equal(is_held, protocols.sample_held_out(labels, DINOv2ProbeSettings(), seed=1))


def test_maes_probe_reads_the_class_token_and_warms_up(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rates, seen = epochs_of(monkeypatch, shards, "mae")
    peak = 300.0 * 30 / 256
    assert seen["readouts"] == [(6, "class")]  # not the mean, though the encoder pools so
    assert rates[:5] == pytest.approx([0, peak / 4, peak / 2, 3 * peak / 4, peak])
    assert rates[-1] < 0.01 * peak
    paper = read_protocol("mae", {})
    assert (paper.epochs, paper.batch, paper.base_lr, paper.warmup_epochs) == (90, 16384, 0.1, 10)


def test_igpts_probe_reads_the_middle(shards: Path) -> None:
    deep = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=6, heads=2)).eval()
    table = probe({"mine": deep}, settings_of(shards, "igpt"))
    assert table.about["probed"]["mine"]["features"] == "layer 3, mean pooling"


def test_views_of_a_protocol_reach_the_images(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = []
    run = protocols.FeatureExtractor.run

    def watched(extractor, source, data, readouts, view, *more):
        views.append((view, data.index.location))
        return run(extractor, source, data, readouts, view, *more)

    monkeypatch.setattr(protocols.FeatureExtractor, "run", watched)
    settings = settings_of(shards, "mae", **{"protocol.flip": 0.25, "protocol.scale": [0.3, 0.7]})
    probe({"mine": encoder()}, settings)
    train = [view for view, where in views if where.endswith("train")]
    val = [view for view, where in views if where.endswith("val")]
    assert {view.kind for view in train} == {"crop"}
    assert {(view.flip, *view.scale) for view in train} == {(0.25, 0.3, 0.7)}
    assert {(view.kind, view.fraction) for view in val} == {("center", 0.875)}


@pytest.mark.parametrize("name", ["mae", "dino", "dinov2"])
def test_an_unreadable_image_costs_no_steps(shards: Path, name: str) -> None:
    """Batches are planned from what can be read, so a batch of all images is still one."""
    from sslvit.data.index import load_index

    index = load_index(shards / "train")
    shard, offset, size = index.locate(7)
    with open(index.shard_path(shard), "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    changes = {"protocol.batch": 1000, "protocol.iterations" if name == "dinov2" else "protocol.epochs": 30}
    table = probe({"mine": encoder()}, settings_of(shards, name, **changes))
    about = table.about["probed"]["mine"]["linear"]
    assert about["steps"] == 30
    assert about["batch used"] == (119 if name != "dinov2" else 119 - 12)


def test_features_that_are_not_finite_are_named(shards: Path) -> None:
    broken = encoder()
    with torch.no_grad():
        broken.blocks[1].mlp.fc2.bias[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"features of layer 2 \(class\) are not finite on .*train: the weights are broken"
    ):
        probe({"mine": broken}, settings_of(shards, "logreg"))


def test_a_held_out_part_that_leaves_nothing_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(shards, "dinov2", **{"protocol.held_out": 0.9999})
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractor, "features", lambda *rest: pytest.fail("a pass was made first"))
        message = r"--protocol.held_out 0.9999: of class \S+ \(\d+ training images\) none would be left to fit on"
        with pytest.raises(ValueError, match=message):
            probe({"mine": encoder()}, settings)
    # some images are only found to be unreadable in the pass
    monkeypatch.setattr(labeled, "check_counts", lambda *rest: None)
    with pytest.raises(ValueError, match="--protocol.held_out 0.9999: leaves no image of some class"):
        probe({"mine": encoder()}, settings)


def test_the_only_image_of_a_class_cannot_be_held_out() -> None:
    settings = ProbeSettings(train="a", val="b", neighbors=[], protocol=DINOv2ProbeSettings())
    labeled.check_counts(["cat", "dog", "none"], np.array([0] * 20 + [1] * 2), settings)
    with pytest.raises(ValueError, match=r"of class '?dog'? \(1 training image\) none would be left to fit on"):
        labeled.check_counts(["cat", "dog", "none"], np.array([0] * 20 + [1]), settings)


def test_a_long_protocol_says_so_before_and_which_option_makes_it_short(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocols, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.02)
    monkeypatch.setattr(progress, "MIN_INTERVAL_SECONDS", 0.02)
    with caplog.at_level(logging.INFO, "sslvit"):
        probe({"mine": encoder()}, replace(settings_of(shards, "dinov2"), baselines=False))
    said = [record.getMessage() for record in caplog.records]
    (before,) = (line for line in said if "passes over" in line)
    assert re.search(r"dinov2: [\d,]+ passes over \d+ images, each with new crops, about \d+ s for each row", before)
    assert "Fewer --protocol.iterations make it shorter, and --protocol.augment false takes one pass" in before
    assert any(re.match(r"dinov2: training the head: \d+ of [\d,]+ steps, pass \d+ of", line) for line in said)
