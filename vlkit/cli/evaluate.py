"""`vlkit eval`: measure a model; a table with intervals on stdout, one line appended to a results file."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit.cli.console import Json, print_json, print_table, progress_bar, say
from vlkit.cli.own_eval import require_own_eval
from vlkit.errors import DataError

if TYPE_CHECKING:
    from vlkit.contracts import Evaluation
    from vlkit.data.records import Source
    from vlkit.features.source import FeatureSource

GROUP = "eval"
app = typer.Typer(help="Measure a model on your data.", no_args_is_help=True, rich_markup_mode=None)

MAX_UNREADABLE_SHOWN = 20
REPORT_EXAMPLES = 16

Model = Annotated[str, typer.Option(help="run:FOLDER, local-dir:FOLDER or open_clip:NAME/TAG.")]
Data = Annotated[str, typer.Option(help="Folder of the data set, its annotation file, or shards.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images, where it is not the customary one.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="folder, caption_files, table, parquet, coco, karpathy, lavis, clip_benchmark, flickr8k, flickr30k or "
        "webdataset; default: from the files."
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


@app.command()
def retrieval(
    model: Model,
    data: Data,
    images: Images = None,
    format: Format = None,  # noqa: A002  (the option's name)
    split: Split = None,
    image_column: Annotated[str | None, typer.Option(help="Column of a table with the image paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of a table with the captions.")] = None,
    out: Out = Path("results.jsonl"),
    per_item: PerItem = None,
    report: Report = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    features: Features = None,
    no_cache: NoCache = False,
    json_object: Json = False,
) -> None:
    """Recall of image-text retrieval in both directions, all captions used."""
    started = time.time()
    require_own_eval()
    from vlkit.data.sources import read_source

    _check_targets(out, per_item, report)
    source = read_source(
        data, format=format, images=images, split=split, image_column=image_column, caption_column=caption_column
    )
    _remark_on(source, split)
    from eval.retrieval import RetrievalEvaluator

    # Before the model is loaded: data that cannot be measured should be refused at once.
    evaluator = RetrievalEvaluator(
        source.records, batch_size=batch_size, workers=workers, num_examples=REPORT_EXAMPLES if report else 0
    )
    embedder = _source_of_features(model, device, features, no_cache)
    with progress_bar("retrieval", "images and texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    line = _line(evaluation, "retrieval", embedder, device, data, source, split, started)
    title = f"{line['counts']['images']} images, {line['counts']['texts']} captions"
    _hand_over(evaluation, line, title, out=out, per_item=per_item, report=report, as_json=json_object)


@app.command()
def classification(
    model: Model,
    data: Data,
    class_names: Annotated[
        Path | None,
        typer.Option(help="`folder<TAB>name` or `folder => name` a line, JSON, or names in sorted folder order."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Class folder to leave out; may be repeated.")] = None,
    templates: Annotated[
        str, typer.Option(help="none, photo, simple, imagenet80, a file, or a text with {}.")
    ] = "simple",
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
    out: Out = Path("results.jsonl"),
    per_item: PerItem = None,
    report: Report = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    features: Features = None,
    no_cache: NoCache = False,
    json_object: Json = False,
) -> None:
    """Zero-shot accuracy on a folder of class folders; a folder's name, `_` as space, is its class."""
    started = time.time()
    require_own_eval()
    from vlkit.data.sources import read_source

    _check_targets(out, per_item, report)
    source = read_source(data, format=format, images=images, split=split)
    _remark_on(source, split)
    from eval.class_names import name_classes
    from eval.classification import ClassificationEvaluator
    from vlkit.addons.class_weights.templates import load_templates

    numbered = source.class_names and all(name.isdecimal() for name in source.class_names)
    if source.format == "webdataset" and class_names is None and numbered:
        raise DataError(
            f"The shards of {data} number their classes but do not name them. "
            "Put classnames.txt beside the tars, one name a line, or give --class-names."
        )
    classes = name_classes(source.class_names, source.records, class_names, exclude or ())
    if classes.unused:
        say(f"{class_names} also names {len(classes.unused)} folders that are not there (first: {classes.unused[0]}).")
    load_templates(templates)  # a mistyped set should not wait for the model
    evaluator = ClassificationEvaluator(
        classes.records,
        classes.names,
        templates=templates,
        naming=classes.how,
        batch_size=batch_size,
        workers=workers,
        num_examples=REPORT_EXAMPLES if report else 0,
    )
    embedder = _source_of_features(model, device, features, no_cache)
    with progress_bar("classification", "prompts and images") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    line = _line(evaluation, "classification", embedder, device, data, source, split, started)
    line["counts"]["images_of_excluded_classes"] = classes.num_excluded
    title = f"{line['counts']['images']} images, {line['counts']['classes']} classes, templates {templates}"
    _hand_over(evaluation, line, title, out=out, per_item=per_item, report=report, as_json=json_object)


def _source_of_features(model: str, device: str, features: Path | None, no_cache: bool) -> "FeatureSource":
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


def _check_targets(out: Path, per_item: Path | None, report: Path | None) -> None:
    from eval.results import check_writable

    for path in (out, per_item, report):
        if path is not None:
            check_writable(path)


def _remark_on(source: "Source", split: str | None) -> None:
    say(f"{source.root}: read as format {source.format} (--format names another), {len(source)} images")
    for line in source.problems.lines():
        say(f"left out: {line}")
    splits = sorted({record.split for record in source.records if record.split is not None})
    if split is None and len(splits) > 1:
        say(f"No --split was named: all {len(source)} images of {', '.join(splits)} are used.")


def _line(
    evaluation: "Evaluation",
    task: str,
    embedder: "FeatureSource",
    device: str,
    data: str,
    source: "Source",
    split: str | None,
    started: float,
) -> dict[str, Any]:
    from eval.results import result_line, run_facts
    from vlkit.features.stored_source import StoredSource
    from vlkit.models.load import pick_device

    unreadable = [key for key, _ in evaluation.figures["unreadable_images"]]
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


def _hand_over(
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
    unreadable = evaluation.figures["unreadable_images"]
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
