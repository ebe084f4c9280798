"""One self-contained HTML page: for each class its most and least certain images, the unsure and the unreadable.

The page stays below 30 MB whatever the number of images: what is shown is chosen by count and bytes.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from vlkit.classify.run import Classified, Unreadable
from vlkit.data.records import Record
from vlkit.data.thumbnail import thumbnail
from vlkit.errors import DataError
from vlkit.escape import one_line

THUMBNAIL_SIDE = 112  # pixels
MAX_THUMBNAILS = 2_400
MAX_BYTES = 24_000_000
MAX_LISTED = 200  # unreadable files written out; the rest is counted


@dataclass
class _Group:
    """The images of one class that may be shown: heaps, so that memory does not grow with the folder."""

    count: int = 0
    most: list[tuple[float, int, Classified]] = field(default_factory=list)
    least: list[tuple[float, int, Classified]] = field(default_factory=list)

    def add(self, result: Classified, keep: int) -> None:
        probability = result.classes[0][1]
        self.count += 1
        _push(self.most, (probability, -self.count, result), keep)
        _push(self.least, (-probability, -self.count, result), keep)

    def shown(self) -> tuple[list[Classified], list[Classified]]:
        most = [item[2] for item in sorted(self.most, reverse=True)]
        seen = {id(result) for result in most}
        least = [item[2] for item in sorted(self.least, reverse=True) if id(item[2]) not in seen]
        return most, least


def write_report(
    path: str | Path,
    results: Iterable[Classified | Unreadable],
    *,
    class_names: tuple[str, ...],
    model: str,
    rule: str,
    min_probability: float = 0.0,
) -> None:
    """Write the page.

    Args:
        path: where the page goes; folders are made.
        results: what `classify_images` yielded; consumed once, in order.
        class_names: all classes, also those no image fell into.
        model: the model's name, as given.
        rule: how probabilities are computed.
        min_probability: the threshold below which an image is unsure.

    Raises:
        DataError: the page cannot be written.
    """
    keep = max(1, min(8, MAX_THUMBNAILS // (2 * (len(class_names) + 1))))
    groups = {name: _Group() for name in class_names}
    unsure, unreadable = _Group(), list[Unreadable]()
    for result in results:
        if isinstance(result, Unreadable):
            unreadable.append(result)
        else:
            (unsure if result.unsure else groups[result.classes[0][0]]).add(result, keep)
    budget = _Budget(MAX_BYTES)
    sections = [_section(name, group, budget) for name, group in groups.items() if group.count]
    if unsure.count:
        sections.append(_section(f"unsure (best class below {min_probability:g})", unsure, budget))
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            model=model,
            rule=rule,
            sections=sections,
            empty=[one_line(name) for name in class_names if not groups[name].count],
            total=sum(group.count for group in groups.values()) + unsure.count,
            unsure=unsure.count,
            unreadable=[(one_line(item.record.key), one_line(item.reason)) for item in unreadable[:MAX_LISTED]],
            num_unreadable=len(unreadable),
        )
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot write the report {path}: {error.strerror or error}.") from error


@dataclass
class _Budget:
    left: int

    def thumbnail(self, record: Record) -> str | None:
        if self.left <= 0:
            return None
        url = thumbnail(record.image, side=THUMBNAIL_SIDE, where=record.key)
        self.left -= len(url)
        return url


def _section(name: str, group: _Group, budget: _Budget) -> dict[str, object]:
    most, least = group.shown()
    return {
        "name": one_line(name),
        "count": group.count,
        "rows": [
            (title, [_card(result, budget) for result in results])
            for title, results in (("most certain", most), ("least certain", least))
            if results
        ],
    }


def _card(result: Classified, budget: _Budget) -> dict[str, object]:
    return {
        "path": one_line(result.record.key),
        "url": budget.thumbnail(result.record),
        "classes": [(one_line(name), f"{probability:.1%}") for name, probability in result.classes[:3]],
    }


def _push(heap: list[tuple[float, int, Classified]], item: tuple[float, int, Classified], keep: int) -> None:
    if len(heap) < keep:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def _environment() -> Environment:
    return Environment(loader=PackageLoader("vlkit.classify"), autoescape=select_autoescape(default=True))
