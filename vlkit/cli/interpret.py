"""`vlkit interpret METHOD IMAGES`: heat maps of images for texts, or what each attention head looks for."""

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.cli.options import Device, ImagePaths
from vlkit.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image
    from torch import Tensor

    from vlkit.data.records import Record
    from vlkit.models.embedder import Embedder

_TEXT_SPAN = "text_span"
_BATCH = 16


def interpret(
    method: Annotated[str, typer.Argument(help="decomposition, legrad, relevance (heat maps), or text_span (heads).")],
    images: ImagePaths,
    model: Annotated[str, typer.Option(help="A model with a CLIP ViT: run:FOLDER, open_clip:NAME/TAG, ...")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures, or for heads.json.")],
    text: Annotated[list[str] | None, typer.Option(help="What to look for; may be repeated.")] = None,
    texts: Annotated[Path | None, typer.Option(help="The pool of text_span: a file with one text a line.")] = None,
    last_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers that count, from the end; default the method's own.")
    ] = None,
    num_texts: Annotated[int, typer.Option(min=1, help="Texts that text_span finds for each head.")] = 5,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Explain images: where a text is seen in them, or what the attention heads of the model look for."""
    from vlkit.interpret.explain import EXPLAINERS

    if method != _TEXT_SPAN and method not in EXPLAINERS:
        raise ConfigError(f"No method {method!r}. {did_you_mean(method, [*EXPLAINERS, _TEXT_SPAN])}")
    if method == _TEXT_SPAN and texts is None:
        raise ConfigError("text_span needs a pool of texts to choose from: --texts FILE, one text a line.")
    if method != _TEXT_SPAN and not text:
        raise ConfigError(f"{method} needs to know what to look for: --text 'a dog', as often as you like.")
    from vlkit.classify import gather_images
    from vlkit.models.load import load_embedder

    source = gather_images(images)
    for line in source.problems.lines():
        say(f"left out: {line}")
    embedder = load_embedder(model, device)
    if texts is not None and method == _TEXT_SPAN:
        _describe_heads(embedder, list(source.records), _lines(texts), out, last_layers or 4, num_texts, json)
    else:
        _draw(embedder, method, list(source.records), list(text or ()), out, last_layers, json)


def _draw(
    embedder: "Embedder",
    method: str,
    records: "list[Record]",
    texts: list[str],
    out: Path,
    last_layers: int | None,
    json: bool,
) -> None:
    from vlkit.interpret.explain import explain
    from vlkit.interpret.pictures import Panel, overlay, write_sheet

    features = embedder.embed_texts(texts).to(embedder.device)
    written = []
    with progress_bar(method, "images") as progress:
        for start, pixels, rows in _batches(embedder, records):
            maps = explain(embedder.encoder, pixels.to(embedder.device), features, method, last_layers).cpu()
            for row, square, heat in zip(rows, pixels, maps, strict=True):
                picture = _as_picture(square)
                panels = [Panel(picture, records[row].key.rpartition("/")[2])]
                panels += [Panel(overlay(picture, one), name) for name, one in zip(texts, heat, strict=True)]
                path = out / f"{row:05}.png"
                write_sheet(panels, path)
                written.append({"image": records[row].key, "picture": str(path)})
            progress(min(start + _BATCH, len(records)), len(records))
    if json:
        print_json(written)
    else:
        print_table(f"{method}: {', '.join(texts)}", ("image", "picture"), [list(line.values()) for line in written])


def _describe_heads(
    embedder: "Embedder",
    records: "list[Record]",
    pool: list[str],
    out: Path,
    last_layers: int,
    num_texts: int,
    json: bool,
) -> None:
    import torch

    from vlkit.data.atomic import atomic_file
    from vlkit.interpret.decomposition import decompose
    from vlkit.interpret.last_layers import first_of_last
    from vlkit.interpret.text_span import text_span

    first = first_of_last(last_layers, embedder.encoder.vision_tower.blocks)
    found = []
    with progress_bar("decompose", "images") as progress:
        for start, pixels, _ in _batches(embedder, records):
            parts = decompose(embedder.encoder, pixels.to(embedder.device)).with_shared_biases()
            found.append(parts.heads[:, first:].cpu())
            progress(min(start + _BATCH, len(records)), len(records))
    heads = torch.cat(found)
    features = embedder.embed_texts(pool)
    lines: list[dict[str, Any]] = []
    for layer in range(heads.shape[1]):
        for head in range(heads.shape[2]):
            span = text_span(heads[:, layer, head], features, num_texts)
            chosen = [pool[row] for row in span.texts]
            lines.append({"layer": first + layer, "head": head, "explained": span.explained[-1], "texts": chosen})
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "heads.json") as file:
        file.write((json_text.dumps(lines, indent=2) + "\n").encode())
    if json:
        print_json(lines)
        return
    rows = [(line["layer"], line["head"], f"{line['explained']:.0%}", "; ".join(line["texts"])) for line in lines]
    print_table(f"{len(heads)} images, {len(pool)} texts", ("layer", "head", "explained", "texts"), rows)


def _batches(embedder: "Embedder", records: "list[Record]") -> "Iterator[tuple[int, Tensor, list[int]]]":
    """(position of the first, pixels (b,3,S,S) uint8, positions) of the readable images."""
    from vlkit.data.images import iterate_images

    for number, chunk in enumerate(iterate_images(records, embedder.encoder.preprocess, batch_size=_BATCH)):
        for row, problem in chunk.failures:
            say(f"left out: {records[row].key}: {problem}")
        if chunk.rows:
            yield number * _BATCH, chunk.images, chunk.rows


def _as_picture(pixels: "Tensor") -> "Image.Image":
    from PIL import Image

    # Small inputs are enlarged, so that the heat maps can be told from blocks.
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return picture.resize((224, 224), Image.Resampling.BICUBIC) if picture.width < 224 else picture


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the texts {path}: {error}.") from error
    if not any(lines):
        raise DataError(f"{path} holds no text. Expected one text a line.")
    return [line for line in lines if line]
