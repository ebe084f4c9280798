"""Two results side by side: what changes from the first to the second, with paired bootstrap over the same items.

    comparison = compare_results(first, second)      # of `load_results`
    comparison.rows[0].difference, .low, .high, .p_value

Refused where the two were not measured the same way on the same items: the message shows what differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from eval.fingerprints import comparable, naming_of
from eval.metrics import paired_difference
from eval.runner import suite_results
from vlkit.errors import DataError

# Per-item columns that are a metric under another name.
_ALIASES = {"hit": ("accuracy", "hits", "pointing_accuracy")}

# Metrics are kept to 8 digits, some columns in float32.
_TOLERANCE = 1e-6


class Row(NamedTuple):
    """One metric of two results."""

    metric: str
    first: float
    second: float
    difference: float  # second - first
    low: float  # 95%, paired bootstrap
    high: float
    p_value: float  # of a permutation test, two-sided


@dataclass(frozen=True)
class Result:
    """One line of results with its table of items."""

    line: Mapping[str, Any]
    items: pa.Table

    @property
    def title(self) -> str:
        """Model, protocol and add-ons."""
        addons = self.line["protocol"].get("addons")
        return f"{self.line['model']}, {_name(self.line)}" + (f", {_addon_names(addons)}" if addons else "")


@dataclass(frozen=True)
class Comparison:
    """Two results of one protocol."""

    first: str
    second: str
    protocol: str
    rows: tuple[Row, ...]


def load_results(place: str) -> list[Result]:
    """The results of a suite's folder or of a results file; `PLACE#N` is its line N alone, counted from 1.

    Raises:
        DataError: nothing there, no such line, or a result without its table of items.
    """
    path, mark, number = place.rpartition("#")
    path = path if mark and number.isdecimal() else place
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    lines = suite_results(path)
    if path != place:
        if not 1 <= int(number) <= len(lines):
            raise DataError(f"{path} has {len(lines)} results; there is no number {number}.")
        lines = [lines[int(number) - 1]]
    return [Result(line, _items(line, folder)) for line in lines]


def pair_results(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Those that stand for the same protocol on both sides; a single one on each side is paired whatever it is.

    Raises:
        DataError: a side holds several models, or no protocol is on both sides.
    """
    for side in (first, second):
        models = sorted({str(result.line["model"]) for result in side})
        if len(models) > 1:
            listed = "; ".join(f"#{n} {result.title}" for n, result in enumerate(side, start=1))
            raise DataError(f"A side holds {len(models)} models; name one result as PLACE#N: {listed}.")
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    others = {_name(result.line): result for result in second}
    pairs = [(result, others[_name(result.line)]) for result in first if _name(result.line) in others]
    if not pairs:
        names = [", ".join(sorted(_name(result.line) for result in side)) for side in (first, second)]
        raise DataError(f"No protocol is on both sides: {names[0]} against {names[1]}.")
    return pairs


def compare_results(first: Result, second: Result, seed: int = 0) -> Comparison:
    """Paired differences of every metric that is a mean over items.

    Args:
        first, second: measured under one protocol on the same items.
        seed: of bootstrap and permutations.

    Raises:
        DataError: protocols or items differ; the message shows in what.
    """
    _require_same(first, second)
    rows = [
        Row(name, a.mean().item(), b.mean().item(), *paired_difference(a, b, units=units, seed=seed))
        for name, a, b, units in _values(first, second)
    ]
    for row in rows:
        for result, value in ((first, row.first), (second, row.second)):
            _require_own_items(result, row.metric, value)
    if not rows:
        raise DataError(f"{first.title} has no value for each item that could be compared.")
    return Comparison(first.title, second.title, _name(first.line), tuple(rows))


def _require_same(first: Result, second: Result) -> None:
    sides = [comparable(result.line) for result in (first, second)]
    if sides[0]["task"] != sides[1]["task"]:  # hardly anything else of theirs can be the same
        sides = [{key: side[key] for key in ("task", "name") if key in side} for side in sides]
    differing = [
        f"{key}: {sides[0].get(key, 'none')} against {sides[1].get(key, 'none')}"
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get(key) != sides[1].get(key)
    ]
    if differing:
        raise DataError(
            f"{first.title} and {second.title} were measured under different protocols, so their numbers cannot be "
            f"compared: {'; '.join(differing)}. Measure both under one."
        )
    keys = [naming_of(result.items) for result in (first, second)]
    if keys[0] != keys[1]:
        only = [sorted(set(keys[side]) - set(keys[1 - side])) for side in (0, 1)]
        where = ("in the first", "in the second")
        shown = [
            f"{len(rows)} only {side}" + (f" (first: {rows[0][-1]})" if rows else "")
            for rows, side in zip(only, where, strict=True)
        ]
        raise DataError(
            f"{first.title} and {second.title} are about different items: {len(keys[0])} and {len(keys[1])}, "
            f"{', '.join(shown)}. Measure both on the same data, without unreadable images."
        )
    hashes = [result.line["protocol"].get("data_hash") for result in (first, second)]
    if hashes[0] != hashes[1]:
        raise DataError(
            f"{first.title} and {second.title} are about items of the same names with other captions or labels "
            f"(data hash {hashes[0]} against {hashes[1]}). Measure both on the same data."
        )


def _values(first: Result, second: Result) -> list[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Metric, both results' values, and what is resampled as a whole."""
    found: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
    columns = [
        name for name in first.items.column_names if name.startswith("hit@") and name in second.items.column_names
    ]
    if "direction" in first.items.column_names:
        for direction in dict.fromkeys(first.items["direction"].to_pylist()):
            tables = [result.items.filter(pc.equal(result.items["direction"], direction)) for result in (first, second)]
            units = torch.from_numpy(np.unique(tables[0]["key"].to_pylist(), return_inverse=True)[1])
            found += [
                (f"{direction}/recall{name[3:]}", _tensor(tables[0], name), _tensor(tables[1], name), units)
                for name in columns
            ]
        return found
    for name in columns:
        pair = _tensor(first.items, name), _tensor(second.items, name)
        found.append((f"accuracy{name[3:]}", *pair, None))
        if name == "hit@1" and "class" in first.items.column_names:
            # Each class weighs the same: an item's weight is the inverse of its class's size.
            classes = torch.from_numpy(np.unique(first.items["class"].to_pylist(), return_inverse=True)[1])
            size = classes.bincount()
            weight = len(classes) / (len(size) * size[classes].double())
            found.append(("mean_per_class_recall", pair[0] * weight, pair[1] * weight, None))
    return found or _plain_means(first, second)


def _plain_means(first: Result, second: Result) -> list[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Columns whose mean over the items is a metric: found by their name and by the mean."""
    found: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
    for name in first.items.column_names:
        if name not in second.items.column_names or not _numeric(first.items, name):
            continue
        a, b = _tensor(first.items, name), _tensor(second.items, name)
        there = ~(a.isnan() | b.isnan())
        for metric in (name, *_ALIASES.get(name, ()), f"mean_{name}", name.replace("hit", "accuracy")):
            value = first.line["metrics"].get(metric)
            if value is not None and there.any() and abs(a[there].mean().item() - value) < _TOLERANCE:
                found.append((metric, a[there], b[there], None))
                break
    return found


def _require_own_items(result: Result, metric: str, value: float) -> None:
    # A mean over folds is none over items: folds have as many images, but not as many captions.
    stated = None if "folds" in result.line["protocol"] else result.line["metrics"].get(metric)
    if stated is not None and abs(stated - value) > _TOLERANCE:
        raise DataError(
            f"{result.title}: {metric} is {stated:g}, but its table of items gives {value:g}: another evaluation was "
            "written over it. Evaluate again with an own --per-item file for each result."
        )


def _addon_names(addons: Any) -> str:
    rows = addons if isinstance(addons, list) else [addons]
    return " + ".join(str(row.get("name", row)) if isinstance(row, dict) else str(row) for row in rows)


def _numeric(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _tensor(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(np.array(table[name].to_numpy(zero_copy_only=False), dtype=np.float64))


def _items(line: Mapping[str, Any], folder: Path) -> pa.Table:
    files = line.get("files")
    if not files:
        raise DataError(
            f"The result of {line.get('model')} was written without its table of items, so it cannot be compared item "
            "by item. Evaluate again with --per-item FILE.parquet, or with `vlkit eval suite`."
        )
    try:
        return pq.read_table(folder / files["per_item"])
    except OSError as error:
        raise DataError(f"Cannot read {folder / files['per_item']}: {error}. Run the suite again.") from error


def _name(line: Mapping[str, Any]) -> str:
    return str(line["protocol"].get("name") or f"{line['task']} {line['data']} {line['split'] or ''}".strip())
