"""`vlkit shards`: build tar shards from any source, check them, and say what is in them."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import Json, out, print_json, print_table, progress_bar, say
from vlkit.escape import terminal_text

if TYPE_CHECKING:
    from data_tools.build import BuildReport
    from vlkit.data.records import Source

GROUP = "shards"

app = typer.Typer(help="Build, validate and summarize webdataset shards.", no_args_is_help=True)

Workers = Annotated[int | None, typer.Option(min=1, help="Processes. [default: one for each core]")]
Shards = Annotated[str, typer.Argument(help="A folder of shards, a tar, a glob, or braces like {00000..00099}.tar.")]


@app.command()
def build(
    source: Annotated[str, typer.Argument(help="Folder, table, annotation file or shards.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the shards; a build begun there is continued.")],
    source_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="folder, table, coco, karpathy, flickr8k, flickr30k or webdataset. Else guessed."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, val or test. Else all.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not beside the annotations.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Table column with image paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Table column with captions.")] = None,
    max_side: Annotated[
        int | None,
        typer.Option(
            help="Shrink images whose longer side exceeds this (pixels) and store them as JPEG. "
            "Without it, and for smaller images, the bytes stay as they are."
        ),
    ] = None,
    quality: Annotated[int, typer.Option(help="Of these JPEGs, 1-100.")] = 90,
    samples_per_shard: Annotated[int, typer.Option(help="10000 suits millions of images.")] = 1000,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Store token ids of this tokenizer in the index; may be repeated. [default: open_clip:clip_bpe]"
        ),
    ] = None,
    no_tokens: Annotated[bool, typer.Option("--no-tokens", help="Store no token ids.")] = False,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Mix the samples over all shards.")] = False,
    seed: Annotated[int, typer.Option(help="Of --shuffle.")] = 0,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Build shards from images with captions or classes.

    A labelled image without a caption gets the name of its class as one. What cannot be used is left out, counted
    here and named in failures.jsonl. Run the same command again after an interruption: it continues.
    """
    from data_tools.build import build_shards
    from vlkit.data.sources import read_source

    found = read_source(
        source,
        format=source_format,
        images=images,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
    )
    _tell_source(found, guessed=source_format is None)
    tokenizers = {
        name: partial(_token_ids, name) for name in ([] if no_tokens else tokenizer or [_default_tokenizer()])
    }
    for tokenize in tokenizers.values():
        tokenize([])  # a mistyped tokenizer should not wait for the first shard
    with progress_bar("build", "samples") as progress:
        report = build_shards(
            found,
            folder,
            samples_per_shard=samples_per_shard,
            max_side=max_side,
            quality=quality,
            tokenizers=tokenizers,
            shuffle=shuffle,
            seed=seed,
            workers=_processes(workers),
            progress=progress,
        )
    _tell_build(report, json)


@app.command()
def validate(shards: Shards, workers: Workers = None, json: Json = False) -> None:
    """Check that every tar opens, every sample decodes and has a caption. Exit code 1 when something is wrong."""
    from data_tools.validate import validate_shards

    with progress_bar("validate", "samples") as progress:
        report = validate_shards(shards, workers=_beside(workers), progress=progress)
    if json:
        print_json(report.to_json())
    else:
        out().print("\n".join(report.lines()), markup=False)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def summarize(
    shards: Shards,
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts and a contact sheet.")] = None,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Say what is in shards: counts, sizes, captions, duplicates, labels."""
    from data_tools.summarize import summarize_shards, write_html

    with progress_bar("summarize", "samples") as progress:
        summary = summarize_shards(shards, workers=_beside(workers), progress=progress)
    if json:
        print_json(summary.to_json())
    else:
        out().print(terminal_text(summary.to_text()), markup=False)
    if html is not None:
        write_html(summary, html)
        say(f"wrote {html}")


def _processes(workers: int | None) -> int:
    from vlkit.engine import default_workers

    return workers or default_workers()


def _beside(workers: int | None) -> int:
    """Processes beside this one: a single worker is this one."""
    return 0 if _processes(workers) == 1 else _processes(workers)


def _default_tokenizer() -> str:
    from vlkit.models.tokenizers import CLIP_BPE

    return CLIP_BPE


def _token_ids(tokenizer_id: str, texts: list[str]) -> list[list[int]]:
    from vlkit.models.tokenizers import get_tokenizer

    return get_tokenizer(tokenizer_id).encode_ragged(texts)


def _tell_source(source: "Source", guessed: bool) -> None:
    how = " (guessed; --format names another)" if guessed else ""
    say(f"{source.root}: format {source.format}{how}, {len(source)} records")
    for line in source.problems.lines():
        say(f"left out while reading: {line}")


def _tell_build(report: "BuildReport", json: bool) -> None:
    if report.num_shards_kept:
        say(f"continued: {report.num_shards_kept} of {report.num_shards} shards were there already")
    for line in report.failures.lines():
        say(f"left out: {line}")
    if report.failures.total:
        say(f"all {report.failures.total} are named in {report.out / 'failures.jsonl'}")
    if json:
        values = {**asdict(report), "out": str(report.out)}
        values["failures"] = dict(report.failures.counts.most_common())
        print_json(values)
        return
    rows = [
        ("shards", report.num_shards),
        ("samples", report.num_samples),
        ("captions", report.num_captions),
        ("labelled", report.num_labelled),
        ("resized", report.num_reencoded),
        ("left out", report.failures.total),
        ("image bytes per sample", report.image_bytes // max(report.num_samples, 1)),
        ("MB", round(report.tar_bytes / 1e6, 1)),
    ]
    print_table(str(report.out), ("", "count"), rows)
