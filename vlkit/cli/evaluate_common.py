"""What the commands of `vlkit eval` share: their options, the model behind them, and how results leave them."""

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, say
from vlkit.errors import DataError

if TYPE_CHECKING:
    from eval.class_names import NamedClasses
    from vlkit.contracts import Evaluation
    from vlkit.data.records import Source
    from vlkit.features.source import FeatureSource

MAX_UNREADABLE_SHOWN = 20
REPORT_EXAMPLES = 16

Model = Annotated[str, typer.Option(help="run:FOLDER, local-dir:FOLDER or open_clip:NAME/TAG.")]
Data = Annotated[str, typer.Option(help="Folder of the data set, its annotation file, or shards.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images, where it is not the customary one.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="folder, caption_files, table, parquet, coco, karpathy, lavis, clip_benchmark, coop, flickr8k, flickr30k "
        "or webdataset; default: from the files."
    ),
]
Split = Annotated[str | None, typer.Option(help="train, val or test; default: all images.")]
Out = Annotated[Path, typer.Option(help="Results file, one JSON line an evaluation.")]
PerItem = Annotated[Path | None, typer.Option(help="Also write one row a query to this Parquet file.")]
Report = Annotated[Path | None, typer.Option(help="Also write an HTML page with examples.")]
Device = Annotated[str, typer.Option(help="auto (cuda, mps, cpu) or a device's name.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images encoded together.")]
Features = Annotated[
    Path | None, typer.Option(help="Features of the same data made by `vlkit embed`; no image is encoded.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Encode everything anew.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Threads that decode; default: one per core, at most 8.")]


ClassNames = Annotated[
    Path | None,
    typer.Option(help="`folder<TAB>name` or `folder => name` a line, JSON, or names in sorted folder order."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Class folder to leave out; may be repeated.")]
Templates = Annotated[str, typer.Option(help="none, photo, simple, imagenet80, a file, or a text with {}.")]


def read_classes(
    data: str,
    images: Path | None = None,
    format: str | None = None,  # noqa: A002  (the option's name)
    split: str | None = None,
    class_names: Path | None = None,
    exclude: list[str] | None = None,
) -> "tuple[Source, NamedClasses]":
    """Data with classes and the names these go by in prompts; what is remarkable about either is said."""
    from eval.class_names import name_classes
    from vlkit.data.sources import read_source

    source = read_source(data, format=format, images=images, split=split)
    remark_on(source, split)
    numbered = source.class_names and all(name.isdecimal() for name in source.class_names)
    if source.format == "webdataset" and class_names is None and numbered:
        raise DataError(
            f"The shards of {data} number their classes but do not name them. "
            "Put classnames.txt beside the tars, one name a line, or give --class-names."
        )
    classes = name_classes(source.class_names, source.records, class_names, exclude or ())
    if classes.unused:
        say(f"{class_names} also names {len(classes.unused)} folders that are not there (first: {classes.unused[0]}).")
    return source, classes


@dataclass(frozen=True)
class Shared:
    """Options that every evaluation has; `with_shared_options` puts them behind a command's own."""

    model: Model
    out: Out = Path("results.jsonl")
    per_item: PerItem = None
    report: Report = None
    device: Device = "auto"
    batch_size: BatchSize = 64
    workers: Workers = None
    features: Features = None
    no_cache: NoCache = False
    json_object: Json = False
    started: float = field(default_factory=time.time, init=False)

    def source(self) -> "FeatureSource":
        """The model, loaded when first needed."""
        return source_of_features(self.model, self.device, self.features, self.no_cache)

    def finish(
        self,
        evaluation: "Evaluation",
        task: str,
        embedder: "FeatureSource",
        data: str,
        source: "Source",
        title: str,
        split: str | None = None,
    ) -> None:
        """Hand the outcome over: line, files, table."""
        line = make_line(evaluation, task, embedder, self.device, data, source, split, self.started)
        hand_over(
            evaluation,
            line,
            title,
            out=self.out,
            per_item=self.per_item,
            report=self.report,
            as_json=self.json_object,
        )


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is `shared`, the options of `Shared` behind its own."""
    from vlkit.cli.own_eval import require_own_eval

    shared = [one for one in fields(Shared) if one.init]
    annotations = inspect.get_annotations(Shared)
    own = list(inspect.signature(command).parameters.values())[1:]
    added = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotations[one.name])
        if one.name == "model"
        else inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=annotations[one.name]
        )
        for one in shared
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        require_own_eval()
        options = Shared(**{one.name: given.pop(one.name) for one in shared})
        check_targets(options.out, options.per_item, options.report)
        command(options, **given)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    # `model` stands first in the help, the rest behind the command's own options.
    run.__signature__ = inspect.Signature([added[0], *keyword, *added[1:]])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword, *added]}
    return run


def source_of_features(model: str, device: str, features: Path | None, no_cache: bool) -> "FeatureSource":
    """The model with its cache, behind stored features where they are named."""
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_source

    stored = None
    if features is not None:
        from vlkit.features.store import open_features

        stored = open_features(features)  # before the model: a folder without features should be refused at once
    source = open_source(model, device, None if no_cache else FeatureCache.default())
    if stored is None:
        return source
    from vlkit.features.stored_source import StoredSource

    return StoredSource(stored, source)


def check_targets(out: Path, per_item: Path | None, report: Path | None) -> None:
    """Find out before the work, not after, that a file cannot be written."""
    from eval.results import check_writable

    for path in (out, per_item, report):
        if path is not None:
            check_writable(path)


def remark_on(source: "Source", split: str | None) -> None:
    """How the data was read, what was left out of it, and that several splits are mixed."""
    say(f"{source.root}: read as format {source.format} (--format names another), {len(source)} images")
    for line in source.problems.lines():
        say(f"left out: {line}")
    splits = sorted({record.split for record in source.records if record.split is not None})
    if split is None and len(splits) > 1:
        say(f"No --split was named: all {len(source)} images of {', '.join(splits)} are used.")


def make_line(
    evaluation: "Evaluation",
    task: str,
    embedder: "FeatureSource",
    device: str,
    data: str,
    source: "Source",
    split: str | None,
    started: float,
) -> dict[str, Any]:
    """The line of the results file; `source` is what was read last, the test data."""
    from eval.results import result_line, run_facts
    from vlkit.features.stored_source import StoredSource
    from vlkit.models.load import pick_device

    unreadable = [key for key, _ in evaluation.figures.get("unreadable_images", ())]
    line = result_line(
        evaluation,
        task=task,
        model=embedder.name,
        identity=embedder.identity,
        data=data,
        format=source.format,
        split=split,
        left_out={"by_source": dict(source.problems.counts), "unreadable": unreadable[:MAX_UNREADABLE_SHOWN]},
        run=run_facts(started, str(pick_device(device))),
    )
    if isinstance(embedder, StoredSource) and embedder.stored.about.precision != "fp32":
        line["protocol"]["features"] = f"stored as {embedder.stored.about.precision}"
    return line


def hand_over(
    evaluation: "Evaluation",
    line: Mapping[str, Any],
    title: str,
    *,
    out: Path,
    per_item: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Everything that leaves the command: the line, the files, the table, the remarks."""
    from eval.report import write_report
    from eval.report_sections import evaluation_sections, metric_rows
    from eval.results import append_result, write_per_item

    append_result(out, line)
    where = f"{line['task']}: {line['model']} on {line['data']}" + (f", {line['split']}" if line["split"] else "")
    if per_item is not None:
        write_per_item(per_item, evaluation)
    if report is not None:
        write_report(report, where, evaluation_sections(evaluation), title)
    if as_json:
        print_json(line)
    else:
        print_table(f"{where}: {title}", ["metric", "value", "95% interval"], metric_rows(evaluation))
    unreadable = evaluation.figures.get("unreadable_images", ())
    if unreadable:
        say(f"{len(unreadable)} unreadable images are left out of every number:")
        for key, reason in unreadable[:MAX_UNREADABLE_SHOWN]:
            say(f"  {key}: {reason}")
        if len(unreadable) > MAX_UNREADABLE_SHOWN:
            say(f"  ... and {len(unreadable) - MAX_UNREADABLE_SHOWN} more")
    for path in (per_item, report):
        if path is not None:
            say(f"written: {path}")
    say(f"appended to {out}")
