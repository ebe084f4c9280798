"""`vlkit index`: make features searchable, and keep the index as the collection changes."""

from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, say

GROUP = "index"
app = typer.Typer(help="Build and keep an index of features.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(help="A folder of features made by `vlkit embed`.", metavar="DIR")]


@app.command()
def build(
    folder: Folder,
    kind: Annotated[
        str, typer.Option(help="flat: exact; fp16: half the memory, scores within 1e-3; auto: by what memory is free.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Index the images of a folder of features; the index goes into DIR/index."""
    from vlkit.index.gallery import build_index

    index = build_index(folder, kind)
    if not json:
        say(f"{len(index)} images indexed in {folder / 'index'}")
    info(folder, json)


@app.command()
def info(folder: Folder, json: Json = False) -> None:
    """What the index of a folder holds."""
    from vlkit.index.faiss_index import read_index_about

    place = folder / "index"
    about = read_index_about(place)
    fingerprint = about.get("fingerprint") or {}
    facts = {
        "index": str(place),
        "items": about.get("num_items"),
        "dimensions": about.get("dim"),
        "kind": about.get("kind"),
        "model": fingerprint.get("model"),
        "num_bytes": sum(file.stat().st_size for file in place.iterdir()),
    }
    if json:
        print_json({**facts, "identity": fingerprint.get("identity")})
    else:
        print_table(None, ("what", "value"), [(name.replace("num_", ""), value) for name, value in facts.items()])


@app.command()
def add(
    folder: Folder,
    features: Annotated[Path, typer.Argument(help="Another folder of features by the same model.")],
    json: Json = False,
) -> None:
    """Add the images of another folder of features to the index."""
    from vlkit.index.gallery import add_features

    _tell("added", add_features(folder, features), folder, json)


@app.command()
def remove(
    folder: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Keys of images, as `vlkit retrieve` shows them.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    json: Json = False,
) -> None:
    """Remove images from the index; their features and files stay."""
    from vlkit.errors import ConfigError

    chosen = list(ids or [])
    if ids_file is not None:
        try:
            chosen += [line for line in ids_file.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read {ids_file}: {error}. It must be UTF-8 text, one key a line.") from error
    if not chosen:
        raise ConfigError("Name the images to remove: keys, or --ids-file FILE with one a line.")
    from vlkit.index.gallery import remove_items

    _tell("removed", remove_items(folder, chosen), folder, json)


def _tell(verb: str, count: int, folder: Path, json: bool) -> None:
    from vlkit.index.faiss_index import read_index_about

    total = read_index_about(folder / "index").get("num_items")
    if json:
        print_json({"index": str(folder / "index"), verb: count, "items": total})
    else:
        say(f"{count} {verb}; the index of {folder} holds {total}")
