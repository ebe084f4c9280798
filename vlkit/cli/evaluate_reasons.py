"""`vlkit eval doubly-right`: is the class right, and for the right reason."""

from dataclasses import replace
from typing import Annotated

import typer

from vlkit.cli.addon_options import AddOns, pipeline_of
from vlkit.cli.console import progress_bar
from vlkit.cli.evaluate_common import (
    ClassNames,
    Data,
    Exclude,
    Format,
    Images,
    Shared,
    Split,
    read_classes,
    with_shared_options,
)


@with_shared_options
def doubly_right(
    shared: Shared,
    data: Data,
    k: Annotated[int, typer.Option("-k", min=1, help="Best pairs of class and reason that vote.")] = 5,
    addon: AddOns = None,
    class_names: ClassNames = None,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
) -> None:
    """Class and reason both right: a table of image, class and, as caption, the reason; --addon a saved why_prompt."""
    pipeline = pipeline_of(addon)
    source, classes = read_classes(data, images, format, split, class_names, exclude)
    from eval.doubly_right import DoublyRightEvaluator

    evaluator = DoublyRightEvaluator(
        classes.records, classes.names, k, batch_size=shared.batch_size, workers=shared.workers
    )
    embedder = shared.source()
    with progress_bar("doubly-right", "images") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder, pipeline)
    title = f"{evaluation.counts['images']} images, {evaluation.counts['candidates']} pairs of class and reason"
    shared.finish(evaluation, "doubly-right", embedder, data, source, title, split)
