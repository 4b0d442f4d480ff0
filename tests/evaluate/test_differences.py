"""Paired differences between encoders, and the sentence that says whether they exceed chance."""

from __future__ import annotations

import math

import pytest
import torch

from sslvit.evaluate.differences import Difference, difference, differences, verdicts


def flips(count: int, images: int, seed: int = 0) -> torch.Tensor:
    """False for so many images, drawn by seed, of otherwise recognized ones."""
    wrong = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.ones(images, dtype=torch.bool).index_fill(0, wrong, False)


def test_images_that_are_hard_for_both_fall_out_of_the_interval() -> None:
    hard = flips(400, 1000)
    better = hard.clone()
    better[(~hard).nonzero()[:30, 0]] = True  # 30 more of 1,000
    found = difference("b", "a", "linear", [better], [hard])
    assert found.points == pytest.approx(3.0)
    deviation = 100 * math.sqrt((30 * 0.97**2 + 970 * 0.03**2) / 999)
    assert found.half == pytest.approx(1.96 * deviation / math.sqrt(1000))
    assert found.is_beyond  # scored apart, the two accuracies would each be known to within 3.0


def test_a_difference_of_chance_stays_within_its_interval_in_nineteen_of_twenty_cases() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(400, 2, 5, 300, generator=generator) < 0.6
    found = [difference("b", "a", "x", list(one), list(other)) for one, other in pairs]
    assert 0.93 < sum(not one.is_beyond for one in found) / len(found) <= 1.0
    single = [difference("b", "a", "x", [one[0]], [other[0]]) for one, other in pairs]
    assert 0.92 < sum(not one.is_beyond for one in single) / len(single) < 0.98


def test_draws_of_labels_that_disagree_widen_the_interval() -> None:
    base, plus, minus = flips(100, 200), flips(60, 200, 1), flips(140, 200, 1)
    steady = difference("b", "a", "few", [plus, plus], [base, base])
    shaky = difference("b", "a", "few", [plus, minus], [base, base])
    assert steady.points == pytest.approx(20.0)
    assert shaky.points == pytest.approx(0.0)
    assert shaky.half > 100 > steady.half  # two draws, 20 above and 20 below: nearly nothing is known


def test_the_sentence_names_what_is_better_worse_and_undecided() -> None:
    found = [
        Difference("after", "before", "kNN, k = 20", 4.1, 1.2), Difference("after", "before", "linear", -2.0, 1.5),
        Difference("after", "before", "few", 1.0, 1.8), Difference("other", "before", "linear", 0.0, 0.0),
    ]  # fmt: skip
    assert verdicts(found) == [
        "after against before, image by image: better in kNN, k = 20 (+4.1 ± 1.2); worse in linear (-2.0 ± 1.5); "
        "no difference beyond its 95 % interval in few (+1.0 ± 1.8)",
        "other against before, image by image: no difference beyond its 95 % interval in linear (+0.0 ± 0.0)",
    ]


def test_only_columns_of_both_rows_are_compared_and_always_with_the_first_row() -> None:
    one, two = flips(10, 50), flips(20, 50)
    found = differences({"a": {"x": [one], "y": [one]}, "b": {"x": [two]}, "c": {"y": [two], "z": [two]}})
    assert [(one.row, one.against, one.column, round(one.points)) for one in found] == [
        ("b", "a", "x", -20), ("c", "a", "y", -20),
    ]  # fmt: skip
