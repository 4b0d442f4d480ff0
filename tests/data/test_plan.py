"""The order of the data is a pure function of the seed and the step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslvit.chance import generator, uniform_at
from sslvit.data.plan import EpochPlan, evaluation_batches, slices


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**40))
def test_an_epoch_reads_each_sample_once_and_drops_the_remainder(samples: int, batch: int, seed: int) -> None:
    if samples < batch:
        with pytest.raises(ValueError, match=f"Set it to {samples} or less"):
            EpochPlan(samples, batch, seed)
        return
    plan = EpochPlan(samples, batch, seed)
    seen = np.concatenate([plan.batch(step) for step in range(plan.steps_per_epoch)])
    assert len(set(seen.tolist())) == len(seen) == samples - plan.dropped_per_epoch
    assert plan.dropped_per_epoch == samples % batch
    assert set(seen.tolist()) <= set(range(samples))


def test_a_step_needs_no_steps_before_it() -> None:
    walked, jumped = EpochPlan(1000, 32, 7), EpochPlan(1000, 32, 7)
    batches = [walked.batch(step) for step in range(100)]
    for step in (99, 3, 64, 31):
        assert np.array_equal(jumped.batch(step), batches[step])


def test_seeds_and_epochs_give_other_orders_and_neighbours() -> None:
    def epoch(seed: int, number: int) -> np.ndarray:
        plan = EpochPlan(1000, 10, seed)
        return np.concatenate([plan.batch(number * 100 + step) for step in range(100)])

    assert np.array_equal(epoch(0, 0), epoch(0, 0))
    pairs = []
    for order in (epoch(0, 0), epoch(0, 1), epoch(1, 0)):
        pairs.append(set(zip(order[:-1].tolist(), order[1:].tolist(), strict=True)))
    assert max(len(pairs[0] & pairs[1]), len(pairs[0] & pairs[2])) < 10  # one is expected by chance


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (2, 6), (3, 4), (4, 1), (12, 2)])
def test_ranks_and_micro_batches_cut_the_global_batch_without_changing_it(ranks: int, micro: int | None) -> None:
    size, passes = slices(24, ranks, micro)
    batch = EpochPlan(100, 24).batch(2)
    parts = [batch[(r * passes + m) * size :][:size] for r in range(ranks) for m in range(passes)]
    assert np.array_equal(np.concatenate(parts), batch)


def test_a_batch_that_does_not_divide_names_what_would() -> None:
    with pytest.raises(
        ValueError, match=r"10 images cannot be shared equally by 3 ranks. Use 9 images, or one of \[1, 2, 5\]"
    ):
        slices(10, 3, None)
    with pytest.raises(ValueError, match=r"train.micro_batch: 4 .*Use one of \[1, 2, 3, 6\]"):
        slices(12, 2, 4)


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (8, 4), (1, 4), (5, 1)])
def test_evaluation_covers_each_sample_once_in_batches_of_one_size(samples: int, batch: int) -> None:
    plan = evaluation_batches(samples, batch)
    assert all(len(numbers) == batch for numbers, _ in plan)
    assert np.concatenate([numbers[valid] for numbers, valid in plan]).tolist() == list(range(samples))


def test_uniform_rows_do_not_depend_on_which_rows_are_asked_for() -> None:
    table = uniform_at((3, 5, "mask"), np.arange(1000), 7)
    assert np.array_equal(uniform_at((3, 5, "mask"), np.array([900, 2]), 7), table[[900, 2]])
    assert not np.array_equal(uniform_at((3, 6, "mask"), np.arange(1000), 7), table)
    assert not np.array_equal(uniform_at((3, 5, "crop"), np.arange(1000), 7), table)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    table = uniform_at((0, 0, "test"), np.arange(50_000), 4)
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert table.min() >= 0
    assert table.max() < 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-squared with 99 degrees: far above its 99.99 % point
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(table[:-1, 0], table[1:, 0])[0, 1]) < 0.02
    assert generator(1, "a").random() != generator(1, "b").random()
