"""`vlkit eval prompts`: the protocols of prompt learning, a grid that can be killed and continued."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.cli.evaluate_common import ClassNames, Exclude, Format, Images, remark_on
from vlkit.cli.evaluate_options import named_path, parse_numbers
from vlkit.cli.options import Device, Model, NoCache
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from eval.coop_sets import Preset
    from eval.prompt_grid import PromptSet
    from eval.prompt_table import Row

PROTOCOLS = ("base-to-new", "few-shot", "transfer")


def prompts(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="zero-shot and names from `vlkit methods`, with commas; settings as in coop:context=4.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="A data set with classes; may be repeated, also as NAME=PATH. With a coop... protocol the one folder "
            "that holds CoOp's data sets."
        ),
    ],
    protocol: Annotated[
        str,
        typer.Option(
            help="base-to-new; few-shot; transfer: learn the first data set, test all; or over the sets of papers, as "
            "CoOp lays them out: coop11-base-to-new, coop11-few-shot, coop-cross-dataset, coop-domain-shift."
        ),
    ] = "base-to-new",
    shots: Annotated[str, typer.Option(help="Images a class, separated by commas.")] = "16",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "1,2,3",
    max_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Of training a cell. [default: the length of the papers]")
    ] = None,
    templates: Annotated[str, typer.Option(help="Of the zero-shot weights: photo, simple, a file, a text with {}.")] = (
        "photo"
    ),
    class_names: ClassNames = None,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; what was begun there is continued.")] = Path(
        "results"
    ),
    device: Device = "auto",
    no_cache: NoCache = False,
    json_lines: Json = False,
) -> None:
    """Prompt learners on base and new classes, by shots, or on other data sets: accuracy, time, parameters.

    Each method is trained for each number of shots and each seed. Cells that are done are kept, so the same command
    continues what was interrupted.
    """
    from vlkit.cli.own_eval import require_own_eval

    require_own_eval()
    from eval.coop_sets import PRESETS

    if protocol not in (*PROTOCOLS, *PRESETS):
        raise ConfigError(f"--protocol {protocol!r}: expected one of {', '.join((*PROTOCOLS, *PRESETS))}.")
    from eval.prompt_grid import RESULTS, Grid, run_grid
    from eval.prompt_table import TABLE, cells, columns, rows_of, write_table
    from eval.results import check_writable
    from vlkit.addons.class_weights.templates import load_templates
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_source
    from vlkit.models.load import pick_device

    load_templates(templates)
    check_writable(out / RESULTS)
    preset = PRESETS.get(protocol)
    if preset is not None:
        sets = _coop(preset, data, (format, images, class_names, exclude))
    else:
        sets = tuple(_read(item, format, images, class_names, exclude) for item in data)
    grid = Grid(
        methods=split_methods(methods),
        sets=sets,
        protocol=protocol if preset is None else preset.protocol,  # type: ignore[arg-type]
        shots=parse_numbers(shots, "--shots"),
        seeds=parse_numbers(seeds, "--seeds"),
        templates=templates,
        max_seconds=max_seconds,
    )
    source = open_source(model, device, None if no_cache else FeatureCache.default())
    lines = []
    with progress_bar("prompts", "cells") as tick:
        for line in run_grid(grid, source, out, str(pick_device(device)), tick):
            lines.append(line)
            if json_lines:
                print_json(line)
            else:
                say(_remark(line))
    rows, title = rows_of(lines), f"{protocol}, {model}, {len(grid.sets)} data set(s), {len(grid.seeds)} seed(s)"
    write_table(out / TABLE, title, rows, grid.protocol)
    if not json_lines:
        tests = list(rows[0].accuracy)
        print_table(title, columns(tests, grid.protocol), [cells(row, tests, grid.protocol) for row in rows])
        if preset is not None and grid.protocol == "base-to-new":
            _print_published(model, lines, rows, whole=len(grid.sets) == len(preset.sets))
    say(f"{len(lines)} cells in {out / RESULTS}, the table in {out / TABLE}")


def split_methods(text: str) -> tuple[str, ...]:
    """`zero-shot,coop:context=4,lr=0.01,kgcoop` as three: `=` before any `:` makes a setting of the method before."""
    found: list[str] = []
    for part in (one.strip() for one in text.split(",")):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def _coop(preset: "Preset", data: list[str], others: tuple[Any, ...]) -> "tuple[PromptSet, ...]":
    from eval.coop_sets import read_coop_sets

    if len(data) != 1 or any(others):
        raise ConfigError(
            "The coop... protocols take one --data, the folder of the data sets, and no other option on it."
        )
    found = read_coop_sets(data[0], preset)
    say(f"{data[0]}: {', '.join(one.name for one in found.sets)}")
    if found.missing:
        say(f"not there, so left out of every mean: {', '.join(found.missing)}")
    return found.sets


def _print_published(model: str, lines: "list[dict[str, Any]]", rows: "list[Row]", whole: bool) -> None:
    """Zero-shot beside what was published for these weights; the means only where no set is missing."""
    from eval.prompt_grid import ZERO_SHOT
    from eval.published import compare_base_to_new

    plain = [line for line in lines if line["method"] == ZERO_SHOT]
    metrics = {f"{line['data']}/{half}": line["metrics"][half] for line in plain for half in ("base", "new")}
    row = next((row for row in rows if row.method == ZERO_SHOT), None)
    if whole and row is not None:
        metrics |= {"base": row.accuracy["base"], "new": row.accuracy["new"], "harmonic_mean": row.harmonic_mean}
    anchors = compare_base_to_new(model, metrics)
    if anchors:
        cells = [(key, f"{one.published + one.difference:.2%}", f"{one.published:.2%}") for key, one in anchors.items()]
        print_table("zero-shot beside the published numbers", ("what", "here", "published"), cells)


def _remark(line: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.2%}" for name, value in line["metrics"].items() if value is not None)
    cost = line["cost"]
    what = f"{line['data']}, {line['method']}, {line['shots']} shots, seed {line['seed']}"
    return f"{what}: {values}; {cost['steps']} steps in {cost['train_seconds']:.1f} s"


def _read(
    item: str,
    format: str | None,  # noqa: A002
    images: Path | None,
    class_names: Path | None,
    exclude: list[str] | None,
) -> "PromptSet":
    from eval.class_names import name_classes
    from eval.prompt_grid import PromptSet
    from vlkit.addons.class_names import parse_class
    from vlkit.data.sources import read_source

    name, path = named_path(item)
    source = read_source(path, format=format, images=images)
    remark_on(source, None)
    # A class of one set need not be in the others.
    left_out = [one for one in exclude or () if one in source.class_names]
    named = name_classes(source.class_names, source.records, class_names, left_out)
    return PromptSet(name, tuple(parse_class(one) for one in named.names), tuple(named.records))
