"""Logistic regression on frozen features by L-BFGS, and its strength chosen on validation data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlkit.errors import GalleryError

COARSE = tuple(10.0**power for power in (-6, -4, -2, 0, 2, 4, 6))
FINE_STEPS = 8
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier: `weight` (C,D), `bias` (C,), float64."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(N,C) float64 logits of features (N,D)."""
        return features.double() @ self.weight.T + self.bias

    def ranking_scores(self, features: Tensor) -> Tensor:
        """The logits brought to the scale of cosines.

        The order of classes is that of the logits. But with strong regularisation all logits lie within the tolerance
        of a tie, which is made for scores around 1.
        """
        longest = float((self.weight - self.weight.mean(0)).norm(dim=1).max())
        return self.scores(features) / max(longest, 1e-300)


class ChosenStrength(NamedTuple):
    """What the search found."""

    c: float
    accuracy: float  # on validation
    tried: tuple[tuple[float, float], ...]  # (C, accuracy on validation) in the order tried


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, c: float, start: LinearHead | None = None
) -> LinearHead:
    """Minimise C x (sum of cross entropies) + |W|^2 / 2 over weights and bias; the bias is not held down.

    Args:
        features: (N,D) finite.
        labels: (N,) int64 in 0..C-1.
        num_classes: C; a class without an item gets a weight that only pushes away.
        c: inverse strength of the regularisation, > 0.
        start: where to begin; the optimum is one and the same.

    Raises:
        GalleryError: features that are not finite.

    Source: the objective of scikit-learn's `LogisticRegression(solver="lbfgs", C=c)`.
    """
    if not features.isfinite().all():
        raise GalleryError(
            f"{int((~features.isfinite()).any(1).sum())} of {len(features)} features are not finite; "
            "nothing can be fitted to them. Embed the images again, or use another checkpoint."
        )
    x = features.double()
    head = start or LinearHead(x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes))
    # In units of this, weights curve the loss about as much as the bias; else, with strong regularisation, the bias
    # is left where it started and decides the order of classes wrongly.
    unit = min(1.0, math.sqrt(c * len(x)))
    weight, bias = (head.weight / unit).requires_grad_(), head.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-20,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        # Divided by C x N: the same minimum, and gradients of one size whatever C and N are.
        held_down = unit**2 * weight.square().sum() / (2 * c * len(x))
        value = cross_entropy(unit * (x @ weight.T) + bias, labels) + held_down
        value.backward()
        return value

    optimizer.step(loss)
    return LinearHead(unit * weight.detach(), bias.detach())


def choose_strength(accuracy: Callable[[float], float]) -> ChosenStrength:
    """C by a coarse grid of seven, then eight halvings of the interval around the best, in log space.

    Args:
        accuracy: of a fit with this C on validation data.

    Source: CoOp's linear probe, code commit ff61507; Radford et al. 2021, arXiv:2103.00020, appendix A.3.
    """
    tried: list[tuple[float, float]] = [(c, accuracy(c)) for c in COARSE]
    best = max(tried, key=lambda one: one[1])
    low, high = best[0] / 10, best[0] * 10
    at_low, at_high = accuracy(low), accuracy(high)
    tried += [(low, at_low), (high, at_high)]
    for _ in range(FINE_STEPS):
        middle = (low * high) ** 0.5
        at_middle = accuracy(middle)
        tried.append((middle, at_middle))
        if at_low < at_high:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    # Validation sets are small and ties frequent: of equally good ones the least extreme.
    c, found = max(tried, key=lambda one: (one[1], -abs(math.log(one[0]))))
    return ChosenStrength(c, found, tuple(tried))
