"""Clusters against classes: the assignment of one to the other under which most items are right."""

import numpy as np
from numpy.typing import NDArray

from eval.metrics.arrays import Array, as_tensor


def cluster_accuracy(labels: Array, clusters: Array) -> float:
    """Share of items in the cluster that was given to their class; every cluster goes to at most one class.

    Args:
        labels: (N,) int64 classes.
        clusters: (N,) int64 clusters; as many as there are.

    Raises:
        ValueError: no item, or another number of either.

    Source: Yang et al. 2010, "Image Clustering Using Local Discriminant Models and Global Integration" (clustering
    accuracy with Kuhn's assignment).
    """
    labels, clusters = as_tensor(labels), as_tensor(clusters)
    if not len(labels) or labels.shape != clusters.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, clusters {tuple(clusters.shape)}; expected (N,) both.")
    _, rows = labels.unique(return_inverse=True)
    _, columns = clusters.unique(return_inverse=True)
    num_rows, num_columns = int(rows.max()) + 1, int(columns.max()) + 1
    shared = (rows * num_columns + columns).bincount(minlength=num_rows * num_columns).view(num_rows, num_columns)
    counts = shared.numpy().astype(np.float64)
    chosen = best_assignment(counts)
    return float(sum(counts[row, column] for row, column in chosen)) / len(labels)


def best_assignment(values: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs (row, column) with the largest sum of `values` (R,C), each row and column at most once; min(R,C) pairs.

    Source: Kuhn 1955 and Munkres 1957, by shortest augmenting paths (Jonker and Volgenant 1987); the same sum as
    SciPy's `linear_sum_assignment`.
    """
    if values.shape[0] > values.shape[1]:
        return sorted((row, column) for column, row in best_assignment(values.T))
    cost = -values
    num_rows, num_columns = cost.shape
    row_price, column_price = np.zeros(num_rows + 1), np.zeros(num_columns + 1)
    owner = np.zeros(num_columns + 1, np.int64)  # of each column, rows counted from 1; 0 is nobody
    for row in range(1, num_rows + 1):
        owner[0], column = row, 0
        distance = np.full(num_columns + 1, np.inf)
        before = np.zeros(num_columns + 1, np.int64)
        done = np.zeros(num_columns + 1, np.bool_)
        while owner[column]:
            done[column] = True
            reduced = cost[owner[column] - 1] - row_price[owner[column]] - column_price[1:]
            shorter = ~done[1:] & (reduced < distance[1:])
            distance[1:][shorter], before[1:][shorter] = reduced[shorter], column
            nearest = 1 + int(np.where(done[1:], np.inf, distance[1:]).argmin())
            step = distance[nearest]
            row_price[owner[done]] += step
            column_price[done] -= step
            distance[~done] -= step
            column = nearest
        while column:
            owner[column] = owner[before[column]]
            column = int(before[column])
    return sorted((int(owner[column]) - 1, column - 1) for column in range(1, num_columns + 1) if owner[column])
