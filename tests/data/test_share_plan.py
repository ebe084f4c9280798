"""Mixtures, sampling with replacement and groups: exact counts, whole passes, the same on any number of ranks."""

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlkit.data.epoch_plan import Ids
from vlkit.data.share_plan import Draws, GroupDraws, ReplacementDraws, SharePlan, SourceDraws
from vlkit.errors import ConfigError


def plan_of(draws: Draws, weights: list[float], batch: int, epoch: int, rank: int = 0, world: int = 1) -> SharePlan:
    return SharePlan(
        draws,
        weights=weights,
        seed=5,
        global_batch_size=batch,
        samples_per_epoch=epoch,
        rank=rank,
        world_size=world,
    )


def stream(plan: SharePlan, epochs: int) -> Ids:
    """(batches, B) of several epochs."""
    return np.stack([plan.batch(epoch, index) for epoch in range(epochs) for index in range(plan.num_batches)])


TWO = [[0, 30, 100], [100, 104, 140]]  # 100 samples in two shards, 40 in two


def test_every_batch_holds_two_of_the_first_for_one_of_the_second() -> None:
    plan = plan_of(SourceDraws(TWO, seed=1), [2.0, 1.0], 12, 140)
    batches = stream(plan, 4)
    assert plan.num_batches == 11 and plan.per_epoch.tolist() == [88, 44]
    assert ((batches < 100).sum(1) == 8).all() and ((batches >= 100).sum(1) == 4).all()


def test_a_source_is_passed_over_whole_before_it_begins_anew() -> None:
    plan = plan_of(SourceDraws(TWO, seed=1), [2.0, 1.0], 12, 140)
    ids = stream(plan, 10)
    for members in (range(100), range(100, 140)):
        # Rows are mixed within a batch, so the samples of a pass are compared batch by batch.
        seen: Counter[int] = Counter()
        for batch in ids:
            seen.update(i for i in batch.tolist() if i in members)
            counts = [seen[i] for i in members]
            assert max(counts) - min(counts) <= 1 + (max(counts) > 1)
        assert min(counts) >= 8
    first = [i for i in ids[:11].ravel() if i >= 100]
    second = [i for i in ids[11:22].ravel() if i >= 100]
    assert first != second


layouts = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any), min_size=1, max_size=4)


@given(
    sizes=layouts,
    data=st.data(),
    batch=st.integers(2, 8),
    world=st.integers(1, 4),
    batches=st.integers(1, 12),
    replacement=st.booleans(),
)
def test_any_mixture(
    sizes: list[list[int]], data: st.DataObject, batch: int, world: int, batches: int, replacement: bool
) -> None:
    """Whatever the sources, weights, ranks: counts are as planned, passes whole, and ranks agree."""
    ends = np.cumsum([0, *map(sum, sizes)])
    offsets = [start + np.cumsum([0, *part]) for start, part in zip(ends[:-1], sizes, strict=True)]
    weights = [data.draw(st.floats(0.5, 2)) for _ in sizes]
    make = ReplacementDraws if replacement else SourceDraws
    size = batch * world
    try:
        alone = plan_of(make(offsets, seed=3), weights, size, size * batches)
    except ConfigError:
        return
    ranks = [plan_of(make(offsets, seed=3), weights, size, size * batches, rank, world) for rank in range(world)]
    ids = stream(alone, 3)
    assert np.array_equal(np.concatenate([stream(plan, 3) for plan in ranks], 1), ids)
    source = np.searchsorted(ends, ids, side="right") - 1
    for step in range(len(ids) + 1):
        found = [(source[:step] == number).sum() for number in range(len(sizes))]
        assert alone.counts(step).tolist() == found
    step = data.draw(st.integers(0, len(ids) - 1))
    fresh = plan_of(make(offsets, seed=3), weights, size, size * batches)
    assert np.array_equal(fresh.batch(*fresh.position(step)), ids[step])
    if not replacement:
        for first, last in itertools.pairwise(ends):
            times = np.bincount(ids.ravel(), minlength=ends[-1])[first:last]
            assert times.max() - times.min() <= 1


@pytest.mark.parametrize("shards", [10, 200])
def test_draws_with_replacement_are_uniform_and_of_a_fixed_size(shards: int) -> None:
    offsets = np.cumsum([0, *([3, 1] * (shards // 2))])  # uneven
    plan = SharePlan(
        ReplacementDraws([offsets], seed=2, window=500),
        weights=[1.0],
        seed=2,
        global_batch_size=50,
        samples_per_epoch=1000,
    )
    times = np.bincount(stream(plan, 200).ravel(), minlength=offsets[-1])
    expected = 200_000 / offsets[-1]
    assert len(times) == offsets[-1] and times.sum() == 200_000
    assert np.abs(times / expected - 1).max() < 0.5
    assert abs(times[offsets[:-1]].mean() / expected - 1) < 0.03  # a sample of a small shard as often as another
    assert len(set(plan.batch(0, 0).tolist())) < 50


def test_draws_with_replacement_read_few_shards_at_a_time() -> None:
    draws = ReplacementDraws([np.arange(0, 100_001, 10)], seed=2, window=2000)
    one = np.array([1])
    shards = [len(set(draws.ids(0 * one, start * one, 2000 * one) // 10)) for start in (0, 2000)]
    assert max(shards) <= 64 < len(set(draws.ids(0 * one, 0 * one, 4000 * one) // 10))


def test_groups_are_passed_over_one_sample_at_a_time() -> None:
    members = np.array([7, 3, 5, 10, 11, 12, 13, 14, 15, 20])
    draws = GroupDraws(members, np.array([0, 3, 9, 10]), seed=4)
    groups = [{3, 5, 7}, {10, 11, 12, 13, 14, 15}, {20}]
    passes = []
    for group, expected in enumerate(groups):
        for number in range(20):
            count = len(expected)
            ids = draws.ids(np.array([group]), np.array([number * count]), np.array([count])).tolist()
            assert set(ids) == expected and len(ids) == count
            passes.append(tuple(ids))
    assert len({ids for ids in passes if len(ids) == 3}) == 6  # all orders of three
    assert len({ids for ids in passes if len(ids) == 6}) > 15
    both = draws.ids(np.array([0, 1]), np.array([2, 4]), np.array([3, 4])).tolist()
    assert both == [passes[0][2], *passes[1][:2], *passes[20][4:], *passes[21][:2]]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9), batch=st.integers(1, 12), epochs=st.integers(1, 4))
def test_groups_of_equal_weight_are_balanced_in_every_batch(sizes: list[int], batch: int, epochs: int) -> None:
    starts = np.cumsum([0, *sizes])
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    draws = GroupDraws(np.arange(starts[-1]), starts, seed=0)
    plan = plan_of(draws, [1.0] * len(sizes), batch, batch * len(sizes))
    for ids in stream(plan, epochs):
        counts = np.bincount(group_of[ids], minlength=len(sizes))
        assert counts.max() - counts.min() <= 1
    times = np.bincount(stream(plan, epochs).ravel(), minlength=starts[-1])
    assert all(np.ptp(times[a:b]) <= 1 for a, b in itertools.pairwise(starts))


def test_the_order_is_frozen() -> None:
    """A change here would make old runs resume with other data."""
    plan = plan_of(SourceDraws([[0, 5], [5, 8]], seed=1), [1.0, 1.0], 4, 8)
    assert stream(plan, 2).tolist() == [[7, 5, 2, 3], [6, 6, 4, 0], [5, 1, 4, 7], [0, 7, 3, 5]]
    drawn = plan_of(ReplacementDraws([[0, 5], [5, 8]], seed=1), [1.0, 1.0], 4, 8)
    assert stream(drawn, 1).tolist() == [[7, 6, 4, 3], [5, 7, 1, 3]]


def test_what_cannot_be() -> None:
    draws = SourceDraws(TWO, seed=1)
    with pytest.raises(ConfigError, match="An epoch of 7 samples is shorter than one global batch of 8"):
        plan_of(draws, [1, 1], 8, 7)
    with pytest.raises(ConfigError, match="Group number 1 of 2 has no sample in an epoch of 16: its weight is too"):
        plan_of(draws, [1, 0.001], 8, 16)
    with pytest.raises(ConfigError, match="does not split evenly over 3 processes"):
        plan_of(draws, [1, 1], 8, 80, world=3)
    with pytest.raises(IndexError):
        plan_of(draws, [1, 1], 8, 80).batch(0, 10)


@pytest.mark.parametrize(
    ("samples", "shards", "seconds", "megabytes"),
    [(12_000_000, 1242, 5, 200), pytest.param(400_000_000, 10_000, 60, 500, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", [SourceDraws, ReplacementDraws])
def test_huge_mixtures_start_at_once(
    kind: type[SourceDraws] | type[ReplacementDraws], samples: int, shards: int, seconds: float, megabytes: float
) -> None:
    ends = [0, samples // 10, samples * 4 // 10, samples]
    offsets = [np.linspace(first, last, shards // 3 + 1).astype(np.int64) for first, last in itertools.pairwise(ends)]
    tracemalloc.start()
    started = time.perf_counter()
    plan = plan_of(kind(offsets, seed=0), [3.0, 1.0, 0.5], 4096, samples, rank=3, world=8)
    plan.batch(0, 0)
    plan.batch(3, plan.num_batches - 1)
    elapsed = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert elapsed < seconds and peak < megabytes, (elapsed, peak)
