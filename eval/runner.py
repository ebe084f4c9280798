"""A suite: models x protocols, one model load per model, resumable, per-sample predictions kept.

    jobs = [Job(prepare(protocol, folder), str(folder)) for protocol, folder in chosen]
    for outcome in run_suite(["run:runs/a", "run:runs/b"], jobs, "results", open_model=open_source): ...

    results/results.jsonl               one line an evaluation, appended whole: a line that is there is done
    results/per_item/KEY.parquet        one row a query or image
    results/figures/KEY.json            what a report draws: confusion matrix, examples with thumbnails

KEY is the hash of model, protocol and data, so a rerun does what is missing and several processes need nothing of each
other but the folder: each takes every n-th evaluation.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from eval.protocol_data import Prepared
from eval.published import compare_with_published
from eval.report_sections import evaluation_sections
from eval.report_store import write_sections
from eval.results import DIGITS, append_result, read_results, result_line, run_facts, write_per_item
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource

RESULTS = "results.jsonl"
MAX_UNREADABLE_SHOWN = 20


class Outcome(NamedTuple):
    """One evaluation of a suite."""

    line: dict[str, Any]
    kept: bool  # it was there from an earlier call


@dataclass(frozen=True)
class Job:
    """One protocol with its data, and the path they were named by."""

    prepared: Prepared
    data: str


def run_suite(
    models: Sequence[str],
    jobs: Sequence[Job],
    out: str | Path,
    *,
    open_model: Callable[[str], FeatureSource],
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Evaluate every model under every protocol, leaving out what is done.

    Args:
        models: names, each once.
        jobs: protocols with their data.
        out: folder of the results; one begun before is continued.
        open_model: gives a model by its name; it is asked once for each model of this process.
        device: for the record.
        rank, world_size: of all pairs of model and protocol this process takes rank, rank + world_size, ...
        progress: called with (done, total) of this process, in thousandths of an evaluation.

    Yields:
        One outcome a model and protocol of this process, those kept included, in order.

    Raises:
        ConfigError: a model or protocol named twice.
        DataError: results that cannot be read or written.
    """
    out = Path(out)
    _check_distinct("model", models)
    _check_distinct("protocol", [job.prepared.protocol.name for job in jobs])
    done = {line.get("key"): line for line in read_results(out / RESULTS).lines} if (out / RESULTS).exists() else {}
    pairs = [(model, job) for model in models for job in jobs]
    mine = pairs[rank::world_size]
    finished, total = 0, 1000 * len(mine)
    source, opened = None, None
    for model, job in mine:
        if source is None or model != opened:
            source, opened = open_model(model), model
        key = job_key(source, job)
        if key in done:
            yield Outcome(done[key], True)
        else:
            # Known from here on: the same weights may be named twice, by two paths.
            done[key] = _evaluate(source, job, key, out, device, _part(progress, finished, total))
            yield Outcome(done[key], False)
        finished += 1000
        if progress:
            progress(finished, total)


def job_key(source: FeatureSource, job: Job) -> str:
    """Names one evaluation: equal for equal model, protocol and data, whatever they are called."""
    settings = job.prepared.protocol.settings(source.card.precision, source.card.decoder)
    parts = (source.identity, settings["fingerprint"], job.prepared.data_hash)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _evaluate(
    source: FeatureSource, job: Job, key: str, out: Path, device: str, progress: Progress | None
) -> dict[str, Any]:
    started = time.time()
    prepared, protocol = job.prepared, job.prepared.protocol
    evaluation = prepared.run(source, progress)
    unreadable = [name for name, _ in evaluation.figures["unreadable_images"]]
    line = result_line(
        evaluation,
        task=protocol.task,
        model=source.name,
        identity=source.identity,
        data=job.data,
        format=prepared.source.format,
        split=protocol.split,
        left_out={
            "by_source": dict(prepared.source.problems.counts),
            "unreadable": unreadable[:MAX_UNREADABLE_SHOWN],
        },
        run=run_facts(started, device),
    )
    # The decoder is the model's way of reading, not the evaluator's.
    line["protocol"] |= {"images": f"{source.card.decoder}, then the model's own preprocessing"}
    line["protocol"] |= protocol.settings(source.card.precision, source.card.decoder)
    line["protocol"]["data_hash"] = prepared.data_hash
    anchors = compare_with_published(source.name, protocol.name, line["metrics"])
    published = {
        name: {"published": anchor.published, "difference": round(anchor.difference, DIGITS), "within": anchor.within}
        for name, anchor in anchors.items()
    }
    files = {"per_item": f"per_item/{key}.parquet", "figures": f"figures/{key}.json"}
    occasion = line.pop("run")
    line |= {"key": key, "published": published, "files": files, "run": occasion}
    write_per_item(out / files["per_item"], evaluation)
    write_sections(out / files["figures"], evaluation_sections(replace(evaluation, protocol=line["protocol"])))
    append_result(out / RESULTS, line)  # last: what has a line is done
    return line


def suite_results(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a suite's folder, or of a results file, each evaluation once (two processes may have done one).

    Raises:
        DataError: no results there.
    """
    place = Path(folder)
    lines = read_results(place / RESULTS if place.is_dir() else place).lines
    if not lines:
        raise DataError(f"{place} holds no result. Make some with `vlkit eval suite` or another `vlkit eval` command.")
    return list({line.get("key") or json.dumps(line): line for line in lines}.values())


def _check_distinct(what: str, names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"No {what} was named.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError(f"{what.capitalize()} {twice[0]} is named twice; name each once.")


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    report = progress
    return lambda done, of: report(before + round(1000 * done / max(of, 1)), total)
