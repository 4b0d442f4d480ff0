"""Probes against other implementations, and against peeking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_fixtures import Golden
from sklearn.linear_model import LogisticRegression

from sslvit.data.pack import pack
from sslvit.data.reader import ShardReader
from sslvit.data.sources import array_samples
from sslvit.evaluate.features import Features, encoder_features, pixel_features
from sslvit.evaluate.knn import knn_votes
from sslvit.evaluate.linear import STRENGTHS, draw_labels, fit_logistic, fit_probe, stratified_folds
from sslvit.evaluate.probe import format_table, probe, score_features
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, ProbeSettings


def clouds(count: int = 300, width: int = 12, classes: int = 4, seed: int = 0, noise: float = 1.0) -> Features:
    source = np.random.default_rng(0)
    centres = source.normal(size=(classes, width))
    source = np.random.default_rng(seed)
    labels = source.integers(0, classes, count)
    values = centres[labels] + noise * source.normal(size=(count, width))
    return Features(torch.from_numpy(values).float(), torch.from_numpy(labels))


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_logistic_regression_reaches_scikit_learns_optimum(strength: float) -> None:
    features = clouds()
    values = features.values.double()
    weight, bias = fit_logistic(values, features.labels, 4, torch.tensor([strength]).double())
    theirs = LogisticRegression(C=1 / (strength * len(values)), max_iter=10_000, tol=1e-10).fit(
        values.numpy(), features.labels.numpy()
    )

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        entropy = torch.nn.functional.cross_entropy(values @ w.T + b, features.labels)
        return float(entropy + strength / 2 * w.square().sum())

    expected = loss(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_))
    assert loss(weight[0], bias[0]) <= expected * (1 + 1e-6)


def test_many_problems_at_once_are_the_same_problems() -> None:
    features = clouds()
    values, strengths = features.values.double(), torch.tensor([1e-1, 1e-3]).double()
    used = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.7
    together = fit_logistic(values, features.labels, 4, strengths, used, tolerance=1e-9)
    for i in range(2):
        alone = fit_logistic(values[used[i]], features.labels[used[i]], 4, strengths[i : i + 1], tolerance=1e-9)
        torch.testing.assert_close(together[0][i], alone[0][0], atol=1e-5, rtol=1e-4)


def test_strength_is_chosen_by_held_out_training_images() -> None:
    """Labels that are noise call for the strongest penalty; clean ones for less."""
    features = clouds(noise=0.3)
    shuffled = Features(torch.randn(300, 100, generator=torch.Generator().manual_seed(0)), features.labels)
    assert fit_probe(shuffled, 4).strength >= 0.1
    assert fit_probe(features, 4).strength < 10
    assert fit_probe(features, 4).accuracy(clouds(noise=0.3, seed=5)) > 95
    assert min(STRENGTHS) == pytest.approx(1e-6)


def test_selection_never_sees_the_reported_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head that is fitted must be the same whatever the validation set holds."""
    from sslvit.evaluate import probe as module

    heads = []

    def spy(features: Features, classes: int, seed: int = 0):
        heads.append(fit_probe(features, classes, seed))
        return heads[-1]

    monkeypatch.setattr(module, "fit_probe", spy)
    train, settings = clouds(), ProbeSettings("", "")
    for val in (clouds(seed=1), Features(torch.randn(50, 12), torch.zeros(50, dtype=torch.long))):
        score_features(train, val, 4, settings)
    assert heads[0].strength == heads[1].strength
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_fewer_images_than_features_reach_the_same_optimum() -> None:
    features = clouds(count=10, width=40)
    values, strength = features.values.double(), torch.tensor([0.1]).double()
    weight, bias = (part.clone().requires_grad_() for part in fit_logistic(values, features.labels, 4, strength))
    loss = torch.nn.functional.cross_entropy(values @ weight[0].T + bias[0], features.labels)
    (loss + 0.05 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5


def test_an_unfinished_fit_says_so(capsys: pytest.CaptureFixture) -> None:
    features = clouds()
    fit_logistic(features.values.double(), features.labels, 4, torch.tensor([1e-2]).double())
    assert capsys.readouterr().out == ""
    fit_logistic(
        features.values.double(), features.labels, 4, torch.tensor([1e-2]).double(), max_iterations=500, tolerance=0.0
    )
    assert "not converged to 0e+00 after 500 iterations" in capsys.readouterr().out


def test_the_untrained_baseline_is_what_training_starts_from() -> None:
    from sslvit.settings.load import load_recipe
    from sslvit.tasks.mae import MAE

    recipe = load_recipe("mae/digits")
    torch.manual_seed(0)
    run = {"total_steps": 1, "steps_per_epoch": 1, "global_batch": 64}
    start = MAE(recipe.task, recipe.encoder, recipe.optim, **run).encoder.state_dict()
    torch.manual_seed(0)
    baseline = ViTEncoder(recipe.encoder).state_dict()
    assert all(torch.equal(start[key], baseline[key]) for key in start)
    assert baseline["blocks.0.mlp.fc1.weight"].std() > 0.05  # Xavier, not 0.02


def test_constant_features_do_no_harm() -> None:
    features = clouds()
    with_constant = Features(torch.cat([features.values, torch.full((300, 2), 3.0)], 1), features.labels)
    one, other = fit_probe(features, 4), fit_probe(with_constant, 4)
    assert one.accuracy(features) == other.accuracy(with_constant)


def test_folds_and_draws_are_stratified_and_repeatable() -> None:
    labels = clouds().labels
    fold = stratified_folds(labels, 0)
    for label in range(4):
        counts = torch.bincount(fold[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(fold, stratified_folds(labels, 0))
    chosen = draw_labels(labels, 7, 3)
    assert torch.bincount(labels[chosen]).tolist() == [7] * 4
    assert len(chosen.unique()) == 28
    assert not torch.equal(chosen.sort()[0], draw_labels(labels, 7, 4).sort()[0])
    with pytest.raises(ValueError, match=r"--labels-per-class 500: class 0 has only"):
        draw_labels(labels, 500, 0)


def test_neighbours_vote_as_in_dinos_evaluation() -> None:
    golden = Golden("knn")
    train = Features(golden["input/train_features"], golden["input/train_labels"])
    for k in golden.config["ks"]:
        votes = knn_votes(train, golden["input/test_features"], golden.config["classes"], k, golden.config["T"])
        golden.check(f"output/k{k}/scores", votes)
        golden.check(f"output/k{k}/prediction", votes.argmax(1))


def test_more_neighbours_than_images_is_all_of_them() -> None:
    features = clouds(30)
    assert torch.equal(knn_votes(features, features.values, 4, 100), knn_votes(features, features.values, 4, 30))


@pytest.fixture
def shards(tmp_path):
    source = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 15)):
        labels = source.integers(0, 2, count)
        images = (
            source.integers(0, 100, (count, 8, 8, 3)).astype(np.uint8)
            + (labels * 100).astype(np.uint8)[:, None, None, None]
        )
        pack(array_samples(images, labels), tmp_path / name, ["dark", "light"])
    return tmp_path


def test_features_do_not_depend_on_the_batch(shards) -> None:
    from sslvit.data.index import load_index

    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2))
    reader = ShardReader(load_index(shards / "val"))
    one, other = (encoder_features(encoder, reader, batch=batch) for batch in (4, 15))
    assert len(one) == 15
    torch.testing.assert_close(one.values, other.values)
    assert torch.equal(one.labels, torch.from_numpy(reader.labels_of(slice(None))))
    large = EncoderSettings(image_size=64, patch=4, width=16, depth=1, heads=2)
    assert pixel_features(reader, large).values.shape == (15, 3 * 32 * 32)


def test_the_table_has_baselines_and_solves_an_easy_set(shards) -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2))
    settings = ProbeSettings(str(shards / "train"), str(shards / "val"), labels_per_class=5, draws=2, neighbours=3)
    table = probe({"mine": encoder}, settings)
    assert list(table.rows) == ["raw pixels", "untrained encoder", "mine"]
    assert list(table.rows["mine"]) == ["linear, all labels", "linear, 5 per class", "kNN, k = 3"]
    assert table.rows["raw pixels"]["linear, all labels"] == 100
    assert probe({"again": encoder}, settings).rows["raw pixels"] == table.rows["raw pixels"]
    assert "raw pixels" in table.text()
    assert format_table({"a": {"x": 12.345}}).splitlines()[1].endswith("12.3")


def test_encoders_that_are_built_alike_share_an_untrained_row(shards) -> None:
    small = EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2)
    wide = EncoderSettings(image_size=8, patch=4, width=32, depth=1, heads=2)
    settings = ProbeSettings(str(shards / "train"), str(shards / "val"), neighbours=3, pooling="mean")
    encoders = {"a": ViTEncoder(small), "b": ViTEncoder(wide), "c": ViTEncoder(small)}
    table = probe(encoders, settings)
    assert list(table.rows) == ["raw pixels", "a, c untrained", "a", "b untrained", "b", "c"]
    assert table.about["features"] == dict.fromkeys("abc", "layer 1, mean pooling")
    alone = probe({"a": encoders["a"]}, settings)
    assert alone.rows["untrained encoder"] == table.rows["a, c untrained"]
    assert alone.rows["a"] == table.rows["a"]
    grey = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2, channels=1))
    with pytest.raises(ValueError, match="a, grey: these encoders take images of different channels"):
        probe({"a": encoders["a"], "grey": grey}, settings)


def test_unlabelled_or_different_data_is_refused(shards) -> None:
    pack(array_samples(np.zeros((4, 8, 8, 3), np.uint8)), shards / "plain")
    pack(array_samples(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]), shards / "other", ["dark", "bright"])
    encoder = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2))
    with pytest.raises(ValueError, match="have no labels"):
        probe({"mine": encoder}, ProbeSettings(str(shards / "train"), str(shards / "plain")))
    with pytest.raises(ValueError, match=r"different classes \(bright, light"):
        probe({"mine": encoder}, ProbeSettings(str(shards / "train"), str(shards / "other")))
    with pytest.raises(ValueError, match=r"--labels-per-class 30: class (dark|light) has only"):
        probe({"mine": encoder}, ProbeSettings(str(shards / "train"), str(shards / "val"), labels_per_class=30))
    with pytest.raises(ValueError, match="use 2 or more"):
        ProbeSettings("a", "b", labels_per_class=1)
    with pytest.raises(ValueError, match="--labels-per-class 0"):
        ProbeSettings("a", "b", labels_per_class=0)
