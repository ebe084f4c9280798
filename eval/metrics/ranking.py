"""Where the right answer of a query stands in its gallery, with one rule for ties.

Two scores tie when they differ by at most 1e-6 x max(1, |s|), s being the right answer's score. Tied items
stand in uniformly random order, and every number here is the expectation over that order:

- the rank of a single right answer is 1 + better + tied / 2: each tied competitor counts half;
- recall@K is the probability that a right answer is among the first K: a tie of two counts half at K = 1,
  and a gallery of N equal scores gives K / N, which is chance.

Without ties both are the ordinary definitions. Why a tolerance: matrix products of different shapes differ
in the last bits, so two copies of one vector rarely score exactly the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6


class Ranks(NamedTuple):
    """Of Q queries, what stands above and beside the best-scored right answer."""

    better: Tensor  # (Q,) int64: wrong answers that score above it
    tied: Tensor  # (Q,) int64: wrong answers that tie with it
    own: Tensor  # (Q,) int64: right answers in that tie, itself included; 0 when the query has none at all


def tie_bounds(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores (low, high) between which another score ties with each of `scores`; shapes as given."""
    tolerance = TIE_TOLERANCE * scores.abs().clamp(min=1.0)
    return scores - tolerance, scores + tolerance


def hit_probability(ranks: Ranks, k: int) -> Tensor:
    """The probability, over the order of tied items, that a right answer is among the first k.

    Of the tie's n = tied + own items, m = k - better (kept within 0 and n) are shown; none of them is right
    with probability C(tied, m) / C(n, m), a product of m factors.

    Args:
        ranks: of Q queries.
        k: results looked at, >= 1; it may exceed the gallery.

    Returns:
        (Q,) float64 in [0,1]; only 0 and 1 where nothing ties; 0 for a query without a right answer.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    size = (ranks.tied + ranks.own).double()
    shown = (k - ranks.better).clamp(min=0)
    miss = torch.ones_like(size)
    for drawn in range(min(k, int(shown.minimum(ranks.tied + ranks.own).max())) if len(shown) else 0):
        wrong_left, left = (ranks.tied - drawn).clamp(min=0), (size - drawn).clamp(min=1)
        miss = torch.where(shown > drawn, miss * wrong_left / left, miss)
    return torch.where(ranks.own > 0, 1 - miss, torch.zeros_like(miss))


def expected_rank(ranks: Ranks) -> Tensor:
    """The rank of the first right answer, averaged over the order of tied items.

    In a random order of t wrong and p right items, t / (p + 1) wrong ones come before the first right one.

    Returns:
        (Q,) float64, >= 1; a query without a right answer stands below its whole gallery.
    """
    return 1 + ranks.better + ranks.tied / (ranks.own.double() + 1)
