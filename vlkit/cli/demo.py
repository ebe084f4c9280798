"""`vlkit demo`: shards, training, classification and retrieval on generated scenes, offline, on a CPU."""

from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say


def demo(
    out: Annotated[Path, typer.Option(help="The run folder; an interrupted demo continues there.")] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option(min=128, help="Scenes to train on.")] = 12_000,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default as in the shipped run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the shipped run.")
    ] = None,
    json: Json = False,
) -> None:
    """The whole story in a few minutes: build shards, train, classify, retrieve, and write a report to look at."""
    from eval.demo import demo_rows, run_demo
    from vlkit.engine import default_workers

    result = run_demo(
        out,
        num_scenes=scenes,
        overrides=[*([] if steps is None else [f"run.steps={steps}"]), *(overrides or [])],
        workers=default_workers(),
        bars=progress_bar,
        say=say,
    )
    if json:
        print_json(
            {
                "out": str(result.out),
                "report": str(result.report),
                "seen": dict(result.seen.metrics),
                "held_out": dict(result.held_out.metrics),
                "retrieval": dict(result.retrieval.metrics),
                "seconds": {timing.stage: round(timing.seconds, 1) for timing in result.timings},
            }
        )
        return
    print_table("vlkit demo", ["metric", "value", "95% interval"], demo_rows(result))
    seconds = sum(timing.seconds for timing in result.timings)
    say(f"{seconds:.0f} s in all. Look at {result.report}; the model is run:{result.out}, for instance:")
    say(f"  vlkit classify {result.out}/photos/seen --model run:{result.out} --classes 'red circle,blue star' --top 2")
