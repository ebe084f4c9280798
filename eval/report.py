"""Reports: one self-contained HTML page made of sections; it loads nothing, and no text out of data runs in it.

    write_report("report.html", "What was measured", [Table(...), Matrix(...), Gallery(...), Picture(...)])

Every text is escaped by jinja2, and the page's own policy forbids scripts, so hostile captions and file names
are shown as text. The one exception is the script that sorts tables: the policy names it by its hash, and it stands
only on pages with a table that sorts.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import east_asian_width

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError
from vlkit.escape import one_line

# Sorts a table by the column that was clicked: numbers by value, the rest by letter; a second click turns it round.
_SORT = """
for (const head of document.querySelectorAll('table.sortable th')) {
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest('table').tBodies[0], column = head.cellIndex;
    const down = head.getAttribute('aria-sort') === 'descending';
    const text = row => row.cells[column].textContent.trim();
    const number = row => parseFloat(text(row));
    const rows = [...body.rows];
    const numeric = rows.every(row => text(row) === '' || !isNaN(number(row)));
    rows.sort((a, b) => numeric ? (number(a) || 0) - (number(b) || 0) : text(a).localeCompare(text(b)));
    if (!down) rows.reverse();
    for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'ascending' : 'descending');
    body.append(...rows);
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
}
"""

# A matrix with more classes is cut to those with the most mistakes: cells below 6 pixels say nothing.
MAX_CLASSES = 120


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    sortable: bool = False  # a click on a column's head sorts by it
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Picture:
    """An image file's bytes (PNG or JPEG), for instance a curve."""

    title: str
    content: bytes
    note: str = ""
    kind: str = field(default="picture", init=False)

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        media = "png" if self.content.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{media};base64," + base64.b64encode(self.content).decode("ascii")


@dataclass(frozen=True)
class Card:
    """One item of a gallery: a picture, a text, or both."""

    image: str | None = None  # data URL
    text: str = ""
    note: str = ""  # small print: score, rank
    right: bool | None = None  # marks right and wrong answers; None marks nothing


@dataclass(frozen=True)
class Query:
    """What was asked, and what came."""

    asked: Card
    answers: Sequence[Card]


@dataclass(frozen=True)
class Gallery:
    """Queries beside their answers."""

    title: str
    queries: Sequence[Query]
    note: str = ""
    kind: str = field(default="gallery", init=False)


@dataclass(frozen=True)
class HeatMap:
    """One image under a grid of values, for instance the scores of its patches."""

    image: str  # data URL
    values: Sequence[Sequence[float]]  # rows and columns of the grid, each value within 0 and 1
    text: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        assert self.values and len({len(row) for row in self.values}) == 1, "a grid has rows of one length"

    @property
    def cells(self) -> list[tuple[int, int, float]]:
        """Row, column and value of the cells to draw."""
        return [(r, c, value) for r, row in enumerate(self.values) for c, value in enumerate(row) if value > 0]


@dataclass(frozen=True)
class HeatMaps:
    """Images with what a method saw in them."""

    title: str
    maps: Sequence[HeatMap]
    note: str = ""
    kind: str = field(default="heat_maps", init=False)


@dataclass(frozen=True)
class Heading:
    """Begins a new part of the page."""

    title: str
    note: str = ""
    kind: str = field(default="heading", init=False)


@dataclass(frozen=True)
class Cell:
    """One non-empty cell of a drawn matrix."""

    row: int
    column: int
    count: int
    share: float  # of its row


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: rows are true classes, columns predicted ones."""

    title: str
    class_names: Sequence[str]
    counts: Tensor  # (C,C) int64
    note: str = ""
    kind: str = field(default="matrix", init=False)

    def __post_init__(self) -> None:
        assert self.counts.shape == (len(self.class_names),) * 2, (self.counts.shape, len(self.class_names))

    @property
    def shown(self) -> list[int]:
        """The classes drawn, in order: all, or those with the most mistakes."""
        mistakes = self.counts.sum(1) + self.counts.sum(0) - 2 * self.counts.diagonal()
        kept: list[int] = mistakes.argsort(descending=True, stable=True)[:MAX_CLASSES].sort().values.tolist()
        return kept

    @property
    def names(self) -> list[str]:
        """Names of the drawn classes."""
        return [one_line(self.class_names[index], 40) for index in self.shown]

    @property
    def margin(self) -> float:
        """Room for the longest name beside the matrix, in cells: wide letters take three quarters of one."""
        widths = [
            sum(0.78 if east_asian_width(letter) in "WF" else 0.52 for letter in name[:24]) for name in self.names
        ]
        return round(max(widths, default=0.0) + 0.8, 2)

    @property
    def cells(self) -> list[Cell]:
        """What to draw."""
        part = self.counts[self.shown][:, self.shown]
        share = part / self.counts[self.shown].sum(1, keepdim=True).clamp(min=1)
        where = part.nonzero().tolist()
        return [Cell(row, column, int(part[row, column]), share[row, column].item()) for row, column in where]

    @property
    def confused(self) -> list[tuple[str, str, int, str]]:
        """The ten most frequent mistakes: true class, predicted class, count, share of the true class."""
        wrong = self.counts.clone().fill_diagonal_(0)
        counts, places = wrong.flatten().topk(min(10, wrong.numel()))
        return [
            (
                one_line(self.class_names[place // len(wrong)]),
                one_line(self.class_names[place % len(wrong)]),
                count,
                f"{count / max(int(self.counts[place // len(wrong)].sum()), 1):.0%}",
            )
            for count, place in zip(counts.tolist(), places.tolist(), strict=True)
            if count
        ]


Section = Table | Picture | Gallery | Matrix | HeatMaps | Heading


def write_report(path: str | Path, title: str, sections: Iterable[Section], subtitle: str = "") -> None:
    """Write the page, whole or not at all.

    Args:
        path: where it goes; its folder is made.
        title: of the page.
        sections: in reading order.
        subtitle: one line under the title.

    Raises:
        DataError: it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    shown = list(sections)
    script = _SORT if any(isinstance(section, Table) and section.sortable for section in shown) else ""
    page = template.render(
        title=one_line(title), subtitle=one_line(subtitle), sections=shown, script=script, script_hash=_hash(script)
    )
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            file.write(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise DataError(f"Cannot write the report {path}: {error.strerror or error}.") from error


def _hash(script: str) -> str:
    """As a Content-Security-Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
