"""The option `--addon`, and from its values to a pipeline."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import say
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.base import Task
    from vlkit.addons.class_names import ClassName
    from vlkit.addons.passes import Passes
    from vlkit.addons.pipeline import Pipeline
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

AddOns = Annotated[
    list[str] | None,
    typer.Option(
        "--addon",
        help="NAME[:key=value,...] of `vlkit methods`, or a folder that `vlkit adapt` saved; may be repeated.",
    ),
]
ReferenceData = Annotated[
    str | None,
    typer.Option("--reference", help="Images with captions to fit add-ons on. [default: split train of --data]"),
]


def pipeline_of(addons: Sequence[str] | None) -> "Pipeline":
    """The add-ons of the command line, in their order; those of folders are fitted."""
    from vlkit.addons.pipeline import PLAIN, Pipeline
    from vlkit.addons.registry import make_addon

    return Pipeline([make_addon(text) for text in addons]) if addons else PLAIN


def fitted_on_names(
    pipeline: "Pipeline", source: "FeatureSource", class_names: "Sequence[ClassName]", templates: Sequence[str]
) -> "Pipeline":
    """The pipeline, where it needs nothing but class names.

    Raises:
        ConfigError: it needs data; `vlkit adapt` takes them.
    """
    from vlkit.addons.passes import Passes
    from vlkit.addons.reference import Reference

    if pipeline.fitted:
        return pipeline
    reference = Reference(class_names=tuple(class_names), passes=Passes(source, local=pipeline.local))
    return pipeline.fit(reference, source, templates)


def passes_of(pipeline: "Pipeline", source: "FeatureSource", batch_size: int, workers: int | None) -> "Passes":
    """Image passes for a pipeline, shared by fitting and measuring."""
    from vlkit.addons.passes import Passes

    return Passes(source, local=pipeline.local, batch_size=batch_size, workers=workers)


def reference_for(
    pipeline: "Pipeline",
    task: "Task",
    passes: "Passes",
    data: str,
    split: str | None,
    given: str | None,
    text_prefix: str = "",
) -> "Reference | None":
    """Images (with captions, to retrieve) that are not tested on; None where nothing is to be fitted on data.

    Raises:
        ConfigError: the tested images hold those.
        DataError: there are none.
    """
    needs = {"unlabelled_images", "captions"}
    if pipeline.fitted or not any(needs & (addon.needs | addon.uses) for addon in pipeline.addons):
        return None
    names = ", ".join(addon.name for addon in pipeline.addons)
    if given is None and split in (None, "train"):
        raise ConfigError(
            f"{names} must be fitted, on images that are not measured: name --split test (then split train serves), "
            "--reference DATA, or a saved add-on with --addon FOLDER."
        )
    from vlkit.addons.adapt import captioned_reference
    from vlkit.addons.reference import Part, Reference
    from vlkit.data.sources import read_source

    place = given or data
    accepted = (None, "train") if given else ("train",)
    records = [record for record in read_source(place).records if record.split in accepted]
    if not records:
        raise DataError(
            f"{names} must be fitted, and {place} has no images of split train to do it on. Name others with "
            "--reference, or a saved add-on with --addon FOLDER."
        )
    say(f"add-ons are fitted on {len(records)} images of {place}, split train")
    if task == "retrieval":
        return captioned_reference(passes, records, text_prefix=text_prefix)[0]
    read = passes.read(records)
    return Reference(images=Part("train", read.vectors, None, tuple(records[row] for row in read.kept)), passes=passes)
