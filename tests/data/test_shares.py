"""Shares of groups: exact over an epoch, exact in each batch, spread evenly, and found by a formula."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlkit.data.shares import Shares, largest_remainder


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder([2, 1], 10) == [7, 3]  # 6.67 and 3.33
    assert largest_remainder([1, 1, 1], 10) == [4, 3, 3]  # ties: the first
    assert largest_remainder([0.1, 0.2, 0.7], 1000) == [100, 200, 700]
    assert largest_remainder([5.0], 7) == [7]


weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)


@given(weights=weights, batch=st.integers(1, 20), batches=st.integers(1, 60))
def test_every_batch_and_every_epoch_holds_its_share(weights: list[float], batch: int, batches: int) -> None:
    shares = Shares(weights, batch, batches)
    total = batch * batches
    for count, weight in zip(shares.per_epoch.tolist(), weights, strict=True):
        assert abs(count - total * Fraction(weight) / sum(map(Fraction, weights))) < 1
    assert shares.per_epoch.sum() == total
    before = np.array([shares.before(index) for index in range(batches + 1)])
    assert before[0].sum() == 0 and before[-1].tolist() == shares.per_epoch.tolist()
    in_batch = np.diff(before, axis=0)
    assert (in_batch.sum(1) == batch).all()
    exact = shares.per_epoch / batches
    assert (in_batch >= np.floor(exact)).all() and (in_batch <= np.ceil(exact)).all()


@pytest.mark.parametrize("batches", [1000, 1024, 997, 720_720 // 360])
def test_a_small_share_is_spread_over_the_epoch(batches: int) -> None:
    """A tenth of a sample a batch comes every ten batches or so, not all at once."""
    shares = Shares([0.1, 15.9], 16, batches)
    found = np.array([shares.before(index)[0] for index in range(batches + 1)])
    expected = shares.per_epoch[0] * np.arange(batches + 1) / batches
    assert np.abs(found - expected).max() < 4
    assert np.diff(np.flatnonzero(np.diff(found))).max() < 40


def test_a_long_epoch_is_no_longer_to_ask_for() -> None:
    shares = Shares([3, 1, 0.01], 4096, 97_656_250)  # 400 billion samples
    assert shares.before(97_656_250).tolist() == shares.per_epoch.tolist()
    halves = shares.before(97_656_250 // 2)
    assert halves.sum() == 4096 * (97_656_250 // 2)
    assert np.abs(halves - shares.per_epoch / 2).max() < 20
