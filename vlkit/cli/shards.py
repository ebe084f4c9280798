"""`vlkit shards`: build tar shards from any source, check them, and say what is in them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import Json, out, print_json, progress_bar, say
from vlkit.cli.options import Shards
from vlkit.cli.shards_build import Workers, beside, build, processes
from vlkit.cli.shards_curate import dedupe, leakage, select
from vlkit.cli.shards_reinforce import reinforce
from vlkit.escape import terminal_text

if TYPE_CHECKING:
    from data_tools.validate import ValidationReport

GROUP = "shards"

app = typer.Typer(help="Build, check, summarize, clean and choose webdataset shards.", no_args_is_help=True)

for command in (build, dedupe, leakage, select, reinforce):
    app.command()(command)


@app.command()
def validate(
    shards: Shards,
    fix: Annotated[
        Path | None, typer.Option(help="Folder for a clean copy: broken samples are left out, and listed there.")
    ] = None,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Check that every tar opens, every sample decodes and has a caption. Exit code 1 when something is wrong.

    The exit code speaks of SHARDS, also where --fix wrote a copy without the fault.
    """
    from data_tools.validate import validate_shards

    with progress_bar("validate", "samples") as progress:
        report = validate_shards(shards, workers=beside(workers), progress=progress)
    if json:
        print_json(report.to_json())
    else:
        out().print("\n".join(report.lines()), markup=False)
    if fix is not None:
        _fix(report, fix, workers)
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
        summary = summarize_shards(shards, workers=beside(workers), progress=progress)
    if json:
        print_json(summary.to_json())
    else:
        out().print(terminal_text(summary.to_text()), markup=False)
    if html is not None:
        write_html(summary, html)
        say(f"wrote {html}")


def _fix(report: "ValidationReport", folder: Path, workers: int | None) -> None:
    from data_tools.fix_shards import LEFT_OUT, fix_shards

    with progress_bar("copy", "samples") as progress:
        fixed = fix_shards(report, folder, workers=processes(workers), progress=progress)
    for line in fixed.left_out.lines():
        say(f"left out: {line}")
    copied, others = fixed.copied.num_samples, fixed.left_out.total
    say(f"wrote {copied} samples to {folder}; {LEFT_OUT} there lists the {others} others")
