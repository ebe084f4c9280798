"""`vlkit retrieve`: the images of a folder of features that fit words, an image, or both."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.addon_options import AddOns, pipeline_of
from vlkit.cli.console import Json, print_json, print_table, say
from vlkit.cli.options import Device
from vlkit.cli.own_eval import require_own_eval
from vlkit.errors import DataError

if TYPE_CHECKING:
    from vlkit.data.records import ImageRef
    from vlkit.index.gallery import Found, Query


def retrieve(
    folder: Annotated[Path, typer.Argument(help="A folder of features made by `vlkit embed`.", metavar="DIR")],
    text: Annotated[str | None, typer.Option(help="Words that describe what is looked for.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image like those looked for.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many images to give.")] = 10,
    model: Annotated[
        str | None, typer.Option(help="The model the features are from, where it has moved. [default: as embedded]")
    ] = None,
    addon: AddOns = None,
    page: Annotated[
        Path | None, typer.Option("--open", help="Write an HTML page with the pictures, and show it in a browser.")
    ] = None,
    device: Device = "auto",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Encode the query anew each time.")] = False,
    json: Json = False,
) -> None:
    """Search images by words, by an image, or by both (the mean of the two unit vectors, at unit norm again)."""
    from vlkit.index.gallery import Query, open_gallery

    query = Query(text, image)
    gallery = open_gallery(folder)
    if not gallery.saved:
        say(f"{folder} has no index; all its features are searched. `vlkit index build {folder}` keeps one.")
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_source

    source = open_source(model or gallery.model, device, None if no_cache else FeatureCache.default())
    pipeline = pipeline_of(addon)
    if pipeline.addons:
        from vlkit.addons.reference import Reference
        from vlkit.addons.search import search_with_addons

        if not any(one.fitted is None and (one.needs | one.uses) for one in pipeline.addons):
            pipeline = pipeline.fit(Reference(task="retrieval"), source)  # nothing is learned from data
        found = search_with_addons(folder, source, query, pipeline, k)
    else:
        found = gallery.find(source, query, k)
    if len(found) < k and not json:
        say(f"The gallery holds {len(found)} images, fewer than the {k} asked for.")
    if page is not None:
        _write_page(page, query, found, folder)
        say(f"written: {page}")
        if sys.stdout.isatty():
            typer.launch(str(page))
    if json:
        asked = {"text": text, "image": None if image is None else str(image), "rule": query.rule}
        if pipeline.addons:
            asked["addons"] = ", ".join(one.name for one in pipeline.addons)
        print_json({"query": asked, "num_items": len(gallery.index), "results": [_as_json(item) for item in found]})
    else:
        rows = [(item.rank, f"{item.score:.4f}", item.id, item.caption or "") for item in found]
        print_table(f"{len(gallery.index)} images, by {query.rule}", ("rank", "similarity", "image", "caption"), rows)


def _as_json(item: "Found") -> dict[str, object]:
    return {
        "rank": item.rank,
        "id": item.id,
        "score": round(item.score, 6),
        "path": item.image.path,
        "caption": item.caption,
    }


def _write_page(page: Path, query: "Query", found: "list[Found]", folder: Path) -> None:
    require_own_eval()
    from eval.report import Card, Gallery, write_report
    from eval.report import Query as Shown
    from vlkit.data.records import ImageRef
    from vlkit.escape import one_line

    asked = Card(
        image=None if query.image is None else _thumbnail(ImageRef(path=str(query.image))),
        text=one_line(query.text or ""),
        note=f"query: {query.rule}",
    )
    answers = [
        Card(
            image=_thumbnail(item.image),
            text=one_line(item.caption or ""),
            note=f"{item.rank}. {one_line(item.id)}; similarity {item.score:.3f}",
        )
        for item in found
    ]
    write_report(page, f"Images found in {folder}", [Gallery("Results", [Shown(asked, answers)])])


def _thumbnail(image: "ImageRef") -> str | None:
    from vlkit.data.thumbnail import thumbnail

    try:
        return thumbnail(image)
    except DataError:  # moved or deleted since it was embedded: its name is shown all the same
        return None
