"""`vlkit eval anchors`: published rows of add-ons, measured anew on the weights and data they are about."""

from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar
from vlkit.cli.options import Device, NoCache
from vlkit.cli.own_eval import require_own_eval
from vlkit.errors import ConfigError


def anchors(
    names: Annotated[list[str] | None, typer.Argument(help="Rows, or beginnings of their names: dn/flickr.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the rows' data sets.")] = None,
    model: Annotated[str | None, typer.Option(help="In place of the row's own weights.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Show the rows and what they need; measure nothing.")] = (
        False
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the images that add-ons are fitted on.")] = 0,
    device: Device = "auto",
    no_cache: NoCache = False,
    json_lines: Json = False,
) -> None:
    """Compare with published rows of DN, NNN, QB-Norm, DualIS, MaskCLIP and ClearCLIP."""
    require_own_eval()
    from eval.anchors import ANCHORS, find_anchor, run_anchor
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_source

    chosen = [row for row in ANCHORS.values() if not names or row.name.startswith(tuple(names))]
    for name in names or ():
        if not any(row.name.startswith(name) for row in chosen):
            find_anchor(name)  # says which is nearest
    if list_only:
        for row in chosen if json_lines else ():
            print_json({"name": row.name, "model": row.model, "folder": row.folder, "addons": list(row.addons),
                        "published": dict(row.published), "open_points": row.open_points})  # fmt: skip
        if not json_lines:
            table = [
                (row.name, row.model, row.folder, " ".join(row.addons) or "none", row.open_points) for row in chosen
            ]
            print_table(None, ["row", "model", "data", "add-ons", "open points"], table)
        return
    if not names or data is None:
        raise ConfigError("Name rows and --data, the folder of their data sets; --list shows all rows.")
    cache = None if no_cache else FeatureCache.default()
    lines = []
    for row in chosen:
        source = open_source(model or row.model, device, cache)
        with progress_bar(row.name, "images") as tick:
            found = run_anchor(row, data, source, seed=seed, progress=tick)
        for metric, one in found.items():
            lines.append((row.name, metric, one))
            if json_lines:
                print_json({"name": row.name, "model": source.name, "metric": metric, "open_points": row.open_points,
                            **one._asdict(), "tolerance": row.tolerance})  # fmt: skip
    if not json_lines:
        cells = [
            (name, metric, f"{one.published:.2%}", f"{100 * one.difference:+.2f}", "yes" if one.within else "no")
            for name, metric, one in lines
        ]
        print_table(None, ["row", "metric", "published", "ours less it", "within tolerance"], cells)
