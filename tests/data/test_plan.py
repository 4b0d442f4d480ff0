"""The order of the data is a pure function of the seed and the step."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import numbered_shards

from sslvit import rng
from sslvit.data.array_images import array_samples
from sslvit.data.header import BadImage
from sslvit.data.mixture import MixturePlan, split_by_weight
from sslvit.data.open import open_data, shard_cache
from sslvit.data.pack import pack
from sslvit.data.plan import EpochPlan, EvaluationBatches
from sslvit.data.reader import ShardReader
from sslvit.run_plan import fitting_ranks, split_batch
from sslvit.settings import DataSettings


def epoch_of(plan: EpochPlan, epoch: int) -> np.ndarray:
    """All sample numbers of one epoch, in their order."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.concatenate([plan.batch(step)[0] for step in steps])


@st.composite
def plans(draw) -> EpochPlan:
    """Any shard sizes, batch, number of lanes and window."""
    shards = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    lanes = draw(st.sampled_from([None, 1, 2, 3, 4]))
    batch = (lanes or 1) * draw(st.integers(1, 12))
    if batch > sum(shards):
        batch = lanes = 1
    return EpochPlan(shards, batch, draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 5)))


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(0, 3))
def test_an_epoch_reads_each_sample_at_most_once_and_drops_exactly_the_remainder(plan: EpochPlan, epoch: int) -> None:
    seen = epoch_of(plan, epoch).tolist()
    assert len(set(seen)) == len(seen) == plan.samples - plan.samples % plan.global_batch_size
    assert plan.dropped_per_epoch == plan.samples % plan.global_batch_size
    assert set(seen) <= set(range(plan.samples))


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_any_rows_of_any_step_can_be_had_without_the_others(plan: EpochPlan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    start = data.draw(st.integers(0, plan.global_batch_size - 1))
    stop = data.draw(st.integers(start + 1, plan.global_batch_size))
    fresh = EpochPlan(
        plan.shard_samples, plan.global_batch_size, plan.seed, None if plan.is_whole else plan.lanes,
        plan.window // -(-plan.samples // len(plan.shard_samples)),
    )  # fmt: skip
    whole, epochs = plan.batch(step)
    assert np.array_equal(fresh.batch(step, start, stop)[0], whole[start:stop])
    assert (epochs == step // plan.steps_per_epoch).all()
    shard_of = np.searchsorted(plan.first_of_shard, whole[start:stop], side="right") - 1
    near = fresh.shards_near(step, start, stop)
    assert set(shard_of.tolist()) <= set(near)
    assert len(near) <= fresh.shards_at_once(start, stop)


def test_more_samples_in_a_batch_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="Set it to 7 or less"):
        EpochPlan([3, 4], 8)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_odd_counts_over_ranks_and_workers(ranks: int, workers: int) -> None:
    """10,003 samples in 7 shards: every row of every batch is made once, by one worker of one rank."""
    sizes, batch = [1429, 1429, 1429, 1429, 1429, 1429, 1429], 96
    assert sum(sizes) == 10_003
    rank_plans = [[EpochPlan(sizes, batch, 5, lanes=4) for _ in range(workers)] for _ in range(ranks)]
    steps = rank_plans[0][0].steps_per_epoch
    share = batch // ranks
    seen: list[int] = []
    for step in range(steps):
        whole = EpochPlan(sizes, batch, 5, lanes=4).batch(step)[0] if step % 20 == 0 else None
        rows = [
            rank_plans[rank][step % workers].batch(step, rank * share, (rank + 1) * share)[0] for rank in range(ranks)
        ]
        assert whole is None or np.array_equal(np.concatenate(rows), whole)
        seen += np.concatenate(rows).tolist()
    assert len(seen) == len(set(seen)) == 10_003 - 10_003 % batch


def test_settings_of_the_data_reach_what_reads_it(tmp_path: Path) -> None:
    dark = numbered_shards(tmp_path / "a", 40)
    bright = numbered_shards(tmp_path / "b", 40, first=200)
    assert shard_cache(DataSettings(cache=str(tmp_path / "c"), cache_gb=2.5)).room.limit == 2.5 * 2**30
    reader = ShardReader(dark, 1, 0, max_pixels=63)
    with pytest.raises(BadImage, match="8 x 8 pixels, more than 63"):
        reader.header(reader.read(0))
    images = np.zeros((300, 60, 60), np.uint8)  # 1.03 MB, three times that in color
    large = pack(array_samples(images), tmp_path / "large", workers=1)
    kept = {
        (channels, limit): ShardReader(large, channels, limit).decoded for channels in (1, 3) for limit in (1, 2, 4)
    }
    assert {key for key, decoded in kept.items() if decoded is not None} == {(1, 2), (1, 4), (3, 4)}
    mixture = {str(tmp_path / "a"): 3, str(tmp_path / "b"): 1}
    joined, _ = open_data(DataSettings(mixture=mixture, global_batch_size=8), 0)
    assert joined.mean[0] == pytest.approx(0.75 * dark.mean[0] + 0.25 * bright.mean[0], abs=1e-4)
    fitted = DataSettings(shards=str(tmp_path / "a"), global_batch_size=4096, fit_batch=True)
    batches = {ranks: open_data(fitted, 0, ranks)[1].global_batch_size for ranks in (1, 3)}
    assert batches[3] % 3 == 0
    assert batches[1] in (8, 16)


def test_what_the_order_depends_on() -> None:
    """Of the whole permutation: on seed and epoch, not on how the samples lie in shards."""
    orders = {key: epoch_of(EpochPlan([60], 6, key[0]), key[1]).tolist() for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert all(sorted(order) == list(range(60)) for order in orders.values())
    assert epoch_of(EpochPlan([10] * 6, 6, 1), 1).tolist() == orders[1, 1]
    assert epoch_of(EpochPlan([60], 12, 1), 1).tolist() == orders[1, 1]


def test_what_the_shuffle_of_a_window_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On seed, epoch, lane and window; and each window holds its own part of the ring, shuffled."""
    plan, other = (EpochPlan([8] * 40, 8, seed, lanes=4, window_shards=2) for seed in (3, 4))
    for each in (plan, other):
        ring = np.arange(40), np.arange(41) * 8, 0  # shards in their order, so that only the shuffle is seen
        monkeypatch.setattr(each, "_ring_of", lambda epoch, ring=ring: ring)

    def shuffled(plan: EpochPlan, epoch: int, lane: int, window: int) -> tuple[int, ...]:
        begin, order = plan._window_order(epoch, lane, window)
        start = lane * plan.lane_length + begin
        assert sorted(order.tolist()) == list(range(start, start + len(order)))
        return tuple((order - start).tolist())

    wanted = [(plan, 0, 1, 2), (plan, 1, 1, 2), (plan, 0, 2, 2), (plan, 0, 1, 3), (other, 0, 1, 2)]
    found = {shuffled(*about) for about in wanted}
    assert {len(order) for order in found} == {16}
    assert len(found) == len(wanted)
    assert tuple(range(16)) not in found


def test_what_the_ring_of_shards_depends_on() -> None:
    def rings(seed: int) -> list[tuple]:
        plan = EpochPlan([5] * 30, 10, seed, lanes=2)
        found = [plan._ring_of(epoch) for epoch in (0, 5)]
        assert all(sorted(shards.tolist()) == list(range(30)) for shards, *_ in found)
        return [(tuple(shards.tolist()), turn) for shards, _, turn in found]

    found = [ring for seed in (0, 1) for ring in rings(seed)]
    assert len({shards for shards, _ in found}) == 4
    assert len({turn for _, turn in found}) > 1
    assert rings(1) == rings(1)


def test_shards_of_the_next_window_are_near_before_it_begins() -> None:
    plan = EpochPlan([20] * 24, 4, 0, lanes=2, window_shards=2)
    looked_ahead = 0
    for step in range(2 * plan.steps_per_epoch - 1):
        lane, place = 0, (step % plan.steps_per_epoch) * plan.per_lane
        window = int(plan._window_of(lane, place))
        is_last = plan._window_range(lane, window)[1] >= plan.lane_length
        ahead = step + plan.window // plan.per_lane if not is_last else None
        if ahead is not None and ahead < (step // plan.steps_per_epoch + 1) * plan.steps_per_epoch:
            later = plan.batch(ahead, 0, plan.per_lane)[0] // 20
            assert set(later.tolist()) <= set(plan.shards_near(step, 0, plan.per_lane))
            looked_ahead += 1
    assert looked_ahead > plan.steps_per_epoch


def test_settings_of_the_order_reach_the_plan(tmp_path: Path) -> None:
    numbered_shards(tmp_path / "a", 40, shard_mb=0.01)
    numbered_shards(tmp_path / "b", 40, shard_mb=0.01)

    def plan(seed: int = 5, **more):
        settings = DataSettings(**({"shards": str(tmp_path / "a"), "global_batch_size": 8} | more))
        return open_data(settings, seed)[1]

    assert plan().is_whole
    assert (plan(lanes=4).lanes, plan(lanes=4).seed, plan(lanes=4).global_batch_size) == (4, 5, 8)
    shards = len(plan().shard_samples)
    assert [plan(lanes=2, window_shards=n).window for n in (1, 3)] == [n * -(-40 // shards) for n in (1, 3)]
    mixed = plan(shards=None, mixture={str(tmp_path / "a"): 3, str(tmp_path / "b"): 1}, lanes=4, window_shards=2)
    assert [source.global_batch_size for source in mixed.plans] == [6, 2]
    assert [source.lanes for source in mixed.plans] == [2, 2]  # what divides the source's own rows
    assert {source.window for source in mixed.plans} == {2 * -(-40 // shards)}
    assert len({source.seed for source in mixed.plans}) == 2
    both = plan(shards=None, mixture={str(tmp_path / "a"): 1, str(tmp_path / "b"): 1})
    orders = [epoch_of(source, 0).tolist() for source in both.plans]
    assert orders[0] != orders[1]  # of as many samples
    assert plan(seed=6).seed == 6


def test_a_step_needs_no_steps_before_it() -> None:
    for lanes in (None, 4):
        walked, jumped = (EpochPlan([400, 600], 32, 7, lanes, 1) for _ in range(2))
        batches = [walked.batch(step)[0] for step in range(100)]
        for step in (99, 3, 64, 31):
            assert np.array_equal(jumped.batch(step)[0], batches[step])


@pytest.mark.parametrize("lanes", [None, 4])
def test_seeds_and_epochs_give_other_orders_and_neighbors(lanes: int | None) -> None:
    def order(seed: int, epoch: int) -> np.ndarray:
        return epoch_of(EpochPlan([50] * 100, 20, seed, lanes), epoch)

    assert np.array_equal(order(0, 0), order(0, 0))
    pairs = []
    for sequence in (order(0, 0), order(0, 1), order(1, 0)):
        pairs.append(set(zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True)))
    # by chance a pair of 5,000 repeats once; within a window of 200 samples that share shards, some 4,000/200 times
    assert max(len(pairs[0] & pairs[1]), len(pairs[0] & pairs[2])) < (10 if lanes is None else 30)


@pytest.mark.parametrize("lanes", [1, 8])
def test_samples_of_one_shard_meet_new_company_in_each_epoch(lanes: int) -> None:
    """How many of a sample's companions in its batch come from its own shard, and how many stay for the next epoch."""
    sizes, batch = [100] * 64, 64
    plan = EpochPlan(sizes, batch, 1, lanes, window_shards=4)
    companions = []
    for epoch in range(2):
        batches = epoch_of(plan, epoch).reshape(-1, batch)
        companions.append({int(sample): set(row.tolist()) for row in batches for sample in row})
        same_shard = np.mean([(row // 100 == row[0] // 100).mean() for row in batches])
        assert same_shard < (0.4 if lanes == 1 else 0.12)
    kept = np.mean([len(companions[0][s] & companions[1][s]) - 1 for s in companions[0] if s in companions[1]])
    # a full permutation keeps 63 * 63 / 6399 = 0.6 of 63 companions
    assert kept < (5 if lanes == 1 else 1.2)


def test_every_sample_is_dropped_as_often_as_others() -> None:
    """The samples that an epoch leaves out are picked by chance, not always the tails of shards."""
    plan = EpochPlan([50] * 20, 90, 0, lanes=2, window_shards=2)
    counts = np.zeros(1000)
    for epoch in range(200):
        counts[np.setdiff1d(np.arange(1000), epoch_of(plan, epoch))] += 1
    by_place = counts.reshape(20, 50).mean(0)  # by place within the shard
    assert counts.sum() == 200 * 10
    assert by_place.min() > 0.5 * by_place.mean()
    assert by_place.max() < 1.6 * by_place.mean()


def test_lanes_do_not_all_need_new_shards_at_once() -> None:
    plan = EpochPlan([100] * 64, 64, 0, lanes=16, window_shards=2)
    fresh: list[int] = []
    known = set(plan.shards_near(0))
    for step in range(1, plan.steps_per_epoch):
        near = set(plan.shards_near(step))
        fresh.append(len(near - known))
        known = near
    assert max(fresh) <= 8


def test_a_lane_touches_few_shards_at_a_time() -> None:
    plan = EpochPlan([1000] * 640, 64, 0, lanes=64, window_shards=4)
    step_shards = np.unique(plan.batch(100, 0, 1)[0] // 1000)
    per_rank = {int(s) for step in range(100, 164) for s in plan.batch(step, 0, 1)[0] // 1000}
    assert len(step_shards) == 1
    assert len(per_rank) <= 6
    assert plan.shards_at_once(0, 1) <= 12


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (2, 6), (3, 4), (4, 1), (12, 2)])
def test_ranks_and_micro_batches_cut_the_global_batch_without_changing_it(ranks: int, micro: int | None) -> None:
    size, accumulation_steps = split_batch(24, ranks, micro)
    batch = EpochPlan([100], 24).batch(2)[0]
    plan = EpochPlan([100], 24)
    starts = [(r * accumulation_steps + m) * size for r in range(ranks) for m in range(accumulation_steps)]
    assert np.array_equal(np.concatenate([plan.batch(2, start, start + size)[0] for start in starts]), batch)


def test_a_batch_that_does_not_divide_names_what_would() -> None:
    with pytest.raises(
        ValueError, match=r"10 must be a multiple of the number of ranks \(3\). Use 9 images, or one of \[1, 2, 5\]"
    ):
        split_batch(10, 3, None)
    with pytest.raises(ValueError, match=r"train.micro_batch_size: 4 .*Use one of \[1, 2, 3, 6\]"):
        split_batch(12, 2, 4)
    with pytest.raises(ValueError, match=r"data.lanes: 5 does not divide data.global_batch_size \(12\)"):
        EpochPlan([100], 12, lanes=5)
    assert fitting_ranks(4096, 20) == [1, 2, 4, 8, 16]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 7))
def test_evaluation_covers_each_sample_once_on_any_number_of_ranks(samples: int, batch: int, ranks: int) -> None:
    of_ranks = [EvaluationBatches(samples, batch, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in of_ranks}) == 1
    rows = [row for turn in zip(*of_ranks, strict=True) for row in turn]
    size = len(rows[0][0])
    assert size <= batch
    assert all(len(numbers) == size and numbers.max() < samples for numbers, _ in rows)
    needed = -(-samples // batch)
    assert -(-samples // size) == needed
    assert needed * size - samples < needed  # as few rows that repeat a sample as batches of one size can have
    assert np.concatenate([numbers[valid] for numbers, valid in rows]).tolist() == list(range(samples))


def test_batches_of_an_evaluation_are_made_when_they_are_asked_for() -> None:
    began, batches = time.process_time(), EvaluationBatches(10**9 + 1, 256, rank=3, ranks=8)
    assert len(batches) == -(-(10**9 + 1) // 2048)
    numbers, valid = batches[1000]
    assert numbers.tolist() == list(range(1000 * 2048 + 3 * 256, 1000 * 2048 + 4 * 256))
    assert valid.all()
    assert not batches[len(batches) - 1][1].any()
    assert time.process_time() - began < 0.1
    for wrong in (len(batches), -1):
        with pytest.raises(IndexError):
            batches[wrong]


def test_a_mixture_gives_each_source_its_share_of_every_batch_and_its_own_epochs() -> None:
    small, large = EpochPlan([30], 2, 1), EpochPlan([40, 60], 6, 2)
    mixture = MixturePlan([small, large])
    assert mixture.global_batch_size == 8
    assert mixture.steps_per_epoch == 130 // 8
    from_small: list[int] = []
    for step in range(15):
        samples, epochs = mixture.batch(step)
        assert (samples < 30).sum() == 2
        assert ((samples >= 30) & (samples < 130)).sum() == 6
        assert np.array_equal(samples[samples < 30], small.batch(step)[0])
        assert np.array_equal(samples[samples >= 30] - 30, large.batch(step)[0])
        parts = [mixture.batch(step, start, start + 2) for start in range(0, 8, 2)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), samples)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), epochs)
        from_small += samples[samples < 30].tolist()
    assert sorted(from_small) == list(range(30))
    assert mixture.batch(15)[1].tolist().count(1) == 2  # the small source is in its second epoch
    halves = [(mixture.batch(3, start, start + 4)[0] < 30).sum() for start in (0, 4)]
    assert halves == [1, 1]  # every rank has its share of each source
    assert set(mixture.shards_near(0)) == {0, 1, 2}


def test_shares_become_whole_rows_that_sum_to_the_batch() -> None:
    assert split_by_weight([3, 1], 64) == [48, 16]
    assert split_by_weight([1, 1, 1], 64) == [22, 21, 21]
    with pytest.raises(ValueError, match=r"less than one image of data.global_batch_size \(64\)"):
        split_by_weight([1000, 1], 64)
    with pytest.raises(ValueError, match="must all be positive"):
        split_by_weight([1, 0], 64)


def test_a_billion_samples_on_thousands_of_ranks_start_at_once() -> None:
    """100,000 shards of 10,000 samples, 4,096 ranks x 8 workers, resumed deep inside the third epoch."""
    sizes, ranks = np.full(100_000, 10_000), 4096
    batch = ranks * 16
    began = time.perf_counter()
    plan = EpochPlan(sizes, batch, 3)
    step = 2 * plan.steps_per_epoch + 9_876
    plan.batch(step, 0, 16)
    assert time.perf_counter() - began < 5
    assert plan.lanes == 64
    whole = plan.batch(step)[0]
    assert len(np.unique(whole)) == batch
    for rank in (0, 1, 2047, 4095):
        own = EpochPlan(sizes, batch, 3)
        assert np.array_equal(own.batch(step, rank * 16, rank * 16 + 16)[0], whole[rank * 16 :][:16])
        assert len(own.shards_near(step, rank * 16, rank * 16 + 16)) <= own.shards_at_once(0, 16) <= 12


def test_the_order_of_a_seed_is_pinned() -> None:
    """A change here would give every saved run another order after a resume."""
    pinned = json.loads((Path(__file__).parent / "orders.json").read_text())
    assert EpochPlan([10, 7], 5, 3).batch(4)[0].tolist() == pinned["whole"]
    assert EpochPlan([10, 7, 30], 6, 3, lanes=2, window_shards=1).batch(9)[0].tolist() == pinned["lanes"]
    assert rng.generator(1, 2, "a").integers(1000, size=4).tolist() == pinned["generator"]
    assert rng.uniform((1, 2, "a"), np.array([5]), 2)[0].tolist() == pinned["uniform"]


def test_uniform_rows_do_not_depend_on_which_rows_are_asked_for() -> None:
    table = rng.uniform((3, 5, "mask"), np.arange(1000), 7)
    assert np.array_equal(rng.uniform((3, 5, "mask"), np.array([900, 2]), 7), table[[900, 2]])
    assert not np.array_equal(rng.uniform((3, 6, "mask"), np.arange(1000), 7), table)
    assert not np.array_equal(rng.uniform((3, 5, "crop"), np.arange(1000), 7), table)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    table = rng.uniform((0, 0, "test"), np.arange(50_000), 4)
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert table.min() >= 0
    assert table.max() < 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-squared with 99 degrees: far above its 99.99 % point
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(table[:-1, 0], table[1:, 0])[0, 1]) < 0.02
    assert rng.generator(1, "a").random() != rng.generator(1, "b").random()
