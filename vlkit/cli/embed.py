"""`vlkit embed`: features of a source on disk, once, for everything that comes after."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say, say_unreadable
from vlkit.cli.options import BatchSize, Device, Model


class Engine(StrEnum):
    """Where parts are made."""

    LOCAL = "local"
    RAY = "ray"


class Precision(StrEnum):
    """Of the numbers on disk."""

    FP16 = "fp16"
    FP32 = "fp32"


class Views(StrEnum):
    """Recipes of `vlkit.features.views`."""

    FLIP = "flip"
    TEN_CROP = "ten-crop"


def embed(
    source: Annotated[str, typer.Argument(help="Folder, table, annotation file or shards.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the features; what was begun there is continued.")],
    update: Annotated[
        bool, typer.Option("--update", help="Embed what is new or changed in the source, drop what is gone.")
    ] = False,
    engine: Annotated[Engine, typer.Option(help="ray spreads the parts over a Ray cluster.")] = Engine.LOCAL,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the numbers on disk. [default: fp32, or as it was begun]")
    ] = None,
    patches: Annotated[bool, typer.Option("--patches", help="Also store features of every patch.")] = False,
    views: Annotated[
        Views | None, typer.Option(help="Also store features of views: the mirror image, or ten crops.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--format", help="How the source is laid out; default: from the files.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, val or test; default: all images.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not beside the annotations.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Table column with image paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Table column with captions.")] = None,
    part_size: Annotated[
        int | None, typer.Option(min=1, help="Images a part: what a kill may cost. [default: 1024 or more]")
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode, with ray tasks at once; default: one per core.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not remember the model's fingerprint.")] = False,
    json: Json = False,
) -> None:
    """Embed images and their captions once, in the layout of clip-retrieval with a fingerprint beside it.

    Run the same command again after an interruption: it continues. Several processes share the work:
    torchrun --nproc-per-node=N --no-python vlkit embed ...
    """
    from vlkit.data.sources import read_source

    found = read_source(
        source,
        format=source_format,
        images=images,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
    )
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        for line in found.problems.lines():
            say(f"left out: {line}")
    from vlkit.features.cache import FeatureCache
    from vlkit.features.embed import embed_source
    from vlkit.features.source import open_source

    chosen = open_source(model, _own_device(device), None if no_cache else FeatureCache.default())
    with progress_bar("embed", "images") as tick:
        report = embed_source(
            found,
            chosen,
            out,
            precision=None if precision is None else precision.value,
            patches=patches,
            views=None if views is None else views.value,
            part_size=part_size,
            update=update,
            split=split,
            batch_size=batch_size,
            workers=workers,
            rank=rank,
            world_size=world_size,
            engine=engine.value,
            progress=tick if rank == 0 else None,
        )
    if rank > 0:
        return
    if world_size > 1:
        say(f"embedded, copied and parts kept are the share of the first of {world_size} processes")
    from vlkit.features.store import open_features

    failures = open_features(out).failures
    counts = {
        "images": report.num_images,
        "embedded": report.num_embedded,
        "copied": report.num_copied,
        "removed": report.num_removed,
        "unreadable": len(failures),
        "parts": report.num_parts,
        "parts_kept": report.num_parts_kept,
    }
    if json:
        listed = [{"key": key, "reason": reason} for key, reason in failures.items()]
        print_json({"out": str(out), "model": model, "identity": chosen.identity, **counts, "failures": listed})
        return
    print_table(str(out), ("", "count"), [(name.replace("_", " "), count) for name, count in counts.items()])
    if failures:
        say_unreadable(f"unreadable images, all named in {out / 'failures'}", list(failures.items()))


def _own_device(device: str) -> str:
    """Under torchrun, "auto" is the GPU of this process."""
    if device != "auto" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % count}" if count else device
