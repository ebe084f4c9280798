"""Build webdataset shards from a table of links: CC3M, CC12M, RedCaps, LAION, DataComp.

    vlkit shards build cc12m.tsv --url-column url --max-side 384 --samples-per-shard 10000 --out shards/cc12m

Shards are written as by `build.py`; `NNNNN.parquet` beside each tells what became of every row. Killed at any time and
started again, it downloads the unfinished shards only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.build import BuildReport, check_options, key_widths, run_parts
from data_tools.build_plan import hold_folder, settle_plan
from data_tools.download_shard import UrlPart, download_shard
from data_tools.download_url import EVERYWHERE, DownloadRules
from data_tools.url_table import COPY, UrlTable, open_url_table
from data_tools.write_shard import ShardOptions, Tokenize, write_error
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError

__all__ = ["EVERYWHERE", "DownloadRules", "build_from_urls"]


def build_from_urls(
    table: str | Path,
    out: Path,
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    rules: DownloadRules | None = None,
    samples_per_shard: int = 1000,
    max_side: int | None = None,
    quality: int = 90,
    tokenizers: Mapping[str, Tokenize] | None = None,
    workers: int = 1,
    engine: str = "local",
    progress: Progress | None = None,
) -> BuildReport:
    """Download what a table links to and write it as tar shards, or continue such a build.

    Args:
        table: a file or a folder of files; see `url_table.py`.
        out: folder for the shards. On Ray every machine must see it under this path.
        url_column: name of the column of links; None looks for the usual names.
        caption_column: name of the column of captions; None looks for the usual names.
        rules: limits of time, size and place of each download.
        samples_per_shard: rows per tar.
        max_side: pixels; larger images are resized and encoded anew as JPEG. None keeps all bytes.
        quality: of that JPEG, 1-100.
        tokenizers: tokenizer id -> function from texts to token ids, stored in the index.
        workers: processes, each with `rules.connections` connections.
        engine: "local" or "ray"; see `map_parts`.
        progress: called with rows done and in all.

    Raises:
        ConfigError: an option out of range, or a named column does not exist.
        DataError: not a table of links, another build in the folder, no space left, or not one usable row.
        VlkitError: a worker process died.
    """
    rules = rules or DownloadRules()
    check_options(samples_per_shard, max_side, quality)
    _check_rules(rules)
    options = ShardOptions(max_side, quality, tokenizers or {}, ())
    with hold_folder(out):
        try:
            opened = open_url_table(Path(table), out, url_column, caption_column)
            settle_plan(out, _plan(opened, options, rules, samples_per_shard))
            parts = _parts(opened, out, options, rules, samples_per_shard)
            sizes = {part.name: part.num_rows for part in parts}
            report = run_parts(download_shard, parts, sizes, out, workers, engine, progress)
            (out / COPY).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, out) from error
    if report.num_samples == 0:
        raise DataError(f"None of the {report.num_records} rows could be used: {'; '.join(report.failures.lines())}.")
    return report


def _check_rules(rules: DownloadRules) -> None:
    for name in ("timeout", "max_bytes", "connections", "per_host"):
        if getattr(rules, name) <= 0:
            raise ConfigError(f"{name} = {getattr(rules, name)}: expected more than 0.")
    for name in ("retries", "max_redirects"):
        if getattr(rules, name) < 0:
            raise ConfigError(f"{name} = {getattr(rules, name)}: expected 0 or more.")


def _plan(table: UrlTable, options: ShardOptions, rules: DownloadRules, samples_per_shard: int) -> dict[str, Any]:
    """What must be the same when a build is continued; how patient it is may change."""
    return {
        "num_shards": -(-table.num_rows // samples_per_shard),
        "num_records": table.num_rows,
        "source": table.fingerprint,
        "source_format": "links",
        "columns": list(table.columns),
        "samples_per_shard": samples_per_shard,
        "max_side": options.max_side,
        "quality": None if options.max_side is None else options.quality,
        "tokenizers": sorted(options.tokenizers),
        "honour_opt_out": rules.honour_opt_out,
        "max_bytes": rules.max_bytes,
    }


def _parts(
    table: UrlTable, out: Path, options: ShardOptions, rules: DownloadRules, samples_per_shard: int
) -> list[UrlPart]:
    cut = table.cut(samples_per_shard)
    width, digits = key_widths(len(cut), samples_per_shard)
    return [
        UrlPart(f"{number:0{width}d}", digits, segments, table.columns, out, options, rules)
        for number, segments in enumerate(cut)
    ]
