"""Rankings with any number of right answers: mAP, R-precision, nDCG, CMC, recall and MAR@K, in one pass.

    positions = positive_positions(queries, gallery, relevant)     # where every right answer stands
    positions.average_precision().mean(), positions.recall(10).mean()

The tie rule of `eval.metrics.ranking` holds for every right answer by itself: items within the tolerance of its
score stand in random order, and each number is its expectation over that order, in closed form. Only the right
answers' positions are kept, so memory is one chunk of score rows however many queries there are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor
from eval.metrics.ranking import Ranks, hit_probability, tie_bounds
from eval.metrics.retrieval import in_working_precision

Score = Callable[[Tensor, Tensor], Tensor]

# Scores held at once: 32 MB of float32.
_CELLS = 8_000_000


class PositivePositions(NamedTuple):
    """Of every right answer p of every query: what stands above it and beside it."""

    query: Tensor  # (P,) int64, ascending
    gain: Tensor  # (P,) float64, 1 where relevance is yes or no
    above: Tensor  # (P,) int64: items of the gallery that score higher
    beside: Tensor  # (P,) int64: items that tie with it, itself included
    right_above: Tensor  # (P,) int64: right answers among `above`
    right_beside: Tensor  # (P,) int64: right answers among `beside`
    num_queries: int
    gallery_size: int  # the largest gallery of a query

    @property
    def num_right(self) -> Tensor:
        """(Q,) right answers of each query."""
        return torch.bincount(self.query, minlength=self.num_queries)

    def answered(self, values: Tensor) -> Tensor:
        """Of values (Q,), those of queries that have a right answer: the others measure nothing."""
        return values[self.num_right > 0]

    def recall(self, k: int) -> Tensor:
        """(Q,) the share of a query's right answers among its first k; 0 for a query without any.

        Averaged over queries this is true recall@K, and for K = 10 the MAR@10 of product search.

        Source: CLIP_benchmark 1.6.1, metrics/zeroshot_retrieval.py, `recall_at_k` before it is made a hit rate.
        Differs: no text in reach defines the eProduct challenge's MAR@10; macro-averaged recall@10 is taken.
        """
        return self._sum(self._among_first(_checked(k))) / self.num_right.clamp(min=1)

    def hit(self, k: int) -> Tensor:
        """(Q,) probability that any right answer is among the first k: the CMC curve at rank k once averaged."""
        return hit_probability(self.first(), k)

    def precision(self, k: int) -> Tensor:
        """(Q,) right answers among the first k, divided by k."""
        return self._sum(self._among_first(_checked(k))) / k

    def r_precision(self) -> Tensor:
        """(Q,) right answers among the first R of a query with R right answers, divided by R."""
        return self._sum(self._among_first(self.num_right[self.query])) / self.num_right.clamp(min=1)

    def average_precision(self, k: int | None = None) -> Tensor:
        """(Q,) mean over right answers of the precision at their positions.

        Args:
            k: only positions up to k count, and the sum is divided by min(k, right answers), as in CIRCO.

        Source: McSherry and Najork 2008, "Computing Information Retrieval Performance Measures Efficiently in the
        Presence of Tied Scores", section 2 (the expectation over the order of ties).
        """
        n, c = self.beside.double(), self.above.double()
        # Of the tie's n places each is as likely. At place i there are, besides it, (i-1)(r-1)/(n-1) others before.
        others = torch.where(n > 1, (self.right_beside - 1) / (n - 1).clamp(min=1), 0.0)
        places = n if k is None else (_checked(k) - c).clamp(min=0).minimum(n)
        harmonic = torch.digamma(c + places + 1) - torch.digamma(c + 1)
        expected = (others * places + (self.right_above + 1 - others - others * c) * harmonic) / n
        return self._sum(expected) / (self.num_right if k is None else self.num_right.clamp(max=k)).clamp(min=1)

    def ndcg(self, k: int | None = None) -> Tensor:
        """(Q,) discounted gain of the first k (default all) over that of the best order; gain / log2(1 + position).

        Source: Järvelin and Kekäläinen 2002; the same values as scikit-learn's `ndcg_score`.
        """
        deepest = int((self.above + self.beside).max()) if len(self.query) else 0
        cut = deepest if k is None else _checked(k)
        size = max(deepest, cut, int(self.num_right.max()) if self.num_queries else 0)
        discount = torch.log2(torch.arange(2, size + 2, dtype=torch.float64)).reciprocal()
        upto = torch.cat([discount.new_zeros(1), discount.cumsum(0)])
        first, last = self.above.clamp(max=cut), (self.above + self.beside).clamp(max=cut)
        reached = self._sum(self.gain * (upto[last] - upto[first]) / self.beside)
        place = torch.arange(len(self.query)) - (self.num_right.cumsum(0) - self.num_right)[self.query]
        # Gains of a query in falling order: the best order there is.
        by_gain = self.gain[torch.argsort(self.gain, descending=True, stable=True)]
        of_query = self.query[torch.argsort(self.gain, descending=True, stable=True)]
        ideal_gain = by_gain[torch.argsort(of_query, stable=True)]
        best = self._sum(torch.where(place < cut, ideal_gain * discount[place.clamp(max=size - 1)], 0.0))
        return torch.where(best > 0, reached / best.clamp(min=1e-300), 0.0)

    def first(self) -> Ranks:
        """Of every query where its first right answer stands, as `eval.metrics.retrieval` gives it."""
        far = torch.full((self.num_queries,), self.gallery_size)
        above = far.scatter_reduce(0, self.query, self.above, "amin")
        chosen = self.above == above[self.query]
        wrong, own = torch.zeros_like(far), torch.zeros_like(far)
        wrong[self.query[chosen]] = (self.beside - self.right_beside)[chosen]
        own[self.query[chosen]] = self.right_beside[chosen]
        return Ranks(above, wrong, own)

    def _among_first(self, k: int | Tensor) -> Tensor:
        return ((k - self.above).double() / self.beside).clamp(0, 1)

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros(self.num_queries, dtype=torch.float64).index_add_(0, self.query, values.double())


@torch.no_grad()
def positive_positions(
    queries: Array,
    gallery: Array,
    relevant: Sequence[Array],
    *,
    ignored: Sequence[Array] | None = None,
    gains: Sequence[Array] | None = None,
    score: Score | None = None,
    rows: int | None = None,
) -> PositivePositions:
    """Where the right answers of every query stand in its gallery.

    Args:
        queries: (Q,D) features.
        gallery: (N,D) features.
        relevant: of each query, the gallery rows that are right, int64; may be computed when asked for.
        ignored: of each query, gallery rows that are as good as absent (the query itself).
        gains: of each query, how right each of `relevant` is, > 0; default 1.
        score: scores (q,N) of a chunk of queries; default the inner product.
        rows: queries scored at once; changes memory and speed, not the result.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, a row out of range, right and ignored.
    """
    queries, gallery = as_tensor(queries), as_tensor(gallery)
    _check(queries, gallery, relevant, ignored)
    rows = rows or max(1, _CELLS // len(gallery))
    if score is None:
        queries, gallery = in_working_precision(queries, gallery)
    parts: list[tuple[Tensor, ...]] = []
    largest = 0
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        scores = (chunk @ gallery.T if score is None else score(chunk, gallery)).cpu()
        for row, line in enumerate(scores):
            of = start + row
            own = _rows(relevant[of], len(gallery), of)
            if ignored is not None and len(ignored[of]):
                absent = torch.zeros(len(gallery), dtype=torch.bool)
                absent[_rows(ignored[of], len(gallery), of)] = True
                if absent[own].any():
                    raise ValueError(f"Query {of}: a gallery row is both right and ignored.")
                size = len(gallery) - int(absent.sum())
                order = line[~absent].sort().values
            else:
                size, order = len(gallery), line.sort().values
            largest = max(largest, size)
            gain = torch.ones(len(own)) if gains is None else as_tensor(gains[of])
            if gain.shape != own.shape or (gain <= 0).any():
                raise ValueError(f"Query {of}: {len(own)} right answers need as many gains above 0.")
            parts.append((torch.full_like(own, of), gain.double(), *_counts(order, line[own])))
    query, gain, above, beside, right_above, right_beside = (torch.cat(one) for one in zip(*parts, strict=True))
    return PositivePositions(query, gain, above, beside, right_above, right_beside, len(queries), largest)


class SameLabel(Sequence[Tensor]):
    """Of each query (Q,) label, the rows of the gallery (N,) with that label, optionally without the query's own."""

    def __init__(self, queries: Tensor, gallery: Tensor, but: Sequence[int] | None = None) -> None:
        self.queries, self.gallery, self.but = queries, gallery, but

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, row: int) -> Tensor:  # type: ignore[override]  # no slices
        found = (self.gallery == self.queries[row]).nonzero().flatten()
        return found if self.but is None else found[found != self.but[row]]


def _counts(order: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Above, beside, right above, right beside of scores `own` in the ascending scores `order` of the gallery."""
    low, high = tie_bounds(own)
    right = own.sort().values

    def between(values: Tensor) -> tuple[Tensor, Tensor]:
        above = len(values) - torch.searchsorted(values, high, right=True)
        return above, len(values) - torch.searchsorted(values, low) - above

    return (*between(order), *between(right))


def _rows(rows: Array, size: int, query: int) -> Tensor:
    rows = as_tensor(rows)
    if len(rows) and (rows.is_floating_point() or rows.min() < 0 or rows.max() >= size):
        raise ValueError(f"Query {query} names gallery rows outside 0 to {size - 1}.")
    return rows.long()


def _checked(k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    return k


def _check(queries: Tensor, gallery: Tensor, relevant: Sequence[Array], ignored: Sequence[Array] | None) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries are {tuple(queries.shape)}, gallery {tuple(gallery.shape)}; expected (Q,D), (N,D).")
    if not len(queries) or not len(gallery):
        raise ValueError(f"{len(queries)} queries, {len(gallery)} gallery items; expected at least 1 of each.")
    if len(relevant) != len(queries) or (ignored is not None and len(ignored) != len(queries)):
        raise ValueError(f"{len(queries)} queries, right answers of {len(relevant)}; expected one list for each.")
    for name, features in (("query", queries), ("gallery", gallery)):
        if not features.isfinite().all():
            raise ValueError(f"{name} features are not finite: {int((~features.isfinite()).any(1).sum())} rows.")
