"""`vlkit eval prompts`: the protocols of prompt learning, a grid that can be killed and continued."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.cli.evaluate_common import ClassNames, Device, Exclude, Format, Images, Model, NoCache, remark_on
from vlkit.cli.evaluate_probes import _numbers, named_path
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from eval.prompt_grid import PromptSet
    from eval.prompt_table import Row

PROTOCOLS = ("base-to-new", "few-shot", "transfer")


def prompts(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="zero-shot and names from `vlkit methods`, with commas; settings as in coop:context=4.")
    ],
    data: Annotated[list[str], typer.Option(help="A data set with classes; may be repeated, also as NAME=PATH.")],
    protocol: Annotated[
        str, typer.Option(help="base-to-new; few-shot; or transfer: learn the first data set, test all.")
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
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}.")
    from eval.prompt_grid import RESULTS, Grid, run_grid
    from eval.prompt_table import rows_of
    from eval.results import check_writable
    from vlkit.addons.class_weights.templates import load_templates
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_source
    from vlkit.models.load import pick_device

    load_templates(templates)
    check_writable(out / RESULTS)
    grid = Grid(
        methods=split_methods(methods),
        sets=tuple(_read(item, format, images, class_names, exclude) for item in data),
        protocol=protocol,  # type: ignore[arg-type]
        shots=_numbers(shots, "--shots"),
        seeds=_numbers(seeds, "--seeds"),
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
    rows = rows_of(lines)
    if not json_lines:
        tests = list(rows[0].accuracy)
        title = f"{protocol}, {model}, {len(grid.sets)} data set(s), {len(grid.seeds)} seed(s)"
        print_table(title, columns(tests, protocol), [cells(row, tests, protocol) for row in rows])
    say(f"{len(lines)} cells in {out / RESULTS}")


def split_methods(text: str) -> tuple[str, ...]:
    """`zero-shot,coop:context=4,lr=0.01,kgcoop` as three: `=` before any `:` makes a setting of the method before."""
    found: list[str] = []
    for part in (one.strip() for one in text.split(",")):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def columns(tests: list[str], protocol: str) -> list[str]:
    """Of the table."""
    means = ["harmonic mean"] if protocol == "base-to-new" else []
    return ["method", "shots", *tests, *means, "train s", "steps", "trained", "text ms", "ms an image"]


def cells(row: "Row", tests: list[str], protocol: str) -> list[Any]:
    """Of one row."""

    def shown(test: str) -> str:
        value, interval = row.accuracy.get(test), row.interval.get(test)
        if value is None or interval is None:
            return "-"
        return f"{value:.2%} [{interval[0]:.2%}, {interval[1]:.2%}]"

    means = []
    if protocol == "base-to-new":
        means = ["-" if row.harmonic_mean is None else f"{row.harmonic_mean:.2%}"]
    per_image = f"{row.image_milliseconds:.3f}" + (" (its own weights)" if row.text_for_each_image else "")
    return [
        row.method, row.shots, *map(shown, tests), *means, f"{row.train_seconds:.1f}", f"{row.steps:.0f}", row.trained,
        f"{row.text_milliseconds:.1f}", per_image,
    ]  # fmt: skip


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
