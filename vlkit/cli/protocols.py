"""`vlkit protocols`: the named presets of `vlkit eval suite`, and what each of them fixes."""

from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table
from vlkit.cli.own_eval import require_own_eval


def protocols(
    text: Annotated[str, typer.Argument(help="Only those whose name or title holds this.")] = "",
    json_lines: Json = False,
) -> None:
    """List evaluation protocols: split, captions, templates, class names, metric."""
    require_own_eval()
    from eval.protocols import PROTOCOLS

    rows = [row for row in PROTOCOLS.values() if text.lower() in f"{row.name} {row.title}".lower()]
    if json_lines:
        for row in rows:
            settings = row.settings("fp32", "reference")
            print_json({"title": row.title, "folders": list(row.folders), "published": row.published, **settings})
        return
    table = [
        (row.name, row.task, row.metric, row.split or "all", "yes" if row.published else "", row.title) for row in rows
    ]
    print_table(None, ["protocol", "task", "metric", "split", "published", "what"], table)
