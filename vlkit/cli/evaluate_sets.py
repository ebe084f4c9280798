"""`vlkit eval ood | image-retrieval | worst-group`: sets told apart, images among images, groups of images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import progress_bar
from vlkit.cli.evaluate_common import (
    ClassNames,
    Data,
    Exclude,
    Format,
    Images,
    Shared,
    Split,
    Templates,
    read_classes,
    remark_on,
    with_shared_options,
)
from vlkit.cli.evaluate_probes import Seed, named_path
from vlkit.errors import DataError

if TYPE_CHECKING:
    from eval.class_names import NamedClasses
    from eval.ood import Kind, OutSet
    from vlkit.data.records import Record

OutOption = Annotated[list[str] | None, typer.Option(help="A set of images, PATH or NAME=PATH; may be repeated.")]


@with_shared_options
def ood(
    shared: Shared,
    data: Data,
    near: OutOption = None,
    far: OutOption = None,
    shifted: OutOption = None,
    class_names: ClassNames = None,
    exclude: Exclude = None,
    templates: Templates = "simple",
    temperature: Annotated[float, typer.Option(help="Of MCM's softmax over cosines.")] = 1.0,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
) -> None:
    """Tell known classes from other images: AUROC and FPR95 of MCM, max-softmax, energy and the largest cosine.

    `--near` and `--far` hold other classes, `--shifted` the same classes looking otherwise; they are kept apart.
    """
    from eval.ood import OodEvaluator
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    source, classes = read_classes(data, images, format, split, class_names, exclude)
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
    embedder = shared.source()
    with progress_bar("ood", "prompts and images") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = f"{evaluation.counts['known_images']} known images, {len(outside)} outside sets"
    shared.finish(evaluation, "ood", embedder, data, source, title, split)


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
    embedder = shared.source()
    with progress_bar("image-retrieval", "images") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = f"{evaluation.counts['queries']} queries, {evaluation.counts['images']} images"
    shared.finish(evaluation, "image-retrieval", embedder, data, source, title, split)


@with_shared_options
def worst_group(
    shared: Shared,
    data: Data,
    groups: Annotated[Path, typer.Option(help="CSV or TSV table with a column of image names and one of groups.")],
    key_column: Annotated[str, typer.Option(help="Column of the image names.")] = "file",
    group_column: Annotated[str, typer.Option(help="Column of the groups.")] = "group",
    by_class: Annotated[
        bool, typer.Option("--by-class", help="A group is a class and a group, as Waterbirds.")
    ] = False,
    min_images: Annotated[int, typer.Option(min=1, help="Smaller groups cannot be the worst.")] = 1,
    class_names: ClassNames = None,
    exclude: Exclude = None,
    templates: Templates = "simple",
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
) -> None:
    """Zero-shot accuracy of every group of a column, and of the worst."""
    from eval.classification import ClassificationEvaluator
    from eval.worst_group import WorstGroupEvaluator, read_groups
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    table = read_groups(groups, key_column, group_column)
    source, classes = read_classes(data, images, format, split, class_names, exclude)
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
        evaluation = replace(evaluator, classification=replace(inner, progress=tick)).run(embedder)
    title = f"{evaluation.counts['images']} images, {evaluation.counts['groups']} groups"
    shared.finish(evaluation, "worst-group", embedder, data, source, title, split)


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
