"""`vlkit shards dedupe`, `leakage` and `select`: find copies, find evaluation images, choose samples.

Registered in `shards.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.cli.options import Shards
from vlkit.cli.shards_build import Workers, beside, processes
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from numpy import bool_, float32
    from numpy.typing import NDArray

    from data_tools.confirm_pairs import Embed
    from data_tools.selection import SampleIds, Scoring
    from vlkit.data.records import Source
    from vlkit.data.shard_index import ShardSet
    from vlkit.models.embedder import Embedder

Out = Annotated[Path | None, typer.Option(help="Folder for a copy without them, as new shards.")]
PerShard = Annotated[int, typer.Option(help="Of the new shards.")]
Page = Annotated[Path | None, typer.Option(help="Also write a page that shows the pairs side by side.")]
Model = Annotated[
    str | None, typer.Option(help="Confirm near copies by the cosine of this model's embeddings, not by pixels.")
]
Device = Annotated[str, typer.Option(help="Of the model: auto, cpu, cuda, cuda:1, ...")]
Radius = Annotated[int, typer.Option(help="Bits of 64 in which the perceptual hashes of near copies may differ.")]
MinCorrelation = Annotated[float, typer.Option(help="Of near copies, once laid over each other; up to 1.")]
MinCosine = Annotated[float, typer.Option(help="Of near copies, with --model.")]


def dedupe(
    shards: Shards,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="What counts as a copy: bytes, pixels, near (re-encoded, resized, slightly cropped) or captions (the "
            "same ones, case and punctuation aside); may be repeated. [default: bytes, pixels, near]"
        ),
    ] = None,
    out: Out = None,
    groups: Annotated[
        Path | None, typer.Option(help="Also write every copy and what is kept: .jsonl, .parquet")
    ] = None,
    html: Page = None,
    model: Model = None,
    device: Device = "auto",
    radius: Radius = 10,
    min_correlation: MinCorrelation = 0.95,
    min_cosine: MinCosine = 0.95,
    samples_per_shard: PerShard = 1000,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Find samples that are there more than once. Of each the one with the most pixels is kept, else the first."""
    from data_tools.dedupe import DEFAULT_KINDS, dedupe_shards, write_groups
    from data_tools.pair_page import write_dedupe_page

    with progress_bar("dedupe", "samples") as progress:
        report = dedupe_shards(
            shards,
            by=by or DEFAULT_KINDS,
            radius=radius,
            min_correlation=min_correlation,
            min_cosine=min_cosine,
            embed=_embed(model, device),
            workers=beside(workers),
            progress=progress,
        )
    if json:
        print_json(report.to_json())
    else:
        print_table(None, ("", "count"), report.rows())
    if groups is not None:
        write_groups(report, groups)
        say(f"wrote {groups}")
    if html is not None:
        write_dedupe_page(report, html)
        say(f"wrote {html}")
    if out is not None:
        _copy(report.shards, report.keep, out, samples_per_shard, workers)


def leakage(
    shards: Shards,
    against: Annotated[
        list[str],
        typer.Option(
            help="An evaluation set in any format `build` reads; may be repeated. NAME=PATH names it, @SPLIT behind "
            "the path takes one split, as in coco=data/coco@val."
        ),
    ],
    out: Out = None,
    leaks: Annotated[Path | None, typer.Option(help="Also write every leak found, as JSON lines.")] = None,
    html: Page = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Leave samples with a caption of an evaluation set out of --out too.")
    ] = False,
    model: Model = None,
    device: Device = "auto",
    radius: Radius = 10,
    min_correlation: MinCorrelation = 0.95,
    min_cosine: MinCosine = 0.95,
    samples_per_shard: PerShard = 1000,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Find training samples that are copies of evaluation images, or carry their captions."""
    from data_tools.leakage import COLUMNS, KINDS, find_leakage, write_leaks
    from data_tools.pair_page import write_leakage_page

    sources = dict(_evaluation_set(text) for text in against)
    if len(sources) < len(against):
        raise ConfigError("Two evaluation sets have one name; give them names: --against NAME=PATH.")
    with progress_bar("leakage", "samples") as progress:
        report = find_leakage(
            shards,
            sources,
            radius=radius,
            min_correlation=min_correlation,
            min_cosine=min_cosine,
            embed=_embed(model, device),
            workers=beside(workers),
            progress=progress,
        )
    if json:
        print_json(report.to_json())
    else:
        print_table(f"training samples in {shards}", COLUMNS, report.rows())
    if leaks is not None:
        write_leaks(report, leaks)
        say(f"wrote {leaks}")
    if html is not None:
        write_leakage_page(report, html)
        say(f"wrote {html}")
    if out is not None:
        keep = report.without(KINDS) if captions else report.keep
        _copy(report.shards, keep, out, samples_per_shard, workers)


def select(
    shards: Shards,
    out: Annotated[Path | None, typer.Option(help="Folder for the chosen samples, as new shards.")] = None,
    min_words: Annotated[int | None, typer.Option(help="Of the longest caption.")] = None,
    min_characters: Annotated[int | None, typer.Option(help="Of the longest caption.")] = None,
    min_side: Annotated[int | None, typer.Option(help="Pixels of the shorter side.")] = None,
    max_aspect: Annotated[float | None, typer.Option(help="Longer side divided by the shorter.")] = None,
    model: Annotated[str | None, typer.Option(help="Score each pair by the cosine under this model.")] = None,
    device: Device = "auto",
    scores: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV, or a folder of them, with columns `uid` or `key`, and --column."),
    ] = None,
    column: Annotated[str, typer.Option(help="The numbers in --scores.")] = "score",
    min_score: Annotated[float | None, typer.Option(help="Keep scores from this on.")] = None,
    keep_fraction: Annotated[float | None, typer.Option(help="Keep this best share of the scored samples.")] = None,
    uids: Annotated[
        Path | None, typer.Option(help="Keep only what is in this list (DataComp's .npy of u8,u8).")
    ] = None,
    write_uids: Annotated[Path | None, typer.Option(help="Write the chosen samples as such a list.")] = None,
    write_scores: Annotated[Path | None, typer.Option(help="Write all scores as parquet, for --scores.")] = None,
    samples_per_shard: PerShard = 1000,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Choose samples by captions, size, scores or a list, and copy them into new shards."""
    from data_tools.sample_scores import write_scores as write_table
    from data_tools.selection import Rules, select_samples
    from data_tools.uid_lists import write_uids as write_list

    if model is not None and scores is not None:
        raise ConfigError("--model and --scores both give scores; name one of them.")
    scoring = _model_scoring(model, device) if model else _table_scoring(scores, column) if scores else None
    if write_scores is not None and scoring is None:
        raise ConfigError("--write-scores needs --model or --scores.")
    with progress_bar("read", "samples") as progress:
        chosen = select_samples(
            shards,
            rules=Rules(min_words, min_characters, min_side, max_aspect),
            scoring=scoring,
            min_score=min_score,
            keep_fraction=keep_fraction,
            uid_list=uids,
            workers=beside(workers),
            progress=progress,
        )
    if json:
        print_json(chosen.to_json())
    else:
        print_table(None, ("", "count"), chosen.rows())
    if write_scores is not None and chosen.scores is not None:
        write_table(chosen.shards, chosen.uids, chosen.scores, write_scores)
        say(f"wrote {write_scores}")
    if write_uids is not None:
        write_list(chosen.uids[chosen.keep], write_uids)
        say(f"wrote {write_uids}")
    if out is not None:
        _copy(chosen.shards, chosen.keep, out, samples_per_shard, workers)


def _copy(shards: "ShardSet", keep: "NDArray[bool_]", out: Path, samples_per_shard: int, workers: int | None) -> None:
    from data_tools.copy_samples import copy_samples

    with progress_bar("copy", "samples") as progress:
        copied = copy_samples(
            shards, keep, out, samples_per_shard=samples_per_shard, workers=processes(workers), progress=progress
        )
    say(f"wrote {copied.num_samples} samples in {copied.num_shards} shards to {out}, {copied.tar_bytes / 1e6:.1f} MB")
    if copied.num_renamed:
        say(f"{copied.num_renamed} keys occur in several shards and have the shard's name in front now")


def _evaluation_set(text: str) -> tuple[str, "Source"]:
    from vlkit.data.sources import read_source

    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        name, path = "", text
    split = None
    if "@" in path and not Path(path).exists():
        path, _, split = path.rpartition("@")
    source = read_source(path, split=split)
    name = name or (Path(path).name if split is None else f"{Path(path).name}@{split}")
    say(f"{name}: format {source.format}, {len(source)} records")
    return name, source


def _embed(model: str | None, device: str) -> "Embed | None":
    return None if model is None else _embedder(model, device).embed_images


def _embedder(model: str, device: str) -> "Embedder":
    from vlkit.models.load import load_embedder

    return load_embedder(model, device=device)


def _model_scoring(model: str, device: str) -> "Scoring":
    from data_tools.sample_scores import clip_scores

    embedder = _embedder(model, device)

    def score(shards: "ShardSet", _: object) -> "NDArray[float32]":
        with progress_bar("score", "samples") as progress:
            return clip_scores(shards, embedder, progress)

    return score


def _table_scoring(path: Path, column: str) -> "Scoring":
    from data_tools.sample_scores import read_scores

    def score(_: object, ids: "SampleIds") -> "NDArray[float32]":
        found, unmatched = read_scores(path, column, *ids)
        if unmatched:
            say(f"{unmatched} rows of {path} belong to no sample")
        return found

    return score
