"""`vlkit eval addons`: plain against every add-on that can be fitted here, on the same images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import print_json, print_table, progress_bar, say
from vlkit.cli.evaluate_common import ClassNames, Data, Exclude, Format, Images
from vlkit.cli.options import BatchSize, Device, Model, NoCache
from vlkit.cli.own_eval import require_own_eval
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource


def addons(
    model: Model,
    data: Data,
    addon: Annotated[
        list[str] | None, typer.Option("--addon", help="Only these, as NAME[:key=value,...]; may be repeated.")
    ] = None,
    class_names: ClassNames = None,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    on: Annotated[
        str | None,
        typer.Option(help="Split that captioned images are measured on; they are fitted on train. [default: test]"),
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Labelled images a class to fit on.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    templates: Annotated[str, typer.Option(help="Prompts around class names.")] = "simple",
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    no_cache: NoCache = False,
    json_object: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """A leaderboard of add-ons, with the difference of each to plain and its paired 95% interval."""
    require_own_eval()
    from eval.addons import (
        Bench,
        as_json,
        board_rows,
        classification_bench,
        compare_addons,
        leaderboard_sections,
        retrieval_bench,
    )
    from eval.report import write_report
    from eval.results import check_writable
    from vlkit.addons.passes import Passes
    from vlkit.addons.registry import addon_rows, find_method, make_addon
    from vlkit.cli.evaluate_common import read_classes, source_of_features
    from vlkit.data.sources import read_source

    if report is not None:
        check_writable(report)
    chosen = [make_addon(text) for text in addon] if addon else [find_method(name)() for name in addon_rows()]
    labelled = bool(read_source(data, format=format, images=images).class_names)
    if labelled and on is not None:
        raise ConfigError(f"--on is for captioned images, but {data} has classes. Leave it out.")
    if not labelled and (class_names is not None or exclude):
        raise ConfigError(f"--class-names and --exclude are for classes, but {data} has none. Leave them out.")
    source = source_of_features(model, device, None, no_cache)
    local = any({"patches", "patch_tokens"} & (one.needs | one.uses) for one in chosen) and _has_patches(source)
    bench: Bench
    with progress_bar("images", "images") as tick:
        passes = Passes(source, local=local, batch_size=batch_size, progress=tick)
        if labelled:
            _, classes = read_classes(data, images, format, None, class_names, exclude)
            bench, drawn = classification_bench(
                passes, classes.records, classes.names, shots=shots, seed=seed, templates=templates
            )
            for note in drawn.notes:
                say(note)
        else:
            records = read_source(data, format=format, images=images).records
            if not any(record.captions for record in records):
                raise DataError(f"{data} has neither classes nor captions to measure add-ons on.")
            bench = retrieval_bench(passes, records, seed=seed, on=on or "test")
    with progress_bar("add-ons", "add-ons") as tick:
        board = compare_addons(bench, source, passes, chosen, progress=tick, say=say)
    if addon and len(board.rows) == 1:
        raise ConfigError(f"Nothing that --addon names can be used on {data}; the lines above say why.")
    if report is not None:
        write_report(report, f"Add-ons: {model} on {data}", leaderboard_sections(board), bench.how)
        say(f"written: {report}")
    if json_object:
        print_json({"model": model, "data": data, **as_json(board)})
        return
    columns, rows = board_rows(board)
    print_table(f"{model} on {data}: {len(bench.test)} images; {bench.how}", columns, rows)


def _has_patches(source: "FeatureSource") -> bool:
    return "patches" in source.embedder.encoder.gives
