"""`vlkit eval`: measure a model; a table with intervals on stdout, one line appended to a results file."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vlkit.cli.addon_options import AddOns, ReferenceData, passes_of, pipeline_of, reference_for
from vlkit.cli.console import Json, progress_bar
from vlkit.cli.evaluate_addons import addons
from vlkit.cli.evaluate_anchors import anchors
from vlkit.cli.evaluate_common import (
    Data,
    Features,
    Format,
    Images,
    Out,
    PerItem,
    Report,
    Split,
    Workers,
    check_targets,
    examples_for,
    hand_over,
    make_line,
    read_classes,
    remark_on,
    source_of_features,
)
from vlkit.cli.evaluate_composed import composed_retrieval, conditional_retrieval
from vlkit.cli.evaluate_dense import explanation, pointing, referring, segmentation
from vlkit.cli.evaluate_judgement import caption_judgement, image_caption_choice, text_similarity
from vlkit.cli.evaluate_naming import cluster_and_name, vocabulary_free
from vlkit.cli.evaluate_pairs import blind_pairs, mine_pairs
from vlkit.cli.evaluate_probes import base_to_new, cross_dataset, few_shot, knn, probe
from vlkit.cli.evaluate_prompts import prompts
from vlkit.cli.evaluate_reasons import doubly_right
from vlkit.cli.evaluate_sets import image_retrieval, ood, worst_group
from vlkit.cli.evaluate_suite import compare, report, suite
from vlkit.cli.options import BatchSize, Device, Model, NoCache
from vlkit.cli.own_eval import require_own_eval
from vlkit.errors import ConfigError

GROUP = "eval"
app = typer.Typer(help="Measure a model on your data.", no_args_is_help=True, rich_markup_mode=None)


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
    addon: AddOns = None,
    reference: ReferenceData = None,
    text_prefix: Annotated[str, typer.Option(help="Words before every caption, such as 'A photo depicts '.")] = "",
    folds: Annotated[
        int, typer.Option(min=1, help="Mean over so many equal parts, in the data's order: 5 for COCO's 1k.")
    ] = 1,
    true_recall: Annotated[
        bool, typer.Option("--true-recall", help="Also how many of an image's captions are found, mAP, R-precision.")
    ] = False,
    json_object: Json = False,
) -> None:
    """Recall of image-text retrieval in both directions, all captions used."""
    started = time.time()
    require_own_eval()
    from vlkit.data.sources import read_source

    check_targets(out, per_item, report)
    pipeline = pipeline_of(addon)
    if true_recall and pipeline.addons:
        raise ConfigError("--true-recall is measured without add-ons; leave --addon out.")
    source = read_source(
        data, format=format, images=images, split=split, image_column=image_column, caption_column=caption_column
    )
    remark_on(source, split)
    from eval.folds import FoldedRetrieval
    from eval.retrieval import RetrievalEvaluator

    # Before the model is loaded: data that cannot be measured should be refused at once.
    evaluator = RetrievalEvaluator(
        source.records,
        batch_size=batch_size,
        workers=workers,
        num_examples=examples_for(report, per_item),
        text_prefix=text_prefix,
        true_recall=true_recall,
    )
    folded = FoldedRetrieval(evaluator, folds)
    embedder = source_of_features(model, device, features, no_cache)
    with progress_bar("retrieval", "images and texts") as tick:
        if pipeline.addons:
            passes = passes_of(pipeline, embedder, batch_size, workers)
            fit_on = reference_for(pipeline, "retrieval", passes, data, split, reference, text_prefix)
            folded = replace(folded, evaluator=replace(evaluator, passes=passes, reference=fit_on))
        evaluation = replace(folded, progress=tick).run(embedder, pipeline)
    line = make_line(evaluation, "retrieval", embedder, device, data, source, split, started)
    title = f"{line['counts']['images']} images, {line['counts']['texts']} captions"
    hand_over(evaluation, line, title, out=out, per_item=per_item, report=report, as_json=json_object)


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
        str | None,
        typer.Option(
            help="none, photo, simple, imagenet80, a file, or a text with {}; default: those that come with the data "
            "(CLIP_benchmark's layout), else simple."
        ),
    ] = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
    image_column: Annotated[str | None, typer.Option(help="Column of a table with the image paths.")] = None,
    class_column: Annotated[str | None, typer.Option(help="Column of a table with the classes.")] = None,
    out: Out = Path("results.jsonl"),
    per_item: PerItem = None,
    report: Report = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    features: Features = None,
    no_cache: NoCache = False,
    addon: AddOns = None,
    reference: ReferenceData = None,
    json_object: Json = False,
) -> None:
    """Zero-shot accuracy on a folder of class folders; a folder's name, `_` as space, is its class."""
    started = time.time()
    require_own_eval()
    check_targets(out, per_item, report)
    pipeline = pipeline_of(addon)
    source, classes = read_classes(data, images, format, split, class_names, exclude, image_column, class_column)
    from eval.classification import ClassificationEvaluator
    from eval.multi_label import MultiLabelEvaluator
    from vlkit.addons.class_weights.templates import load_templates

    chosen: str | tuple[str, ...] = templates or source.templates or "simple"
    if isinstance(chosen, str):
        load_templates(chosen)  # a mistyped set should not wait for the model
    evaluator: ClassificationEvaluator | MultiLabelEvaluator
    if any(record.labels is not None for record in classes.records):
        if pipeline.addons:
            raise ConfigError("Images with several classes are measured without add-ons; leave --addon out.")
        evaluator = MultiLabelEvaluator(
            classes.records,
            classes.names,
            templates=chosen,
            naming=classes.how,
            batch_size=batch_size,
            workers=workers,
        )
    else:
        evaluator = ClassificationEvaluator(
            classes.records,
            classes.names,
            templates=chosen,
            naming=classes.how,
            batch_size=batch_size,
            workers=workers,
            num_examples=examples_for(report, per_item),
        )
    embedder = source_of_features(model, device, features, no_cache)
    with progress_bar("classification", "prompts and images") as tick:
        if pipeline.addons and isinstance(evaluator, ClassificationEvaluator):
            passes = passes_of(pipeline, embedder, batch_size, workers)
            fit_on = reference_for(pipeline, "classification", passes, data, split, reference)
            evaluation = replace(evaluator, progress=tick, passes=passes, reference=fit_on).run(embedder, pipeline)
        else:
            evaluation = replace(evaluator, progress=tick).run(embedder)
    line = make_line(evaluation, "classification", embedder, device, data, source, split, started)
    line["counts"]["images_of_excluded_classes"] = classes.num_excluded
    title = f"{line['counts']['images']} images, {line['counts']['classes']} classes, "
    title += f"templates {chosen}" if isinstance(chosen, str) else f"{len(chosen)} templates of the data"
    hand_over(evaluation, line, title, out=out, per_item=per_item, report=report, as_json=json_object)


for _command in (
    probe, few_shot, knn, base_to_new, cross_dataset, ood, image_retrieval, worst_group, caption_judgement,
    image_caption_choice, text_similarity, segmentation,
    composed_retrieval, blind_pairs, mine_pairs, vocabulary_free, cluster_and_name,
    conditional_retrieval, referring, pointing, explanation, doubly_right,
):  # fmt: skip
    app.command(_command.__name__.replace("_", "-"))(_command)


for _command in (suite, compare, report, addons, anchors, prompts):
    app.command()(_command)
