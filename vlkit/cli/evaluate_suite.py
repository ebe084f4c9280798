"""`vlkit eval suite`, `compare` and `report`: many models under named protocols, side by side, on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Decode, Json, Precision, print_json, print_table, progress_bar, say
from vlkit.cli.evaluate_common import Workers
from vlkit.cli.options import BatchSize, Device, NoCache
from vlkit.cli.own_eval import require_own_eval
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from eval.compare import Comparison
    from eval.runner import Job, Outcome

EXAMPLES = 16


def suite(
    models: Annotated[str, typer.Option(help="Models, separated by commas: run:A,open_clip:NAME/TAG,...")],
    protocols: Annotated[
        str | None, typer.Option(help="Names of `vlkit protocols`, separated by commas; NAME=PATH names its data.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the protocols' data sets.")] = None,
    wds: Annotated[
        Path | None, typer.Option(help="Folder of data sets in CLIP_benchmark's wds layout; all are evaluated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; what was begun there is continued.")] = Path(
        "results"
    ),
    precision: Annotated[Precision, typer.Option(help="Of the weights.")] = Precision.FP32,
    decode: Annotated[
        Decode, typer.Option(help="reference: pillow, as published numbers were made; fast: several times faster.")
    ] = Decode.REFERENCE,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    no_cache: NoCache = False,
    json_lines: Json = False,
) -> None:
    """Evaluate models under protocols; what is in --out already is left out.

    Each model is loaded once. Several processes share the work: torchrun --nproc-per-node=N --no-python vlkit eval ...
    """
    require_own_eval()
    from eval.results import check_writable
    from eval.runner import RESULTS, run_suite
    from vlkit.distributed import launch
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import FeatureSource, open_source
    from vlkit.models.load import pick_device

    check_writable(out / RESULTS)
    jobs = _jobs(protocols, data, wds, batch_size, workers)
    started = launch()
    own = _own_device(device, started.local_rank)
    cache = None if no_cache else FeatureCache.default()

    def open_model(name: str) -> FeatureSource:
        return open_source(name, own, cache, precision=precision.value, decode=decode.value)

    outcomes = []
    with progress_bar("suite", "%") as tick:
        for outcome in run_suite(
            [name.strip() for name in models.split(",")],
            jobs,
            out,
            open_model=open_model,
            device=str(pick_device(own)),
            rank=started.rank,
            world_size=started.world_size,
            progress=tick if started.rank == 0 else None,
        ):
            outcomes.append(outcome)
            if json_lines:
                print_json(outcome.line)
            _remark_on(outcome)
    if not json_lines:
        print_table(None, ["model", "protocol", "metric", "value", "95% interval", ""], _rows(outcomes))
    say(f"results in {out / RESULTS}; a page of them: vlkit eval report {out} --out DIR")


def compare(
    first: Annotated[str, typer.Argument(help="A suite's folder or results file; FILE#N takes its N-th result.")],
    second: Annotated[str, typer.Argument(help="The same, of the other model or add-on.")],
    seed: Annotated[int, typer.Option(help="Of bootstrap and permutations.")] = 0,
    json_lines: Json = False,
) -> None:
    """Two results side by side: differences on the same items, with 95% intervals of the paired bootstrap.

    Results of different protocols are refused, and what differs is shown.
    """
    require_own_eval()
    from eval.compare import compare_results, load_results, pair_results

    pairs = pair_results(load_results(first), load_results(second))
    for one in [compare_results(*pair, seed=seed) for pair in pairs]:
        if json_lines:
            print_json({"first": one.first, "second": one.second, "protocol": one.protocol, "metrics": _as_json(one)})
            continue
        rows = [
            (row.metric, f"{row.first:.2%}", f"{row.second:.2%}", f"{100 * row.difference:+.2f}",
             f"{100 * row.low:+.2f} to {100 * row.high:+.2f}", f"{row.p_value:.4f}")
            for row in one.rows
        ]  # fmt: skip
        columns = ["metric", "first", "second", "difference", "95% interval", "p"]
        print_table(f"first: {one.first}; second: {one.second}", columns, rows)


def report(
    results: Annotated[Path, typer.Argument(help="A suite's folder, or a results file.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    json_object: Json = False,
) -> None:
    """One self-contained page of all results, with the figures as PNG and the table as CSV, LaTeX and Markdown."""
    require_own_eval()
    from eval.suite_report import write_suite_report

    written = write_suite_report(results, out)
    if json_object:
        print_json({"page": str(written[0]), "files": [str(path) for path in written[1:]]})
        return
    print_table(None, ["written"], [(path,) for path in written])


def _jobs(
    protocols: str | None, data: Path | None, wds: Path | None, batch_size: int, workers: int | None
) -> "list[Job]":
    from eval.protocol_data import find_data, prepare, wds_protocols
    from eval.protocols import find_protocol
    from eval.runner import Job

    if protocols is None and wds is None:
        raise ConfigError("Name protocols with --protocols (`vlkit protocols` lists them), or a folder with --wds.")
    chosen: list[tuple[Any, Path]] = []
    for given in (protocols or "").split(",") if protocols else ():
        name, named, place = given.strip().partition("=")
        protocol = find_protocol(name)
        if not named and data is None:
            raise ConfigError(f"Where are the data of {name}? Give --data FOLDER, or write {name}=PATH.")
        chosen.append((protocol, Path(place) if named else find_data(protocol, data or Path())))
    if wds is not None:
        chosen += wds_protocols(wds).values()
    jobs = []
    for protocol, folder in chosen:
        prepared = prepare(protocol, folder, batch_size=batch_size, workers=workers, num_examples=EXAMPLES)
        for line in prepared.source.problems.lines():
            say(f"{protocol.name}: left out: {line}")
        jobs.append(Job(prepared, str(folder)))
    return jobs


def _remark_on(outcome: "Outcome") -> None:
    line, kept = outcome
    protocol = line["protocol"]
    facts = f"fingerprint {protocol['fingerprint']}: {protocol['precision']}, {protocol['decoder']}"
    say(f"{protocol['name']}: {line['model']}: {'already there' if kept else 'done'}; {facts}")
    empty = line["counts"].get("classes_without_images", 0)
    if empty:
        say(f"  {empty} classes have no image; they have no recall and count in no mean.")
    for key, anchor in line.get("published", {}).items():
        if not anchor["within"]:
            say(
                f"  {key} is {100 * anchor['difference']:+.2f} points off the published "
                f"{100 * anchor['published']:.2f}: "
                "check class names, templates, resize and which captions are used."
            )


def _rows(outcomes: "Sequence[Outcome]") -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for line, kept in outcomes:
        metric = line["protocol"]["metric"]
        value = line["metrics"][metric]
        interval = " to ".join(f"{bound:.2%}" for bound in line["intervals"].get(metric, ()))
        note = "already there" if kept else ""
        anchor = line.get("published", {}).get(metric)
        if anchor:
            note = f"published {anchor['published']:.2%}"
        rows.append((line["model"], line["protocol"]["name"], metric, f"{value:.2%}", interval, note))
    return rows


def _as_json(comparison: "Comparison") -> dict[str, dict[str, float]]:
    return {row.metric: {k: v for k, v in row._asdict().items() if k != "metric"} for row in comparison.rows}


def _own_device(device: str, local_rank: int) -> str:
    """With several processes, "auto" is the GPU of this one."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{local_rank % count}" if device == "auto" and count else device
