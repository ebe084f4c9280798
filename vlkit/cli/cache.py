"""`vlkit cache`: what the cache of features holds, and how to be rid of it."""

from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, say

GROUP = "cache"
app = typer.Typer(help="Look into the cache of features, or clear it.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def info(json: Json = False) -> None:
    """Where the cache lies (VLKIT_CACHE names another folder) and what it holds of which model."""
    from vlkit.features.cache import FeatureCache

    cache = FeatureCache.default()
    entries = cache.entries()
    total = sum(entry.num_bytes for entry in entries)
    if json:
        names = ("model", "identity", "kind", "decoder", "num_items", "num_bytes")
        rows = [{name: getattr(entry, name) for name in names} for entry in entries]
        print_json({"folder": str(cache.folder), "num_bytes": total, "entries": rows})
        return
    columns = ("model", "identity", "kind", "read by", "items", "MB")
    print_table(
        f"{cache.folder}: {total / 1e6:.1f} MB",
        columns,
        [
            (
                entry.model,
                entry.identity[:12],
                entry.kind,
                entry.decoder,
                entry.num_items,
                f"{entry.num_bytes / 1e6:.1f}",
            )
            for entry in entries
        ],
    )


@app.command()
def clear(
    model: Annotated[
        str | None, typer.Option(help="Only the features of this model: its name, or the start of its identity.")
    ] = None,
    json: Json = False,
) -> None:
    """Remove what the cache holds; it is made again when it is needed."""
    from vlkit.features.cache import FeatureCache

    cache = FeatureCache.default()
    freed = cache.clear(model)
    if json:
        print_json({"folder": str(cache.folder), "num_bytes": freed})
    else:
        say(f"{freed / 1e6:.1f} MB removed from {cache.folder}")
