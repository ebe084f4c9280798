"""The order of samples: exact epochs, equal batches, and nothing to save but a step number."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlkit.data.epoch_plan import PADDING, EpochPlan
from vlkit.errors import ConfigError, DataError

EIGHT_UNEVEN = np.cumsum([0, 3, 101, 1, 64, 0, 17, 250, 76])  # 512 samples


def whole_epoch(plan: EpochPlan, epoch: int) -> list[int]:
    return np.concatenate([plan.batch(epoch, index) for index in range(plan.num_batches)]).tolist()


def test_an_epoch_over_uneven_shards_holds_each_sample_once() -> None:
    plan = EpochPlan(EIGHT_UNEVEN, seed=0, global_batch_size=32)
    for epoch in range(3):
        assert sorted(whole_epoch(plan, epoch)) == list(range(512))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return whole_epoch(EpochPlan(EIGHT_UNEVEN, seed=seed, global_batch_size=32), epoch)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_order_is_frozen() -> None:
    """A change here would make old runs resume with other data."""
    plan = EpochPlan([0, 5, 5, 12], seed=1, global_batch_size=4, window=6)
    assert whole_epoch(plan, 0) == [5, 7, 6, 8, 10, 9, 11, 0, 1, 4, 2, 3]


def test_without_shuffle_the_order_is_that_of_the_shards() -> None:
    plan = EpochPlan([0, 5, 5, 12], seed=1, global_batch_size=4, shuffle=False)
    assert whole_epoch(plan, 0) == whole_epoch(plan, 7) == list(range(12))


def test_samples_are_mixed_across_shards_within_a_window_and_not_beyond() -> None:
    offsets = np.arange(0, 1001, 10)  # 100 shards of 10
    plan = EpochPlan(offsets, seed=0, global_batch_size=10, window=100)
    shards_of_batch = [len(set(plan.batch(0, index) // 10)) for index in range(100)]
    assert np.mean(shards_of_batch) > 5  # a batch of 10 draws on many of its window's 10 shards
    for window in range(10):
        ids = np.concatenate([plan.batch(0, index) for index in range(window * 10, window * 10 + 10)])
        assert len(set(ids // 10)) == 10  # reading stays within 10 shards at a time


def test_drop_leaves_out_other_samples_each_epoch() -> None:
    plan = EpochPlan([0, 107], seed=0, global_batch_size=25)
    assert (plan.num_batches, plan.num_dropped, plan.num_padding) == (4, 7, 0)
    left_out = [frozenset(range(107)) - set(whole_epoch(plan, epoch)) for epoch in range(20)]
    assert all(len(missing) == 7 for missing in left_out)
    assert len(frozenset.union(*left_out)) > 50


def test_keep_fills_the_last_batch_with_padding() -> None:
    plan = EpochPlan([0, 107], seed=0, global_batch_size=25, remainder="keep")
    assert (plan.num_batches, plan.num_dropped, plan.num_padding) == (5, 0, 18)
    ids = whole_epoch(plan, 0)
    assert len(ids) == 125 and ids.count(PADDING) == 18 and ids[-18:] == [PADDING] * 18
    assert sorted(set(ids) - {PADDING}) == list(range(107))


def test_keep_without_a_remainder_adds_nothing() -> None:
    plan = EpochPlan([0, 100], seed=0, global_batch_size=25, remainder="keep")
    assert (plan.num_batches, plan.num_padding) == (4, 0)


@pytest.mark.parametrize("remainder", ["drop", "keep"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_hold_the_same_global_batches(world_size: int, remainder: str) -> None:
    alone = EpochPlan(EIGHT_UNEVEN, seed=3, global_batch_size=60, remainder=remainder)  # type: ignore[arg-type]
    ranks = [
        EpochPlan(
            EIGHT_UNEVEN,
            seed=3,
            global_batch_size=60,
            rank=rank,
            world_size=world_size,
            remainder=remainder,  # type: ignore[arg-type]
        )
        for rank in range(world_size)
    ]
    assert {plan.num_batches for plan in ranks} == {alone.num_batches}
    for index in range(alone.num_batches):
        parts = [plan.batch(2, index) for plan in ranks]
        assert {len(part) for part in parts} == {60 // world_size}
        assert np.array_equal(np.concatenate(parts), alone.batch(2, index))


def test_a_batch_can_be_asked_for_directly() -> None:
    """Resuming: a new plan, asked for one batch first, gives what the old one gave after all others."""
    plan = EpochPlan(EIGHT_UNEVEN, seed=3, global_batch_size=60, window=70)
    steps = [plan.position(step) for step in range(3 * plan.num_batches)]
    seen = [plan.batch(*position) for position in steps]
    for step in (20, 3, 11, 23):
        fresh = EpochPlan(EIGHT_UNEVEN, seed=3, global_batch_size=60, window=70)
        assert np.array_equal(fresh.batch(*fresh.position(step)), seen[step])


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    batch=st.integers(1, 9),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 5),
    window=st.integers(1, 60),
    keep=st.booleans(),
)
def test_any_layout(
    sizes: list[int], batch: int, world_size: int, seed: int, epoch: int, window: int, keep: bool
) -> None:
    """Whatever the shards, ranks, batch and window: each sample at most once, none twice, none missing but the rest."""
    total, global_batch = sum(sizes), batch * world_size
    if not keep and total < global_batch:
        return
    plans = [
        EpochPlan(
            np.cumsum([0, *sizes]),
            seed=seed,
            global_batch_size=global_batch,
            rank=rank,
            world_size=world_size,
            remainder="keep" if keep else "drop",
            window=window,
        )
        for rank in range(world_size)
    ]
    ids = [i for index in range(plans[0].num_batches) for plan in plans for i in plan.batch(epoch, index).tolist()]
    real = [i for i in ids if i != PADDING]
    assert len(real) == len(set(real)) == total - plans[0].num_dropped
    assert set(real) <= set(range(total))
    assert len(ids) - len(real) == plans[0].num_padding < global_batch
    assert plans[0].num_dropped < global_batch


def test_a_batch_that_does_not_split_over_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"256, which does not split evenly over 3 processes.*multiple of 3"):
        EpochPlan([0, 1000], seed=0, global_batch_size=256, rank=0, world_size=3)


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"hold 100 samples, fewer than one global batch of 256.*Lower the batch size"):
        EpochPlan([0, 100], seed=0, global_batch_size=256)


def test_a_mistyped_remainder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'dorp'.*Did you mean drop"):
        EpochPlan([0, 100], seed=0, global_batch_size=10, remainder="dorp")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "shards", "seconds", "megabytes"), [(12_000_000, 1242, 5, 200), (400_000_000, 10_000, 60, 500)]
)
def test_huge_sets_start_at_once(samples: int, shards: int, seconds: float, megabytes: float) -> None:
    offsets = np.linspace(0, samples, shards + 1).astype(np.int64)
    tracemalloc.start()
    started = time.perf_counter()
    plan = EpochPlan(offsets, seed=0, global_batch_size=4096, rank=3, world_size=8)
    plan.batch(0, 0)
    plan.batch(1, plan.num_batches - 1)
    elapsed = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert elapsed < seconds and peak < megabytes, (elapsed, peak)
