"""Bootstrap intervals against the normal approximation, slow loops and their own invariances."""

import numpy as np
import pytest
import torch

import eval.metrics.bootstrap as bootstrap
from eval.metrics import bootstrap_interval


def coin_flips(num_items: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(num_items, generator=torch.Generator().manual_seed(seed)) < 0.3).double()


def test_close_to_the_normal_interval() -> None:
    values = coin_flips(2000)
    mean, deviation = values.mean(), values.std() / 2000**0.5
    low, high = bootstrap_interval(values, num_resamples=4000)
    assert low.item() == pytest.approx((mean - 1.96 * deviation).item(), abs=2e-3)
    assert high.item() == pytest.approx((mean + 1.96 * deviation).item(), abs=2e-3)


def test_the_seed_decides_and_the_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = coin_flips(300)
    first = bootstrap_interval(values, seed=3)
    monkeypatch.setattr(bootstrap, "_CHUNK", 7 * 300)
    assert torch.equal(first, bootstrap_interval(values, seed=3))
    assert not torch.equal(first, bootstrap_interval(values, seed=4))


def test_columns_are_paired() -> None:
    one = coin_flips(400)
    both = bootstrap_interval(torch.stack([one, one + 0.25], dim=1))
    assert torch.allclose(both[:, 0] + 0.25, both[:, 1])
    difference = bootstrap_interval((one + 0.25) - one)
    assert difference.tolist() == pytest.approx([0.25, 0.25])


def test_units_and_groups_equal_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(60, generator=generator).double()
    units = torch.randint(0, 20, (60,), generator=generator) * 5  # numbers with gaps
    groups = torch.randint(0, 4, (60,), generator=generator)
    names = units.unique().tolist()
    draws = np.random.Generator(np.random.Philox(0)).integers(0, len(names), (50, len(names)))
    statistics = []
    for draw in draws:
        rows = [row for unit in draw for row in range(60) if units[row] == names[unit]]
        means = [values[[r for r in rows if groups[r] == g]].mean().item() for g in range(4) if g in groups[rows]]
        statistics.append(sum(means) / len(means))
    expected = np.quantile(statistics, [0.025, 0.975])
    measured = bootstrap_interval(values, units=units, groups=groups, num_resamples=50)
    assert measured.tolist() == pytest.approx(expected.tolist())


def test_units_that_move_together_widen_the_interval() -> None:
    values = coin_flips(200).repeat_interleave(5)
    alone = bootstrap_interval(values)
    together = bootstrap_interval(values, units=torch.arange(1000) // 5)
    assert (together[1] - together[0]) > 1.8 * (alone[1] - alone[0])


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="No items"):
        bootstrap_interval(torch.zeros(0))
