"""`vlkit shards build`: shards from images on disk, or from a table of links. Registered in `shards.py`."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from data_tools.build import BuildReport
    from data_tools.download import DownloadRules
    from vlkit.data.records import Source

Workers = Annotated[int | None, typer.Option(min=1, help="Processes. [default: one for each core]")]

_FORMATS = (
    "folder, caption_files, table, parquet, coco, karpathy, lavis, clip_benchmark, flickr8k, flickr30k or webdataset. "
    "Else guessed."
)


def build(
    source: Annotated[str, typer.Argument(help="Folder, table, annotation file, shards, or a table of links.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the shards; a build begun there is continued.")],
    source_format: Annotated[str | None, typer.Option("--format", help=_FORMATS)] = None,
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
    split_by_hash: Annotated[
        str | None,
        typer.Option(help="Divide by a hash of the keys, as in train=0.9,val=0.1; each goes to a folder of --out."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --shuffle and --split-by-hash.")] = 0,
    workers: Workers = None,
    engine: Annotated[str, typer.Option(help="local or ray (on a cluster; needs the extra `ray`).")] = "local",
    url_column: Annotated[
        str | None,
        typer.Option(help="The source is a table of links in this column: download them."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one image, all in all.")] = 20.0,
    max_bytes: Annotated[int, typer.Option(help="Of one image.")] = 20_000_000,
    retries: Annotated[int, typer.Option(help="Where another attempt may help.")] = 2,
    connections: Annotated[int, typer.Option(help="At a time, in each process; at most 16 to one host.")] = 64,
    ignore_opt_out: Annotated[
        bool,
        typer.Option(
            "--ignore-opt-out",
            help="Also take images whose host asks by X-Robots-Tag (noai, noimageai, noindex, noimageindex) not to.",
        ),
    ] = False,
    allow_private_addresses: Annotated[
        bool,
        typer.Option(
            "--allow-private-addresses",
            help="Also connect to private, loopback and link-local addresses.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Build shards from images with captions or classes, or from a table of links.

    A labelled image without a caption gets the name of its class as one. What cannot be used is left out, counted
    here and named with its cause in NNNNN.parquet beside each shard. Run the same command again after an
    interruption: it continues.
    """
    from data_tools.download import EVERYWHERE, DownloadRules

    rules = DownloadRules(
        timeout=timeout,
        max_bytes=max_bytes,
        retries=retries,
        connections=connections,
        honour_opt_out=not ignore_opt_out,
        allowed_networks=EVERYWHERE if allow_private_addresses else (),
    )
    shared: dict[str, Any] = {
        "samples_per_shard": samples_per_shard,
        "max_side": max_side,
        "quality": quality,
        "tokenizers": _tokenizers(no_tokens, tokenizer),
        "workers": (workers or 0) if engine == "ray" else processes(workers),
        "engine": engine,
    }
    if url_column is not None:
        idle = {
            "--format": source_format,
            "--split": split,
            "--images": images,
            "--image-column": image_column,
            "--shuffle": shuffle or None,
            "--split-by-hash": split_by_hash,
        }
        _refuse_idle(idle, "a table of links; build from the shards it gives")
        reports = {"": _build_from_links(source, folder, url_column, caption_column, rules, shared)}
    else:
        _refuse_idle(_changed(rules), "images on disk; links are named by --url-column")
        found = _read(source, source_format, images, split, image_column, caption_column)
        reports = _build_from_source(found, folder, split_by_hash, shuffle, seed, shared)
    _tell(reports, json)


def processes(workers: int | None) -> int:
    """The number the user gave, else one for each core."""
    from vlkit.engine import default_workers

    return workers or default_workers()


def beside(workers: int | None) -> int:
    """Processes beside this one: a single worker is this one."""
    return 0 if processes(workers) == 1 else processes(workers)


def _refuse_idle(options: Mapping[str, object], what: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} has no effect on {what}. Leave it out.")


def _changed(rules: "DownloadRules") -> dict[str, object]:
    """Options of downloads that differ from their defaults, by the names users know them by."""
    named = {"honour_opt_out": "--ignore-opt-out", "allowed_networks": "--allow-private-addresses"}
    defaults = asdict(type(rules)())
    differ = (name for name, value in asdict(rules).items() if value != defaults[name])
    return {named.get(name, "--" + name.replace("_", "-")): True for name in differ}


def _read(
    source: str,
    source_format: str | None,
    images: Path | None,
    split: str | None,
    image_column: str | None,
    caption_column: str | None,
) -> "Source":
    from vlkit.data.sources import read_source

    found = read_source(
        source,
        format=source_format,
        images=images,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
    )
    how = "" if source_format else " (guessed; --format names another)"
    say(f"{found.root}: format {found.format}{how}, {len(found)} records")
    for line in found.problems.lines():
        say(f"left out while reading: {line}")
    return found


def _build_from_source(
    source: "Source", folder: Path, split_by_hash: str | None, shuffle: bool, seed: int, shared: dict[str, Any]
) -> dict[str, "BuildReport"]:
    from data_tools import hash_splits
    from data_tools.build import build_shards

    sources = {"": source}
    if split_by_hash is not None:
        sources = hash_splits.split_by_hash(source, hash_splits.parse_fractions(split_by_hash), seed)
    reports = {}
    for name, part in sources.items():
        with progress_bar(f"build {name}".rstrip(), "samples") as progress:
            reports[name] = build_shards(part, folder / name, shuffle=shuffle, seed=seed, progress=progress, **shared)
    return reports


def _build_from_links(
    table: str,
    folder: Path,
    url_column: str,
    caption_column: str | None,
    rules: "DownloadRules",
    shared: dict[str, Any],
) -> "BuildReport":
    from data_tools.download import build_from_urls

    with progress_bar("download", "links") as progress:
        return build_from_urls(
            table,
            folder,
            url_column=url_column,
            caption_column=caption_column,
            rules=rules,
            progress=progress,
            **shared,
        )


def _tokenizers(none: bool, names: list[str] | None) -> dict[str, Any]:
    from vlkit.models.tokenizers import CLIP_BPE

    tokenizers = {name: partial(_token_ids, name) for name in ([] if none else names or [CLIP_BPE])}
    for tokenize in tokenizers.values():
        tokenize([])  # a mistyped tokenizer should not wait for the first shard
    return tokenizers


def _token_ids(tokenizer_id: str, texts: list[str]) -> list[list[int]]:
    from vlkit.models.tokenizers import get_tokenizer

    return get_tokenizer(tokenizer_id).encode_ragged(texts)


def _tell(reports: Mapping[str, "BuildReport"], json: bool) -> None:
    from data_tools.build import FAILURES

    for report in reports.values():
        if report.num_shards_kept:
            say(f"continued: {report.num_shards_kept} of {report.num_shards} shards were there already")
        for line in report.failures.lines():
            say(f"left out: {line}")
        if report.failures.total:
            listed = report.out / FAILURES
            say(f"all {report.failures.total} are named in {listed if listed.is_file() else report.out / '*.parquet'}")
    if json:
        values = {name: _as_json(report) for name, report in reports.items()}
        print_json(values.get("", values))
        return
    for report in reports.values():
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


def _as_json(report: "BuildReport") -> dict[str, Any]:
    values = {**asdict(report), "out": str(report.out)}
    return {**values, "failures": dict(report.failures.counts.most_common())}
