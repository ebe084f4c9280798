"""How every command speaks: results on stdout (a table, or JSON), everything else on stderr.

Text out of data goes through `vlkit.escape` here, at the edge, so that no caption or file name can send
escapes to the terminal.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from vlkit.contracts import Progress as ProgressCallback
from vlkit.escape import one_line, terminal_text

# rich is imported where it is used: `vlkit --help` does without it, and answers in two thirds of the time.
if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Precision(StrEnum):
    """Of a model's weights, as `vlkit.models.load.load_embedder` takes it."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Decode(StrEnum):
    """How images are read, as `vlkit.models.load.load_embedder` takes it."""

    FAST = "fast"
    REFERENCE = "reference"


# Of the images that could not be read, so many are named; how many there are is said in any case.
MAX_UNREADABLE_SHOWN = 20
# A table that goes into a file or a pipe is not folded at 80 columns: each row stays one line.
_UNFOLDED = 10_000


def out() -> "Console":
    """The console on stdout; made at each call so that tests can replace sys.stdout."""
    return _console(sys.stdout, None if sys.stdout.isatty() else _UNFOLDED)


def log() -> "Console":
    """The console on stderr."""
    return _console(sys.stderr, None)


def say(message: str) -> None:
    """One remark on stderr; the text is shown as it is, never run as markup or escapes."""
    log().print(terminal_text(message), soft_wrap=True)


def say_unreadable(title: str, images: Sequence[tuple[str, str]], all_are_in: str = "") -> None:
    """The number of images that could not be read, and of the first ones name and reason."""
    say(f"{title}: {len(images)}")
    for name, reason in images[:MAX_UNREADABLE_SHOWN]:
        say(f"  {reason if reason.startswith(name) else f'{name}: {reason}'}")
    if len(images) > MAX_UNREADABLE_SHOWN:
        say(f"  ... and {len(images) - MAX_UNREADABLE_SHOWN} more{all_are_in}")


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout. ASCII escapes keep hostile text from acting on the terminal."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def print_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; every column but the first is right-aligned when all its cells are numbers."""
    from rich.table import Table

    cells = [[one_line(_text(cell)) for cell in row] for row in rows]
    table = Table(title=None if title is None else one_line(title), title_justify="left")
    for position, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[position]) for row in cells)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    out().print(table)


@contextmanager
def progress_bar(label: str, unit: str = "items") -> Iterator[ProgressCallback]:
    """A bar on stderr with count, rate and time left; silent when stderr is no terminal.

    With the unit "%" the share that is done stands in place of count and rate.

    Yields:
        A callback that takes (done, total).
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counted = (MofNCompleteColumn(), TextColumn(f"{{task.fields[rate]}} {unit}/s", markup=False))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((TaskProgressColumn(),) if unit == "%" else counted),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = log()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as bar:
        task = bar.add_task(one_line(label), total=None, rate="-")

        def report(done: int, total: int) -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.0f}" if speed else "-")

        yield report


def _console(file: TextIO, width: int | None) -> "Console":
    from rich.console import Console

    # rich would read [red] in a caption as a colour and :dog: in a path as a picture.
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%").replace(",", "") or "0")
    except ValueError:
        return False
    return True
