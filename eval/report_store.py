"""Sections of a report as JSON, so that a report can be made long after the evaluation, without model or data."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eval.report import Card, Gallery, HeatMap, HeatMaps, Matrix, Picture, Query, Section, Table
from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError


def write_sections(path: str | Path, sections: Iterable[Section]) -> None:
    """Write sections, whole or not at all; pictures are left out, since a report draws them anew.

    Raises:
        DataError: it cannot be written.
    """
    target = Path(path)
    content = [_to_json(section) for section in sections if not isinstance(section, Picture)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            file.write(json.dumps(content).encode())
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error


def read_sections(path: str | Path) -> list[Section]:
    """What `write_sections` wrote.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return [_READERS[value["kind"]](value) for value in content]
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}. Run the suite again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no sections of a report ({error!r}). Remove it and run the suite again."
        ) from error


def _to_json(section: Section) -> dict[str, Any]:
    if isinstance(section, Matrix):
        # Most cells of a large matrix are empty.
        rows, columns = section.counts.nonzero(as_tuple=True)
        cells = [rows.tolist(), columns.tolist(), section.counts[rows, columns].tolist()]
        return {
            "kind": section.kind,
            "title": section.title,
            "class_names": list(section.class_names),
            "cells": cells,
            "note": section.note,
        }
    return asdict(section)


def _table(value: Mapping[str, Any]) -> Table:
    return Table(value["title"], value["columns"], value["rows"], value["note"], value["sortable"])


def _matrix(value: Mapping[str, Any]) -> Matrix:
    names = value["class_names"]
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    rows, columns, numbers = value["cells"]
    counts[rows, columns] = torch.tensor(numbers, dtype=torch.int64)
    return Matrix(value["title"], names, counts, value["note"])


def _gallery(value: Mapping[str, Any]) -> Gallery:
    queries = [Query(Card(**one["asked"]), [Card(**answer) for answer in one["answers"]]) for one in value["queries"]]
    return Gallery(value["title"], queries, value["note"])


def _heat_maps(value: Mapping[str, Any]) -> HeatMaps:
    return HeatMaps(value["title"], [HeatMap(**one) for one in value["maps"]], value["note"])


_READERS: dict[str, Callable[[Mapping[str, Any]], Section]] = {
    "table": _table,
    "matrix": _matrix,
    "gallery": _gallery,
    "heat_maps": _heat_maps,
}
