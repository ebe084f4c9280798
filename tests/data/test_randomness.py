"""Random numbers keyed by (seed, epoch, sample, purpose)."""

import hashlib

import numpy as np
import pytest

from vlkit.data.randomness import fleeting_generator, generator, permutation, raw


def test_numbers_are_frozen() -> None:
    """A change here changes what every seed stands for: resumed runs would no longer be the same runs."""
    assert generator(0, 0, 0, "augment").random(3).tolist() == [
        0.8490034164156266,
        0.5435801707051431,
        0.45392728765298507,
    ]
    assert raw(7, 3, 120_034, "order", 3).tolist() == [12003007442170499836, 1815612517820797524, 8232863035989509134]
    assert permutation(7, 3, 0, "order", 8).tolist() == [7, 5, 6, 0, 2, 3, 1, 4]
    assert generator(2**70 - 1, 10, 10**12, "é").random() == 0.747697443646906


def test_equals_numpys_philox_with_the_documented_key_and_counter() -> None:
    """The 128-bit key and the 256-bit counter given as whole numbers, instead of as words."""
    word = int.from_bytes(hashlib.blake2b(b"augment", digest_size=8).digest(), "little")
    philox = np.random.Philox(key=5 + (word << 64), counter=(3 << 128) + (9 << 192))
    assert raw(5, 3, 9, "augment", 7).tolist() == philox.random_raw(7).tolist()


@pytest.mark.parametrize("other", [(1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")])
def test_each_argument_gives_a_stream_of_its_own(other: tuple[int, int, int, str]) -> None:
    ours, theirs = raw(0, 0, 0, "a", 5000), raw(*other, 5000)
    assert len(np.unique(np.concatenate([ours, theirs]))) == 10_000


def test_numbers_do_not_depend_on_what_was_drawn_before() -> None:
    first = generator(1, 2, 3, "x").random(5)
    generator(1, 2, 4, "x").random(1000)
    np.random.default_rng(0).random(10)
    assert np.array_equal(generator(1, 2, 3, "x").random(5), first)


def test_fleeting_generator_gives_the_same_numbers() -> None:
    for arguments in [(0, 0, 0, "augment"), (2**64 - 1, 5, 2**40, "captions"), (3, 1, 7, "augment")]:
        fleeting = fleeting_generator(*arguments)
        fresh = generator(*arguments)
        assert np.array_equal(fleeting.random(7), fresh.random(7))
        # 32-bit draws leave half a number behind, which the next call must not hand out.
        assert fleeting.integers(0, 100, dtype=np.int32) == fresh.integers(0, 100, dtype=np.int32)


def test_permutation_is_uniform_over_orders() -> None:
    counts = np.zeros((4, 4))
    for sample in range(4000):
        counts[np.arange(4), permutation(0, 0, sample, "order", 4)] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 0.03
