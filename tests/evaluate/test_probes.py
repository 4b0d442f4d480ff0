"""Probes against other implementations, and against peeking."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden_fixtures import Golden, looks_at
from sklearn.linear_model import LogisticRegression

from sslvit.evaluate import knn
from sslvit.evaluate.knn import DAMPING, fit_whitening, knn_accuracies, nearest, recognized_by_neighbors, votes
from sslvit.evaluate.linear import L2_GRID, fit_probe, sample_labels, stratified_folds
from sslvit.evaluate.logistic import fit_logistic
from sslvit.evaluate.sources import Features
from sslvit.models import ViTEncoder


def clouds(count: int = 300, width: int = 12, classes: int = 4, seed: int = 0, noise: float = 1.0) -> Features:
    source = np.random.default_rng(0)
    centers = source.normal(size=(classes, width))
    source = np.random.default_rng(seed)
    labels = source.integers(0, classes, count)
    values = centers[labels] + noise * source.normal(size=(count, width))
    return Features(torch.from_numpy(values).float(), torch.from_numpy(labels))


def wide_clouds(seed: int = 0) -> Features:
    """Classes that overlap, in channels that are far from independent: weak penalties take long there."""
    source = np.random.default_rng(0)
    mixing = source.normal(size=(192, 192)) * np.logspace(0, -2, 192)
    centers = 0.35 * source.normal(size=(10, 192))
    source = np.random.default_rng(seed)
    labels = source.integers(0, 10, 500)
    values = (centers[labels] + source.normal(size=(500, 192))) @ mixing
    return Features(torch.from_numpy(values / values.std(0)), torch.from_numpy(labels))


@pytest.mark.parametrize("strength", [10.0**-exponent for exponent in range(7)])
@pytest.mark.parametrize("make", [clouds, wide_clouds])
def test_logistic_regression_reaches_scikit_learns_optimum(make: Callable, strength: float) -> None:
    features, others = make(), make(seed=1)
    values = features.values.double()
    weight, bias, is_solved = fit_logistic(
        values, features.labels, int(features.labels.max()) + 1, torch.tensor([strength]).double()
    )
    assert is_solved
    theirs = LogisticRegression(C=1 / (strength * len(values)), max_iter=10_000, tol=1e-10).fit(
        values.numpy(), features.labels.numpy()
    )

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        entropy = torch.nn.functional.cross_entropy(values @ w.T + b, features.labels)
        return float(entropy + strength / 2 * w.square().sum())

    expected = loss(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_))
    assert loss(weight[0], bias[0]) <= expected * (1 + 1e-6)
    exact = torch.from_numpy(theirs.coef_)
    assert (weight[0] - exact).abs().max() < 2e-3 * exact.abs().max()
    guesses = (others.values.double() @ weight[0].T + bias[0]).argmax(1)
    assert (guesses == torch.from_numpy(theirs.predict(others.values.numpy()))).float().mean() >= 0.995


def test_fitting_a_probe_leaves_the_features_as_they_were() -> None:
    features = Features(clouds().values.double(), clouds().labels)
    before = features.values.clone()
    fit_probe(features, 4)
    assert torch.equal(features.values, before)


def test_a_strength_of_every_size_is_compared_with_the_others_at_its_own_optimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sslvit.evaluate import linear

    solved = []

    def fit(*given):
        found = fit_logistic(*given)
        solved.append((len(given[3]), bool(found[2].all())))
        return found

    monkeypatch.setattr(linear, "fit_logistic", fit)
    fit_probe(wide_clouds(), 10)
    assert solved == [(5 * len(L2_GRID), True), (1, True)]


def test_many_problems_at_once_are_the_same_problems() -> None:
    features = clouds()
    values, strengths = features.values.double(), torch.tensor([1e-1, 1e-3]).double()
    used = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.7
    together = fit_logistic(values, features.labels, 4, strengths, used, solved=1e-6)
    for i in range(2):
        alone = fit_logistic(values[used[i]], features.labels[used[i]], 4, strengths[i : i + 1], solved=1e-6)
        torch.testing.assert_close(together[0][i], alone[0][0], atol=1e-5, rtol=1e-4)


def test_a_problem_that_is_solved_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslvit.evaluate.logistic import PenalizedLoss

    widths, of_all = [], PenalizedLoss.__call__

    def count(self: PenalizedLoss, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        widths.append(len(theta))
        return of_all(self, theta)

    monkeypatch.setattr(PenalizedLoss, "__call__", count)
    features, strengths = clouds(), torch.tensor([10, 1e-2, 1e-4]).double()
    together = fit_logistic(features.values.double(), features.labels, 4, strengths)
    assert together[2].all()
    assert {3, 2, 1} == set(widths)
    assert widths.count(3) < widths.count(1)
    for i in range(3):
        alone = fit_logistic(features.values.double(), features.labels, 4, strengths[i : i + 1])
        torch.testing.assert_close(together[0][i], alone[0][0], atol=2e-3 * float(alone[0].abs().max()), rtol=0)
        torch.testing.assert_close(together[1][i], alone[1][0], atol=1e-3, rtol=1e-3)


def test_strength_is_chosen_by_held_out_training_images() -> None:
    """Labels that are noise call for the strongest penalty; clean ones for less."""
    features = clouds(noise=0.3)
    shuffled = Features(torch.randn(300, 100, generator=torch.Generator().manual_seed(0)), features.labels)
    assert fit_probe(shuffled, 4).l2 >= 0.1
    assert fit_probe(features, 4).l2 < 10
    assert fit_probe(features, 4).accuracy(clouds(noise=0.3, seed=5)) > 95
    assert min(L2_GRID) == pytest.approx(1e-6)


def test_among_strengths_with_as_many_right_answers_the_lowest_loss_wins() -> None:
    features = clouds(noise=0.01)  # so far apart that any penalty gets all of them right
    assert fit_probe(features, 4).held_out == 100
    assert fit_probe(features, 4).l2 == min(L2_GRID)


def test_each_channel_counts_alike_whatever_its_scale_and_offset() -> None:
    features = clouds()
    scale, offset = torch.logspace(-3, 3, 12), torch.linspace(-5, 5, 12)
    other = Features(features.values * scale + offset * scale, features.labels)
    one, same = fit_probe(features, 4), fit_probe(other, 4)
    assert (one.l2, one.held_out) == (same.l2, same.held_out)
    torch.testing.assert_close(one.logits(features.values), same.logits(other.values), atol=1e-3, rtol=1e-3)


def test_held_out_answers_are_a_share_of_the_images_held_out_also_of_many_images() -> None:
    features = clouds(count=1200, noise=0.3)  # one fifth is held out; of up to 1,000 every image is, once
    assert fit_probe(features, 4).held_out > 95


def test_fewer_images_than_features_reach_the_same_optimum() -> None:
    features = clouds(count=10, width=40)
    values, strength = features.values.double(), torch.tensor([0.1]).double()
    weight, bias = (part.clone().requires_grad_() for part in fit_logistic(values, features.labels, 4, strength)[:2])
    loss = torch.nn.functional.cross_entropy(values @ weight[0].T + bias[0], features.labels)
    (loss + 0.05 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5


def test_an_unfinished_fit_says_so() -> None:
    features, strength = clouds(), torch.tensor([1e-2]).double()
    assert not fit_logistic(features.values.double(), features.labels, 4, strength, max_iterations=3)[2]


def test_shares_of_classes_are_fitted_like_as_many_labels() -> None:
    """A row that is half one class and half another is two rows of half the weight."""
    features, strength = clouds(60), torch.tensor([1e-2]).double()
    values, labels = features.values.double(), features.labels
    other = (labels + 1) % 4
    shares = (torch.nn.functional.one_hot(labels, 4) + torch.nn.functional.one_hot(other, 4)).double() / 2
    one = fit_logistic(values, shares, 4, strength, solved=1e-7)
    two = fit_logistic(values.repeat(2, 1), torch.cat([labels, other]), 4, strength, solved=1e-7)
    torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)


def test_large_sets_are_gone_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslvit.evaluate import logistic

    features, strengths = clouds(), torch.tensor([1e-2, 1e-3]).double()
    whole = fit_logistic(features.values.double(), features.labels, 4, strengths, solved=1e-6)
    monkeypatch.setattr(logistic, "MAX_LOGITS_ON_CPU", 2 * 4 * 37)  # 37 rows at a time
    sizes, logits = set(), logistic.PenalizedLoss.logits
    monkeypatch.setattr(logistic.PenalizedLoss, "logits", lambda *args: sizes.add(len(args[2])) or logits(*args))
    pieces = fit_logistic(features.values.double(), features.labels, 4, strengths, solved=1e-6)
    assert sizes == {37, len(features) % 37}
    torch.testing.assert_close(whole[0], pieces[0], atol=1e-6, rtol=1e-5)


def test_the_untrained_baseline_is_what_training_starts_from() -> None:
    from sslvit.models.mae import MAEModel
    from sslvit.settings.load import load_recipe

    recipe = load_recipe("mae/digits")
    torch.manual_seed(0)
    start = MAEModel(recipe.task, recipe.encoder).encoder.state_dict()
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
    chosen = sample_labels(labels, 7, None, 3)
    assert torch.bincount(labels[chosen]).tolist() == [7] * 4
    assert len(chosen.unique()) == 28
    assert not torch.equal(chosen.sort()[0], sample_labels(labels, 7, None, 4).sort()[0])
    with pytest.raises(ValueError, match=r"--labels-per-class 500: class 0 has only"):
        sample_labels(labels, 500, None, 0)
    tenth = sample_labels(labels, None, 10.0, 0)
    assert torch.bincount(labels[tenth]).tolist() == [round(n / 10) for n in torch.bincount(labels).tolist()]
    assert torch.bincount(labels[sample_labels(labels, 1, None, 0)]).tolist() == [1] * 4
    with pytest.raises(ValueError, match=r"--labels-percent 0.1: class 0 has only \d+ images, of which 0 would be"):
        sample_labels(labels, None, 0.1, 0)


def knn_votes(
    train: Features, queries: torch.Tensor, classes: int, neighbors: int = 20, temperature: float = 0.07
) -> torch.Tensor:
    """For each query and class, the sum of exp(cosine / temperature) over its nearest neighbors of that class."""
    unit, bank = (torch.nn.functional.normalize(values, dim=1) for values in (queries, train.values))
    similarity, labels = nearest(unit, bank, train.labels, neighbors)
    return votes(similarity, labels, classes, temperature) * (similarity[:, :1] / temperature).exp()


@looks_at("knn", "input/*", "output/*", "info/*", "config/classes", "config/dim", "config/n_*", "config/ks", "config/T")
def test_neighbors_vote_as_in_dinos_evaluation(golden: Golden) -> None:
    config, classes, temperature = golden.config, golden.config["classes"], golden.config["T"]
    train, val = (Features(golden[f"input/{p}_features"], golden[f"input/{p}_labels"]) for p in ("train", "test"))
    assert train.values.shape == (config["n_train"], config["dim"])
    assert val.values.shape == (config["n_test"], config["dim"])
    accuracies = knn_accuracies(train, val, classes, config["ks"], temperature)
    assert list(accuracies) == config["ks"]
    for k in config["ks"]:
        scores = knn_votes(train, val.values, classes, k, temperature)
        golden.check(f"output/k{k}/scores", scores)
        golden.check(f"output/k{k}/prediction", scores.argmax(1))
        for n in (1, 5):
            is_right = (scores.topk(n, dim=1).indices == val.labels[:, None]).any(1)
            golden.check(f"output/k{k}/correct{n}", is_right)
            share = 100 * float(is_right.double().mean())
            assert share == golden.info[f"k{k}"][f"top{n}"] == float(golden[f"output/k{k}/top{n}"])
        assert accuracies[k] == golden.info[f"k{k}"]["top1"]  # one search, and each k by its own neighbors


def test_neighbors_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = clouds(300), clouds(50, seed=1)
    expected = {}
    for k in (5, 60):
        guesses = knn_votes(train, val.values, 4, k).argmax(1)
        expected[k] = 100 * float((guesses == val.labels).double().mean())
    monkeypatch.setattr(knn, "BANK_AT_ONCE", 40)
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 7)
    assert knn_accuracies(train, val, 4, [5, 60], 0.07) == pytest.approx(expected)
    assert min(expected.values()) > 80


def test_only_the_direction_of_features_decides_who_is_near() -> None:
    train, val = clouds(300), clouds(50, seed=1)
    sizes = torch.logspace(-2, 2, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    longer = Features(train.values * sizes[:, None], train.labels)
    assert knn_accuracies(longer, val, 4, [5, 20], 0.07) == knn_accuracies(train, val, 4, [5, 20], 0.07)
    torch.testing.assert_close(knn_votes(longer, 3 * val.values, 4), knn_votes(train, val.values, 4), rtol=1e-3, atol=1)


def test_a_small_temperature_lets_the_nearest_decide() -> None:
    train, val = clouds(), clouds(60, seed=1)
    nearest_alone = knn_accuracies(train, val, 4, [1], 0.07)[1]
    for temperature in (0.01, 1e-4):  # exp(1 / 0.01) is beyond float32
        assert knn_accuracies(train, val, 4, [20], temperature)[20] == pytest.approx(nearest_alone, abs=2)


def test_more_neighbors_than_images_is_all_of_them() -> None:
    features = clouds(30)
    assert torch.equal(knn_votes(features, features.values, 4, 100), knn_votes(features, features.values, 4, 30))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_heads_and_neighbors_on_a_gpu_are_those_of_the_cpu() -> None:
    train, val = clouds(), clouds(200, seed=1)
    one, other = (fit_probe(train, 4, 0, device) for device in ("cpu", "cuda"))
    assert one.l2 == other.l2
    torch.testing.assert_close(one.weight, other.weight, atol=1e-4, rtol=1e-3)
    here, there = (knn_accuracies(train, val, 4, [5, 20], 0.07, device) for device in ("cpu", "cuda"))
    assert here == pytest.approx(there, abs=0.5)  # a tie may break otherwise


def test_shares_in_single_precision_are_fitted_to_convergence() -> None:
    features = clouds(60)
    shares = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    shares = shares / shares.sum(1, keepdim=True)  # to seven digits
    strengths = torch.tensor(L2_GRID, dtype=torch.float64)
    assert fit_logistic(features.values.double(), shares, 4, strengths, max_iterations=200)[2].all()


def planted(directions: list[tuple[float, float]], labels: list[int]) -> Features:
    return Features(torch.tensor(directions, dtype=torch.float32), torch.tensor(labels))


def test_the_temperature_decides_between_one_near_and_several_farther_neighbors() -> None:
    """One neighbor of class 0 at cosine 1, three of class 1 at cosine 0.8: exp(1 / t) against 3 exp(0.8 / t)."""
    train = planted([(1, 0), (0.8, 0.6), (0.8, 0.6), (0.8, -0.6)], [0, 1, 1, 1])
    query = planted([(1, 0)], [0])
    limit = 0.2 / np.log(3)  # where both weigh alike
    assert knn_accuracies(train, query, 2, [4], 0.9 * limit) == {4: 100}
    assert knn_accuracies(train, query, 2, [4], 1.1 * limit) == {4: 0}
    assert knn_accuracies(train, query, 2, [1, 4], 1.1 * limit) == {1: 100, 4: 0}  # each k its own vote


def test_the_length_of_a_feature_is_nothing_to_its_neighbors() -> None:
    train = planted([(1, 0), (0.8, 0.6), (0.8, 0.6), (0.8, -0.6)], [0, 1, 1, 1])
    scaled = Features(train.values * torch.tensor([[0.1], [30.0], [1.0], [7.0]]), train.labels)
    for length in (1e-3, 1.0, 50.0):
        query = planted([(length, 0)], [0])
        for bank in (train, scaled):
            assert knn_accuracies(bank, query, 2, [4], 0.9 * 0.2 / np.log(3)) == {4: 100}
            assert knn_accuracies(bank, query, 2, [4], 1.1 * 0.2 / np.log(3)) == {4: 0}


def test_knn_scores_are_shares_of_the_reported_images() -> None:
    train = planted([(1, 0), (0, 1), (-1, 0)], [0, 1, 1])
    val = planted([(1, 0.1), (0.1, 1), (0.2, 1), (1, -0.1)], [0, 1, 0, 0])
    assert knn_accuracies(train, val, 2, [1], 0.07) == {1: 75}


def test_neighbors_are_found_wherever_in_the_bank_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    features, others = clouds(90), clouds(40, seed=1)
    whole = knn_accuracies(features, others, 4, [1, 5, 20], 0.07)
    monkeypatch.setattr(knn, "BANK_AT_ONCE", 7)
    assert knn_accuracies(features, others, 4, [1, 5, 20], 0.07) == whole
    similarity = (
        torch.nn.functional.normalize(others.values, dim=1) @ torch.nn.functional.normalize(features.values, dim=1).T
    )
    best, readouts = similarity.topk(5)
    votes = torch.zeros(40, 4).scatter_add_(1, features.labels[readouts], (best / 0.07).exp())
    assert whole[5] == pytest.approx(100 * float((votes.argmax(1) == others.labels).float().mean()))


def test_the_strength_is_the_one_that_held_out_folds_prefer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By scikit-learn on the same folds: most right answers, then the lowest loss."""
    from sslvit.evaluate import linear

    features = clouds(noise=0.02)
    labels = features.labels.clone()
    labels[::7] = (labels[::7] + 1) % 4  # mistakes that nothing can tell: a weak penalty is too sure of itself there
    strengths = [1.0, 1e-2, 1e-4]
    monkeypatch.setattr(linear, "L2_GRID", strengths)
    values = features.values.double().numpy()
    values = (values - values.mean(0)) / values.std(0)
    fold = stratified_folds(labels, 3).numpy()
    found = []
    for strength in strengths:
        right, loss = 0, 0.0
        for held in range(5):
            kept = fold != held
            model = LogisticRegression(C=1 / (strength * kept.sum()), max_iter=10_000, tol=1e-9)
            model.fit(values[kept], labels.numpy()[kept])
            chances = model.predict_proba(values[~kept])
            right += int((chances.argmax(1) == labels.numpy()[~kept]).sum())
            loss -= float(np.log(chances[np.arange(len(chances)), labels.numpy()[~kept]]).sum())
        found.append((-right, loss))
    assert len({right for right, _ in found}) == 1  # the loss decides
    head = fit_probe(Features(features.values, labels), 4, seed=3)
    assert head.l2 == strengths[found.index(min(found))]
    assert head.held_out == pytest.approx(-100 * min(found)[0] / 300)
    assert found.index(min(found)) == 1  # neither the strongest nor the weakest


def test_with_one_image_of_each_class_the_penalty_is_fixed_since_none_can_be_held_out() -> None:
    features = clouds(count=12, classes=12)
    features.labels = torch.arange(12)
    head = fit_probe(features, 12)
    assert (head.l2, head.held_out) == (1 / 12, None)  # scikit-learn's default: C = 1 on the sum over images
    values = features.values.double().numpy()
    values = (values - values.mean(0)) / values.std(0)
    theirs = LogisticRegression(max_iter=10_000, tol=1e-9).fit(values, features.labels.numpy())
    torch.testing.assert_close(head.weight, torch.from_numpy(theirs.coef_), atol=1e-3, rtol=1e-3)
    assert torch.equal(fit_probe(features, 12, seed=1).weight, head.weight)  # there are no folds


def test_the_only_image_of_a_class_is_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslvit.evaluate import linear

    features = clouds(count=60)
    labels = torch.cat([features.labels, torch.tensor([4, 5])])
    features = Features(torch.cat([features.values, torch.randn(2, 12) + 9]), labels)
    trials = []
    monkeypatch.setattr(linear, "fit_logistic", lambda *given: trials.append(given) or fit_logistic(*given))
    head = fit_probe(features, 6)
    used = trials[0][4]
    assert used[:, -2:].all()
    assert (~used[:: len(L2_GRID)]).sum(0).tolist() == [1] * 60 + [0, 0]  # the others once
    assert head.held_out * 60 / 100 == pytest.approx(round(head.held_out * 60 / 100))


def test_folds_and_draws_are_another_choice_under_another_seed() -> None:
    labels = clouds(count=400).labels
    assert torch.equal(stratified_folds(labels, 1), stratified_folds(labels, 1))
    assert not torch.equal(stratified_folds(labels, 0), stratified_folds(labels, 1))
    one, other = (set(sample_labels(labels, 10, None, seed).tolist()) for seed in (0, 1))
    assert len(one & other) < 25  # of 40, some 4 by chance
    same = (
        stratified_folds(torch.zeros(100, dtype=torch.long), 0),
        stratified_folds(torch.ones(100, dtype=torch.long), 0),
    )
    assert not torch.equal(*same)  # each class its own order


def test_strengths_that_are_not_solved_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslvit.evaluate import linear

    features = wide_clouds()
    free = fit_probe(features, 10)
    assert free.weakest_l2 == L2_GRID[-1]
    monkeypatch.setattr(linear, "TRIAL_ITERATIONS", 12)
    short = fit_probe(features, 10)
    assert L2_GRID[-1] < short.weakest_l2 < L2_GRID[0]
    assert short.l2 >= short.weakest_l2
    assert linear.solved_in_all_folds(torch.tensor([[True, True, False], [True, False, False]])) == [0]
    assert linear.solved_in_all_folds(torch.zeros(2, 3, dtype=torch.bool)) == [0, 1, 2]


# ---- whitening -----------------------------------------------------------------------------------------------


def test_whitening_divides_each_component_by_its_deviation_and_a_part_of_the_largest() -> None:
    source = torch.Generator().manual_seed(0)
    deviations = torch.tensor([8.0, 2.0, 0.01])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=source))[0]
    values = (torch.randn(20_000, 3, generator=source) * deviations) @ rotation.T + 5
    whitened = fit_whitening(values)(values)
    assert whitened.mean(0).abs().max() < 1e-4
    found = torch.linalg.svdvals(whitened.double() / len(values) ** 0.5)
    torch.testing.assert_close(found.float(), deviations / (deviations + DAMPING * 8), rtol=0.02, atol=1e-3)
    constant = torch.ones(10, 4)
    assert fit_whitening(constant)(constant).abs().max() == 0


def test_two_directions_that_all_images_share_decide_no_whitened_neighbor() -> None:
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 4
    values = torch.nn.functional.one_hot(labels, 7).float() + 0.3 * torch.randn(600, 7, generator=source)
    values[:, 5:] = 40 * torch.randn(600, 2, generator=source)
    train, val = Features(values[:400], labels[:400]), Features(values[400:], labels[400:])
    plain, whitened = (recognized_by_neighbors(train, val, 4, [10], 0.07, whiten=one)[10] for one in (False, True))
    assert plain.float().mean() < 0.5
    assert whitened.float().mean() > 0.9
    shifted = [Features(7 - 3 * one.values.flip(1), one.labels) for one in (train, val)]
    again = recognized_by_neighbors(*shifted, 4, [10], 0.07, whiten=True)[10]
    assert (again == whitened).float().mean() > 0.99  # it depends on no shift, scale or rotation
