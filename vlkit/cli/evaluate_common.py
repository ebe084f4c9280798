"""What the commands of `vlkit eval` share: their options, the model behind them, and how results leave them."""

import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import MAX_UNREADABLE_SHOWN, Json, print_json, print_table, progress_bar, say, say_unreadable
from vlkit.cli.options import BatchSize, Device, Model, NoCache
from vlkit.errors import DataError

if TYPE_CHECKING:
    from eval.class_names import NamedClasses
    from vlkit.contracts import Evaluation
    from vlkit.data.records import Source
    from vlkit.features.source import FeatureSource

REPORT_EXAMPLES = 16

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
PerItem = Annotated[
    Path | None,
    typer.Option(
        help="Also write one row a query to this Parquet file, and figures beside it as JSON: `vlkit eval compare` and "
        "`vlkit eval report` of the results file use both."
    ),
]
Report = Annotated[Path | None, typer.Option(help="Also write an HTML page with examples.")]
Features = Annotated[
    Path | None, typer.Option(help="Features of the same data made by `vlkit embed`; no image is encoded.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Threads that decode; default: one per core, at most 8.")]


ClassNames = Annotated[
    Path | None,
    typer.Option(help="`folder<TAB>name` or `folder => name` a line, JSON, or names in sorted folder order."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Class folder to leave out; may be repeated.")]


def read_classes(
    data: str,
    images: Path | None = None,
    format: str | None = None,  # noqa: A002  (the option's name)
    split: str | None = None,
    class_names: Path | None = None,
    exclude: list[str] | None = None,
    image_column: str | None = None,
    class_column: str | None = None,
) -> "tuple[Source, NamedClasses]":
    """Data with classes and the names these go by in prompts; what is remarkable about either is said."""
    from eval.class_names import name_classes
    from vlkit.data.sources import read_source

    columns = {"image_column": image_column, "class_column": class_column}
    source = read_source(data, format=format, images=images, split=split, **columns)
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

    @property
    def num_examples(self) -> int:
        """How many an evaluator keeps: none where no page will show them."""
        return examples_for(self.report, self.per_item)

    def source(self) -> "FeatureSource":
        """The model, loaded when first needed."""
        return source_of_features(self.model, self.device, self.features, self.no_cache)

    def run(
        self,
        evaluator: Any,
        task: str,
        unit: str,
        *,
        data: str,
        source: "Source",
        title: "Callable[[Evaluation], str]",
        split: str | None = None,
    ) -> "Evaluation":
        """Load the model, evaluate under a progress bar of some unit, hand the outcome over."""
        embedder = self.source()
        with progress_bar(task, unit) as tick:
            evaluation: Evaluation = replace(evaluator, progress=tick).run(embedder)
        self.finish(evaluation, task, embedder, data, source, title(evaluation), split)
        return evaluation

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
    """Give a command the options of `Shared`, its first parameter, and of every other group of options it takes.

    A group is a dataclass whose fields are options. What must be given stands first in the help, then the command's
    own options, then those of the groups.
    """
    from vlkit.cli.own_eval import require_own_eval

    parameters = list(inspect.signature(command).parameters.values())
    groups: dict[str, type[Any]] = {
        one.name: one.annotation
        for one in parameters
        if isinstance(one.annotation, type) and is_dataclass(one.annotation)
    }
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters if one.name not in groups]
    of_groups = [option for group in (*list(groups.values())[1:], Shared) for option in _options_of(group)]
    needed = [one for one in of_groups if one.default is inspect.Parameter.empty]
    needed.sort(key=lambda one: one.name != "model")  # it stands first
    shown = [*needed, *own, *(one for one in of_groups if one not in needed)]

    @wraps(command)
    def run(**given: Any) -> None:
        require_own_eval()
        made = {
            name: group(**{one.name: given.pop(one.name) for one in fields(group) if one.init})
            for name, group in groups.items()
        }
        shared: Shared = made[parameters[0].name]
        check_targets(shared.out, shared.per_item, shared.report)
        command(**made, **given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    """The fields of a group as parameters of a command."""
    annotations = inspect.get_annotations(group)
    return [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
            annotation=annotations[one.name],
        )
        for one in fields(group)
        if one.init
    ]


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


def examples_for(report: Path | None, per_item: Path | None) -> int:
    """How many examples an evaluator keeps for a page that is written now or later."""
    return REPORT_EXAMPLES if report or per_item else 0


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
    from eval.fingerprints import fingerprinted
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
    return fingerprinted(line, embedder.card.precision, embedder.card.decoder, evaluation.per_item)


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
    """Everything that leaves the command: the files, the line, the table, the remarks."""
    from eval.report import write_report
    from eval.report_sections import evaluation_sections, metric_rows
    from eval.results import append_result

    evaluation = replace(evaluation, protocol=line["protocol"])  # with its fingerprint
    if per_item is not None:
        line = _with_files(line, evaluation, per_item, out)
    append_result(out, line)
    where = f"{line['task']}: {line['model']} on {line['data']}" + (f", {line['split']}" if line["split"] else "")
    if report is not None:
        write_report(report, where, evaluation_sections(evaluation), title)
    if as_json:
        print_json(line)
    else:
        print_table(f"{where}: {title}", ["metric", "value", "95% interval"], metric_rows(evaluation))
    for key, count in evaluation.counts.items():
        if "_without_" in key and count:  # such as classes_without_images: they count in no mean
            say(f"not measured: {count} {key.replace('_', ' ')}")
    unreadable = evaluation.figures.get("unreadable_images", ())
    if unreadable:
        say_unreadable("unreadable images, left out of every number", unreadable)
    for path in (per_item, report):
        if path is not None:
            say(f"written: {path}")
    say(f"appended to {out}")


def _with_files(line: Mapping[str, Any], evaluation: "Evaluation", per_item: Path, out: Path) -> dict[str, Any]:
    """Write the table of items and the figures; the line says where they lie, seen from the results file."""
    from eval.report_sections import evaluation_sections
    from eval.report_store import write_sections
    from eval.results import write_per_item

    files = {"per_item": per_item, "figures": per_item.with_suffix(".json")}
    write_per_item(files["per_item"], evaluation)
    write_sections(files["figures"], evaluation_sections(evaluation))
    places = {name: os.path.relpath(path, out.parent) for name, path in files.items()}
    return {**{key: value for key, value in line.items() if key != "run"}, "files": places, "run": line["run"]}
