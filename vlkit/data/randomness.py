"""Random numbers that depend on nothing but (seed, epoch, sample, purpose).

    generator(seed=0, epoch=3, sample_id=120_034, purpose="augment").random()

Philox is a counter-based generator: it has no state to carry along, so a sample gets the same numbers in any process,
in any order and after any restart. Making one takes 10 microseconds; reseeding torch takes ten times as long.

What is promised: for equal arguments `raw` and `permutation` give equal numbers with every version of numpy (numpy
keeps the output of its bit generators). `generator(...).random()` has been stable as well, and frozen values in the
tests would show a change.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11 (Philox4x64-10).
"""

import hashlib
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = 2**64
_FEISTEL_ROUNDS = 8
_local = threading.local()


def generator(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """A generator of its own for one purpose about one sample in one epoch.

    Args:
        seed: of the run; taken modulo 2**64.
        epoch: counted from 0.
        sample_id: position in the shard index.
        purpose: keeps the numbers for different uses apart: "augment", "captions", ...
    """
    return np.random.Generator(_philox(seed, epoch, sample_id, purpose))


def fleeting_generator(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """Gives the numbers of `generator(...)` for the same arguments, but only until it is called again in this thread.

    For the loader's inner loop: giving one generator another key takes a tenth of the time of making one.
    """
    if not hasattr(_local, "generator"):
        _local.generator = np.random.Generator(np.random.Philox())
        _local.state = _philox(0, 0, 0, "").state
    reused: np.random.Generator = _local.generator
    state: Any = _local.state
    state["state"]["key"][:] = seed % _WORD, _purpose_word(purpose)
    state["state"]["counter"][2:] = epoch, sample_id
    reused.bit_generator.state = state  # also empties the buffer of drawn numbers
    return reused


def raw(seed: int, epoch: int, sample_id: int, purpose: str, count: int, first: int = 0) -> NDArray[np.uint64]:
    """`count` 64-bit numbers of that stream, from number `first` on; those before are skipped, not drawn."""
    blocks, rest = divmod(first, 4)
    numbers: NDArray[np.uint64] = _philox(seed, epoch, sample_id, purpose, blocks).random_raw(rest + count)
    return numbers[rest:]


def permutation(seed: int, epoch: int, sample_id: int, purpose: str, count: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1: the order of `count` raw numbers.

    Numpy does not promise that its own shuffle stays the same; sorting random numbers cannot change.
    """
    return np.argsort(raw(seed, epoch, sample_id, purpose, count), kind="stable")


def scatter(places: NDArray[np.int64], counts: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where permutations put single places, without laying the permutations out.

    Args:
        places: (B,) in 0..count-1.
        counts: (B,) length of the permutation each place belongs to.
        keys: (B,) names that permutation; places of one permutation have one key.

    Returns:
        (B,) for a count and a key, all places go to 0..count-1, each exactly once.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", CT-RSA: a Feistel network on the next
        power of four, walked until it comes back into the range. The round function is the finaliser of splitmix64.
    """
    half = np.zeros(len(places), np.uint64)
    while (short := (np.uint64(1) << 2 * half) < counts.astype(np.uint64)).any():
        half += short.astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = places.astype(np.uint64)
    limit, walking = counts.astype(np.uint64), np.arange(len(places))
    while len(walking):
        left, right = out[walking] >> half[walking], out[walking] & mask[walking]
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mixed(keys[walking] + mixed(right) + np.uint64(turn)) & mask[walking])
        out[walking] = left << half[walking] | right
        walking = walking[out[walking] >= limit[walking]]
    return out.astype(np.int64)


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64-bit words scrambled one to one. Source: Steele et al. 2014, splitmix64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _philox(seed: int, epoch: int, sample_id: int, purpose: str, block: int = 0) -> np.random.Philox:
    # The lowest word counts the blocks drawn, so streams that differ in any other word never meet.
    # As arrays: numpy would turn a list that mixes small numbers with those above 2**63 into floats.
    key = np.array([seed % _WORD, _purpose_word(purpose)], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([block, 0, epoch, sample_id], dtype=np.uint64))


@cache
def _purpose_word(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
