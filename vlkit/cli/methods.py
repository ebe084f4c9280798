"""`vlkit methods`: every method that can be named, where it acts, what it needs and when to use it."""

from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table
from vlkit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from vlkit.contracts import MethodRow


def methods(
    slot: Annotated[
        str | None, typer.Option(help="Only this slot: loss, head, class_weights, terms, gallery_bias, ...")
    ] = None,
    json: Json = False,
) -> None:
    """The table of methods: losses, heads, add-ons, interpretation, indexes, evaluators."""
    rows = _rows()
    slots = list(dict.fromkeys(row.slot for row in rows))
    if slot is not None and slot not in slots:
        raise ConfigError(f"There is no slot {slot!r}. {did_you_mean(slot, slots)}")
    chosen = [row._asdict() for row in rows if slot in (None, row.slot)]
    if json:
        print_json(chosen)
        return
    columns = ("name", "slot", "needs", "cost", "source", "when")
    print_table(f"{len(chosen)} methods", columns, [[row[column] for column in columns] for row in chosen])


def _rows() -> "list[MethodRow]":
    from vlkit.addons.registry import library_rows
    from vlkit.cli.own_eval import require_own_eval

    require_own_eval()
    from eval.methods import METHODS

    return [*library_rows(), *METHODS.values()]
