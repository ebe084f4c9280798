"""`vlkit eval ood | image-retrieval | worst-group`: sets told apart, images among images, groups of images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.addon_options import AddOns, ReferenceData, passes_of, pipeline_of, reference_for
from vlkit.cli.console import progress_bar
from vlkit.cli.evaluate_common import (
    Data,
    Exclude,
    Format,
    Images,
    Shared,
    Split,
    read_classes,
    remark_on,
    with_shared_options,
)
from vlkit.cli.evaluate_options import ClassSplit, Seed, named_path
from vlkit.cli.options import Templates
from vlkit.errors import DataError

if TYPE_CHECKING:
    from eval.class_names import NamedClasses
    from eval.ood import Kind, OutSet
    from vlkit.contracts import Evaluation
    from vlkit.data.records import Record

OutOption = Annotated[list[str] | None, typer.Option(help="A set of images, PATH or NAME=PATH; may be repeated.")]


@with_shared_options
def ood(
    shared: Shared,
    known: ClassSplit,
    near: OutOption = None,
    far: OutOption = None,
    shifted: OutOption = None,
    templates: Templates = "simple",
    temperature: Annotated[float, typer.Option(help="Of MCM's softmax over cosines.")] = 1.0,
) -> None:
    """Tell known classes from other images: AUROC and FPR95 of MCM, max-softmax, energy and the largest cosine.

    `--near` and `--far` hold other classes, `--shifted` the same classes looking otherwise; they are kept apart.
    """
    from eval.ood import OodEvaluator
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    source, classes = known.read()
    outside = [*_outside("near", near), *_outside("far", far), *_outside("shifted", shifted)]
    evaluator = OodEvaluator(
        classes.records,
        classes.names,
        outside,
        templates,
        temperature,
        batch_size=shared.batch_size,
        workers=shared.workers,
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['known_images']} known images, {len(outside)} outside sets"

    shared.run(evaluator, "ood", "prompts and images", data=known.data, source=source, title=title, split=known.split)


@with_shared_options
def image_retrieval(
    shared: Shared,
    data: Data,
    queries: Annotated[str | None, typer.Option(help="Query images; default: each image asks for the others.")] = None,
    relevance: Annotated[
        Path | None,
        typer.Option(help='Right answers, a line each: {"query": key, "relevant": [keys], "ignored": [keys]}.'),
    ] = None,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
    seed: Seed = 0,
) -> None:
    """Image to image, by class or by lists: mAP, CMC, recall@K, MAR@10; image-only models too."""
    from eval.image_retrieval import ImageRetrievalEvaluator, read_relevance

    lists = None if relevance is None else read_relevance(relevance)
    source, classes = read_classes(data, images, format, split, None, exclude)
    asked = None
    if queries is not None:
        _, named = read_classes(queries, None, format, None, None, exclude)
        asked = named.records if lists is not None else _same_classes(named, classes, queries)
    evaluator = ImageRetrievalEvaluator(
        classes.records, asked, lists, batch_size=shared.batch_size, workers=shared.workers, seed=seed
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['queries']} queries, {evaluation.counts['images']} images"

    shared.run(evaluator, "image-retrieval", "images", data=data, source=source, title=title, split=split)


@with_shared_options
def worst_group(
    shared: Shared,
    labelled: ClassSplit,
    groups: Annotated[Path, typer.Option(help="CSV or TSV table with a column of image names and one of groups.")],
    key_column: Annotated[str, typer.Option(help="Column of the image names.")] = "file",
    group_column: Annotated[str, typer.Option(help="Column of the groups.")] = "group",
    by_class: Annotated[
        bool, typer.Option("--by-class", help="A group is a class and a group, as Waterbirds.")
    ] = False,
    min_images: Annotated[int, typer.Option(min=1, help="Smaller groups cannot be the worst.")] = 1,
    templates: Templates = "simple",
    addon: AddOns = None,
    reference: ReferenceData = None,
) -> None:
    """Zero-shot accuracy of every group of a column, and of the worst."""
    from eval.classification import ClassificationEvaluator
    from eval.worst_group import WorstGroupEvaluator, read_groups
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    pipeline = pipeline_of(addon)
    table = read_groups(groups, key_column, group_column)
    source, classes = labelled.read()
    inner = ClassificationEvaluator(
        classes.records,
        classes.names,
        templates=templates,
        naming=classes.how,
        batch_size=shared.batch_size,
        workers=shared.workers,
    )
    evaluator = WorstGroupEvaluator(inner, table, by_class, min_images)
    embedder = shared.source()
    with progress_bar("worst-group", "prompts and images") as tick:
        if pipeline.addons:
            passes = passes_of(pipeline, embedder, shared.batch_size, shared.workers)
            fit_on = reference_for(pipeline, "classification", passes, labelled.data, labelled.split, reference)
            inner = replace(inner, passes=passes, reference=fit_on)
        evaluation = replace(evaluator, classification=replace(inner, progress=tick)).run(embedder, pipeline)
    title = f"{evaluation.counts['images']} images, {evaluation.counts['groups']} groups"
    shared.finish(evaluation, "worst-group", embedder, labelled.data, source, title, labelled.split)


def _same_classes(asked: "NamedClasses", gallery: "NamedClasses", where: str) -> "list[Record]":
    """Queries whose labels point into the gallery's classes; both count from their own folders."""
    unknown = sorted(set(asked.names) - set(gallery.names))
    if unknown:
        raise DataError(
            f"{where} has {len(unknown)} classes that the gallery lacks (first: {unknown[0]!r}). Their queries would "
            "have no right answer; leave them out with --exclude."
        )
    place = [gallery.names.index(name) for name in asked.names]
    return [record if record.label is None else replace(record, label=place[record.label]) for record in asked.records]


def _outside(kind: "Kind", items: list[str] | None) -> "list[OutSet]":
    from eval.ood import OutSet
    from vlkit.data.sources import read_source

    found = []
    for item in items or []:
        name, path = named_path(item)
        source = read_source(path)
        remark_on(source, None)
        found.append(OutSet(kind, name, source.records))
    return found
