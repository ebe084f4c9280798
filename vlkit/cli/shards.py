"""`vlkit shards`: build tar shards from any source, check them, and say what is in them."""

from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import Json, out, print_json, progress_bar, say
from vlkit.cli.shards_build import Workers, build, processes
from vlkit.escape import terminal_text

GROUP = "shards"

app = typer.Typer(help="Build, validate and summarize webdataset shards.", no_args_is_help=True)

Shards = Annotated[str, typer.Argument(help="A folder of shards, a tar, a glob, or braces like {00000..00099}.tar.")]


app.command()(build)


@app.command()
def validate(shards: Shards, workers: Workers = None, json: Json = False) -> None:
    """Check that every tar opens, every sample decodes and has a caption. Exit code 1 when something is wrong."""
    from data_tools.validate import validate_shards

    with progress_bar("validate", "samples") as progress:
        report = validate_shards(shards, workers=_beside(workers), progress=progress)
    if json:
        print_json(report.to_json())
    else:
        out().print("\n".join(report.lines()), markup=False)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def summarize(
    shards: Shards,
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts and a contact sheet.")] = None,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Say what is in shards: counts, sizes, captions, duplicates, labels."""
    from data_tools.summarize import summarize_shards, write_html

    with progress_bar("summarize", "samples") as progress:
        summary = summarize_shards(shards, workers=_beside(workers), progress=progress)
    if json:
        print_json(summary.to_json())
    else:
        out().print(terminal_text(summary.to_text()), markup=False)
    if html is not None:
        write_html(summary, html)
        say(f"wrote {html}")


def _beside(workers: int | None) -> int:
    """Processes beside this one: a single worker is this one."""
    return 0 if processes(workers) == 1 else processes(workers)
