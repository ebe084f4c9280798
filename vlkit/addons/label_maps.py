"""Maps from the S classes a model knows to C others, as matrices (C,S) that logits (B,S) are multiplied with.

logits @ nearest_map(likeness, k=5).T        # (B,C)
"""

import torch
from torch import Tensor

from vlkit.errors import ConfigError

TEMPERATURE = 0.05


def nearest_map(likeness: Tensor, k: int, temperature: float = TEMPERATURE) -> Tensor:
    """Each class is a mixture of its k nearest sources, weighted by softmax(likeness / temperature).

    Args:
        likeness: (C,S).
        k: sources a class; all where there are fewer.
        temperature: of the softmax.
    """
    best = likeness.topk(min(k, likeness.shape[1]), dim=1)
    return torch.zeros_like(likeness).scatter(1, best.indices, (best.values / temperature).softmax(1))


def matched_map(likeness: Tensor) -> Tensor:
    """One source a class, no source twice, with the largest sum of likeness.

    Args:
        likeness: (C,S), C at most S.

    Raises:
        ConfigError: more classes than sources.

    Source: Kuhn 1955, "The Hungarian method for the assignment problem", with shortest augmenting paths (Jonker and
    Volgenant 1987); O(C^2 S).
    """
    num_classes, num_sources = likeness.shape
    _require_enough(num_classes, num_sources)
    costs = (-likeness.double()).tolist()
    # Potentials of rows and columns; row_of[s] is the class that source s serves. Column 0 is where a path begins.
    of_row, of_column = [0.0] * (num_classes + 1), [0.0] * (num_sources + 1)
    row_of = [0] * (num_sources + 1)
    for row in range(1, num_classes + 1):
        _augment(costs, row, of_row, of_column, row_of)
    table = torch.zeros_like(likeness)
    for column in range(1, num_sources + 1):
        if row_of[column]:
            table[row_of[column] - 1, column - 1] = 1
    return table


def frequency_map(predicted: Tensor, labels: Tensor, num_classes: int, num_sources: int) -> Tensor:
    """One source a class, by counts: the largest entry first, whose class and source are then taken.

    Args:
        predicted: (n,) the source that the model says of each image.
        labels: (n,) its class.
        num_classes: C, at most S.
        num_sources: S.

    Raises:
        ConfigError: more classes than sources.

    Source: Chen et al. 2023, arXiv:2211.11635, and the authors' code; classes whose counts are used up take the first
    free source, as there.
    """
    _require_enough(num_classes, num_sources)
    counts = torch.zeros(num_classes, num_sources)
    counts.index_put_((labels, predicted), torch.ones(len(labels)), accumulate=True)
    table = torch.zeros_like(counts)
    for _ in range(num_classes):
        place = int(counts.argmax())
        row, column = divmod(place, num_sources)
        table[row, column] = 1
        counts[row], counts[:, column] = -1, -1
    return table


def random_map(num_classes: int, num_sources: int, seed: int) -> Tensor:
    """One source a class, drawn by seed.

    Raises:
        ConfigError: more classes than sources.
    """
    _require_enough(num_classes, num_sources)
    order = torch.randperm(num_sources, generator=torch.Generator().manual_seed(seed))
    return torch.eye(num_sources)[order[:num_classes]]


def _augment(
    costs: list[list[float]], row: int, of_row: list[float], of_column: list[float], row_of: list[int]
) -> None:
    """Give one more row a column, along the cheapest path of exchanges."""
    size = len(of_column)
    distance, before, done = [float("inf")] * size, [0] * size, [False] * size
    row_of[0], column = row, 0
    while True:
        done[column] = True
        current, step, following = row_of[column], float("inf"), 0
        for other in range(1, size):
            if done[other]:
                continue
            reduced = costs[current - 1][other - 1] - of_row[current] - of_column[other]
            if reduced < distance[other]:
                distance[other], before[other] = reduced, column
            if distance[other] < step:
                step, following = distance[other], other
        for other in range(size):
            if done[other]:
                of_row[row_of[other]] += step
                of_column[other] -= step
            else:
                distance[other] -= step
        column = following
        if row_of[column] == 0:
            break
    while column:
        row_of[column] = row_of[before[column]]
        column = before[column]


def _require_enough(num_classes: int, num_sources: int) -> None:
    if num_classes > num_sources:
        raise ConfigError(
            f"{num_classes} classes cannot each have a source of their own: there are {num_sources}. Map each class to "
            "several instead (semap: mapping=many)."
        )
