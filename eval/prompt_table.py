"""Cells of the prompt grid as a table: a row for each method and number of shots, means over seeds and data sets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from eval.base_to_new import harmonic_mean
from eval.metrics import bootstrap_interval


class Row(NamedTuple):
    """One method with one number of shots."""

    method: str
    shots: int
    cells: int
    accuracy: Mapping[str, float | None]  # by test: base, new, all, or a data set; None where it cannot be used
    interval: Mapping[str, tuple[float, float] | None]  # 95%, over test images; seeds that tested one image go together
    harmonic_mean: float | None  # of the averages over seeds and sets, in base-to-new
    train_seconds: float  # mean of a cell
    steps: float
    trained: int
    text_milliseconds: float
    image_milliseconds: float
    text_for_each_image: bool


def rows_of(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows in the order in which methods first occur, by shots."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["shots"]), []).append(line)
    order = list(dict.fromkeys(method for method, _ in groups))
    return [
        _row(method, shots, groups[method, shots])
        for method, shots in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    ]


def _row(method: str, shots: int, lines: Sequence[Mapping[str, Any]]) -> Row:
    tests = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    accuracy = {name: _mean(lines, name) for name in tests}
    base, new = accuracy.get("base"), accuracy.get("new")
    costs = [line["cost"] for line in lines]

    def mean(name: str) -> float:
        return sum(float(cost[name]) for cost in costs) / len(costs)

    return Row(
        method=method,
        shots=shots,
        cells=len(lines),
        accuracy=accuracy,
        interval={name: _interval(lines, name) for name in tests},
        harmonic_mean=None if base is None or new is None else harmonic_mean(base, new),
        train_seconds=mean("train_seconds"),
        steps=mean("steps"),
        trained=max(int(cost["trained"]) for cost in costs),
        text_milliseconds=1000 * mean("text_seconds"),
        image_milliseconds=1000 * mean("image_seconds"),
        text_for_each_image=any(cost["text_for_each_image"] for cost in costs),
    )


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over seeds in each data set, then over the sets."""
    by_set: dict[str, list[float]] = {}
    for line in lines:
        value = line["metrics"].get(name)
        if value is not None:
            by_set.setdefault(line["data"], []).append(value)
    means = [sum(values) / len(values) for values in by_set.values()]
    return sum(means) / len(means) if means else None


def _interval(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    hits, units, groups = [], [], []
    unit: dict[tuple[str, str], int] = {}
    group: dict[str, int] = {}
    for line in lines:
        if line["metrics"].get(name) is None:
            continue
        for key, hit in zip(line["keys"][name], line["hits"][name], strict=True):
            hits.append(hit)
            units.append(unit.setdefault((line["data"], key), len(unit)))
            groups.append(group.setdefault(line["data"], len(group)))
    if not hits:
        return None
    low, high = bootstrap_interval(
        torch.tensor(hits, dtype=torch.float64), units=torch.tensor(units), groups=torch.tensor(groups)
    ).tolist()
    return low, high
