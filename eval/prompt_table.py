"""Cells of the prompt grid as a table: a row for each method and number of shots, means over seeds and data sets."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.base_to_new import harmonic_mean
from eval.metrics import bootstrap_interval
from eval.prompt_grid import ZERO_SHOT
from eval.suite_report import Overview, as_markdown

TABLE = "prompts.md"
# Hits by image, of one data set, shots, seed and test.
_Hits = dict[tuple[str, int, int, str], dict[str, float]]


class Row(NamedTuple):
    """One method with one number of shots."""

    method: str
    shots: int
    cells: int
    accuracy: Mapping[str, float | None]  # by test: base, new, all, or a data set; None where it cannot be used
    interval: Mapping[str, tuple[float, float] | None]  # 95%, over test images; seeds that tested one image go together
    gain: Mapping[str, tuple[float, float, float] | None]  # over zero-shot on the same images, and its interval
    harmonic_mean: float | None  # of the averages over seeds and sets, in base-to-new
    train_seconds: float  # mean of a cell
    cpu_seconds: float  # of the process in that time, over all threads
    steps: float
    trained: int
    text_milliseconds: float
    image_milliseconds: float
    text_for_each_image: bool


def rows_of(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows in the order in which methods first occur, by shots."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    plain: _Hits = {}
    for line in lines:
        groups.setdefault((line["method"], line["shots"]), []).append(line)
        if line["method"] == ZERO_SHOT:
            for test in line["metrics"]:
                plain[_place(line, test)] = dict(zip(line["keys"][test], line["hits"][test], strict=True))
    order = list(dict.fromkeys(method for method, _ in groups))
    return [
        _row(method, shots, groups[method, shots], plain)
        for method, shots in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    ]


def write_table(path: Path, title: str, rows: Sequence[Row], protocol: str) -> None:
    """The table as a Markdown file, with what each method gains over zero-shot."""
    tests = list(rows[0].accuracy)
    over = [f"{test} over zero-shot" for test in tests]
    head = columns(tests, protocol)
    lines = [
        [str(cell) for cell in cells(row, tests, protocol)] + [_gained(row, test) for test in tests] for row in rows
    ]
    note = (
        "Means over seeds with 95% intervals over test images; differences are between the same images of the same "
        "seeds. Seconds of a training are those of the clock and, in brackets, of the processor.\n"
    )
    path.write_text(f"# {title}\n\n{as_markdown(Overview([*head, *over], lines))}\n{note}", encoding="utf-8")


def columns(tests: Sequence[str], protocol: str) -> list[str]:
    """Of the table."""
    means = ["harmonic mean"] if protocol == "base-to-new" else []
    return ["method", "shots", *tests, *means, "train s", "steps", "trained", "text ms", "ms an image"]


def cells(row: Row, tests: Sequence[str], protocol: str) -> list[Any]:
    """Of one row."""

    def shown(test: str) -> str:
        value, interval = row.accuracy.get(test), row.interval.get(test)
        if value is None or interval is None:
            return "-"
        return f"{value:.2%} [{interval[0]:.2%}, {interval[1]:.2%}]"

    means = []
    if protocol == "base-to-new":
        means = ["-" if row.harmonic_mean is None else f"{row.harmonic_mean:.2%}"]
    per_image = f"{row.image_milliseconds:.3f}" + (" (its own weights)" if row.text_for_each_image else "")
    return [
        row.method, row.shots, *map(shown, tests), *means, f"{row.train_seconds:.1f} ({row.cpu_seconds:.1f})",
        f"{row.steps:.0f}", row.trained, f"{row.text_milliseconds:.1f}", per_image,
    ]  # fmt: skip


def _gained(row: Row, test: str) -> str:
    gain = row.gain.get(test)
    return "-" if gain is None else f"{gain[0]:+.2%} [{gain[1]:+.2%}, {gain[2]:+.2%}]"


def _place(line: Mapping[str, Any], test: str) -> tuple[str, int, int, str]:
    return line["data"], line["shots"], line["seed"], test


def _row(method: str, shots: int, lines: Sequence[Mapping[str, Any]], plain: _Hits) -> Row:
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
        gain={name: _gain(lines, name, plain) for name in tests},
        harmonic_mean=None if base is None or new is None else harmonic_mean(base, new),
        train_seconds=mean("train_seconds"),
        cpu_seconds=mean("train_cpu_seconds"),
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


def _gain(lines: Sequence[Mapping[str, Any]], name: str, plain: _Hits) -> tuple[float, float, float] | None:
    """Of a method over zero-shot; None for zero-shot itself and where it was not measured."""
    apart = []
    for line in lines:
        before = plain.get(_place(line, name))
        if line["method"] == ZERO_SHOT or before is None or line["metrics"].get(name) is None:
            return None
        hits = [hit - before[key] for key, hit in zip(line["keys"][name], line["hits"][name], strict=True)]
        apart.append({**line, "hits": {name: hits}, "metrics": {name: sum(hits) / len(hits)}})
    mean, interval = _mean(apart, name), _interval(apart, name)
    return None if mean is None or interval is None else (mean, *interval)


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
