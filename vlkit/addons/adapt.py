"""Fit one add-on on a user's images: what is drawn for it, what is held out, and how well it does there.

reference, drawn = labelled_reference(passes, records, classes, shots=16, seed=1)
adapted = adapt(TipAdapter(), reference, source)
save_addon(adapted.addon, "addons/tip")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlkit.addons.base import AddOn
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES
from vlkit.addons.exchange import Vectors
from vlkit.addons.few_shot import MAX_VAL_SHOTS, sample_few_shot
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.contracts import Progress
from vlkit.data.records import Record, text_to_image
from vlkit.errors import DataError
from vlkit.features.source import FeatureSource


class Drawn(NamedTuple):
    """Which images serve for what, for the record and for messages."""

    train: tuple[str, ...]  # keys of the few-shot images
    val: tuple[str, ...]  # keys of those held out
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]  # what a user should know
    rest: tuple[Record, ...]  # neither: for a test


@dataclass(frozen=True)
class Adapted:
    """A fitted add-on.

    Attributes:
        addon: ready to be saved or used.
        plain: metric on the validation images without it; None where there are none.
        adapted: the same with it.
    """

    addon: AddOn
    plain: float | None
    adapted: float | None


def labelled_reference(
    passes: Passes,
    records: Sequence[Record],
    classes: Sequence[ClassName],
    *,
    shots: int,
    seed: int = 0,
    val: Sequence[Record] | None = None,
    split: str = "train",
) -> tuple[Reference, Drawn]:
    """A reference from labelled images: few shots and validation by seed, the rest as unlabelled images.

    Args:
        passes: of the model.
        records: labelled images.
        classes: (C,) that labels point into.
        shots: images a class to learn from.
        seed: of the draw.
        val: images to validate on; None holds out min(shots, 4) of `records` a class, where there are enough.
        split: what the images are called.

    Raises:
        DataError: images without labels, or a class with fewer than `shots` images.
    """
    labelled = [record for record in records if record.label is not None]
    if not labelled:
        raise DataError(f"None of the {len(records)} images has a class; expected class folders, or a column `class`.")
    read = passes.read(labelled)
    kept = [labelled[position] for position in read.kept]
    labels = torch.tensor([record.label for record in kept])
    names = [item.shown for item in classes]
    counts = torch.bincount(labels, minlength=len(classes))
    wanted = 0 if val is not None else min(shots, MAX_VAL_SHOTS)
    notes = []
    if val is None and int(counts.min()) < shots + wanted:
        rare = names[int(counts.argmin())]
        notes.append(
            f"Class {rare!r} has {int(counts.min())} images, too few to hold {wanted} out beside {shots} shots: "
            "nothing is validated, and hyper-parameters are fixed. --val DIR gives other images for that."
        )
        wanted = 0
    drawn = sample_few_shot(labels, len(classes), shots, seed, val_shots=wanted, class_names=names)
    whole = Part(split, read.vectors, labels, tuple(kept))
    held_out = whole.rows(drawn.val) if drawn.val else None
    if val is not None:
        held_out = _given(passes, val)
    seen = [row for row in range(len(kept)) if row not in set(drawn.val)]
    reference = Reference(
        images=Part(split, read.vectors.rows(seen), None, tuple(kept[row] for row in seen)),
        class_names=tuple(classes),
        few_shot=whole.rows(drawn.train),
        val=held_out,
        labelled=whole.rows(seen),
        seed=seed,
        passes=passes,
    )
    unreadable = tuple((labelled[position].key, reason) for position, reason in read.failures)
    keys = [tuple(kept[row].key for row in rows) for rows in (drawn.train, drawn.val)]
    return reference, Drawn(keys[0], keys[1], unreadable, tuple(notes), tuple(kept[row] for row in drawn.rest))


def captioned_reference(
    passes: Passes, records: Sequence[Record], *, seed: int = 0, split: str = "train", text_prefix: str = ""
) -> tuple[Reference, Drawn]:
    """A reference for retrieval: images and their captions, these with a prefix where the tested ones have it.

    Raises:
        DataError: no captions, or no readable image.
        ConfigError: the test split.
    """
    captioned = [record for record in records if record.captions]
    if not captioned:
        raise DataError(f"None of the {len(records)} reference images has a caption.")
    read = passes.read(captioned)
    kept = tuple(captioned[position] for position in read.kept)
    if not kept:
        raise DataError(f"None of the {len(captioned)} reference images could be read.")
    texts = tuple(text_prefix + caption for record in kept for caption in record.captions)
    reference = Reference(
        task="retrieval",
        images=Part(split, read.vectors, None, kept),
        captions=Captions(
            texts, Vectors("text", passes.source.embed_texts(texts)), split, torch.tensor(text_to_image(kept))
        ),
        seed=seed,
        passes=passes,
    )
    unreadable = tuple((captioned[position].key, reason) for position, reason in read.failures)
    return reference, Drawn(tuple(record.key for record in kept), (), unreadable, (), ())


def adapt(
    addon: AddOn,
    reference: Reference,
    source: FeatureSource,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
    progress: Progress | None = None,
) -> Adapted:
    """Fit an add-on, and measure it on the validation images where there are any.

    Raises:
        ConfigError: the reference lacks what it needs.
        VlkitError: what the method finds wrong.
    """
    return validated(Pipeline([addon]).fit(reference, source, templates, progress), reference, source, templates)


def validated(
    pipeline: Pipeline,
    reference: Reference,
    source: FeatureSource,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
) -> Adapted:
    """The one add-on of a fitted pipeline, measured on the validation images where there are any."""
    fitted = pipeline.addons[0]
    if reference.val is None or not reference.class_names or pipeline.streaming:
        return Adapted(fitted, None, None)
    assert reference.val.labels is not None
    vectors = as_used(pipeline, reference.val, reference.passes)
    values = [
        reference.metric(
            one.classifier(reference.class_names, source, templates).logits(
                reference.val.vectors if one is PLAIN else vectors
            ),
            reference.val.labels,
        )
        for one in (PLAIN, pipeline)
    ]
    return Adapted(fitted, values[0], values[1])


def as_used(pipeline: Pipeline, part: Part, passes: Passes | None) -> Vectors:
    """A part's images under the edits of a pipeline and with the views and patches it wants, where these can be had."""
    if passes is None or not (pipeline.edits or pipeline.views or pipeline.local):
        return part.vectors
    return passes.read(part.records, pipeline.edits, pipeline.views).vectors


def _given(passes: Passes, records: Sequence[Record]) -> Part:
    labelled = [record for record in records if record.label is not None]
    read = passes.read(labelled)
    kept = tuple(labelled[position] for position in read.kept)
    if not kept:
        raise DataError("No validation image with a class could be read.")
    return Part("val", read.vectors, torch.tensor([record.label for record in kept]), kept)
