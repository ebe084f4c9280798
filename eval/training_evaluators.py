"""Evaluators by the name of their command, made from a run file's [[eval]] section.

    [[eval]]
    name = "knn"
    data = "photos"
    every = "2 epochs"
    options = {k = [1, 10]}

Each function below reads the data and takes as `options` what its command takes. The pairs that `mine-pairs` finds are
those of each moment's model: its accuracies are not about the same pairs each time, its `mined_share` can be followed.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import ConfigDict, ValidationError, validate_call

from eval.blind_pairs import BlindPairsEvaluator, read_mmvp
from eval.caption_judgement import CaptionJudgementEvaluator, read_flickr8k_judgements
from eval.choice_sets import read_sugarcrepe, read_winoground, swap_nouns
from eval.coco_instances import read_instances
from eval.composed_retrieval import ComposedRetrievalEvaluator
from eval.composed_sets import add_objects, read_cirr, read_domains, read_patterncom
from eval.conditional_retrieval import ConditionalRetrievalEvaluator
from eval.conditional_sets import object_conditions, read_genecis
from eval.explanation import ExplanationEvaluator
from eval.folds import FoldedRetrieval
from eval.grounding import ReferringEvaluator, View
from eval.image_caption_choice import ImageCaptionChoiceEvaluator
from eval.mask_refinement import DILATIONS
from eval.mined_pairs import MinedPairsEvaluator
from eval.pointing import PointingEvaluator
from eval.referring_sets import read_refcoco, unique_objects
from eval.retrieval import RetrievalEvaluator
from eval.segmentation import Background, SegmentationEvaluator
from eval.text_similarity import SameImageCaptionsEvaluator, ScoredPairsEvaluator, read_scored_pairs
from eval.training_classes import (
    base_to_new,
    classification,
    cluster_and_name,
    cross_dataset,
    doubly_right,
    few_shot,
    image_retrieval,
    knn,
    ood,
    probe,
    vocabulary_free,
    worst_group,
)
from vlkit.addons.class_weights.templates import load_templates
from vlkit.config import EvalSettings
from vlkit.contracts import Evaluator
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, did_you_mean
from vlkit.features.cache import FeatureCache
from vlkit.features.source import open_source


def build_evaluator(section: EvalSettings) -> Evaluator:
    """The evaluator of a section, its data read.

    Raises:
        ConfigError: an option it has not, or one of the wrong kind.
        DataError: data that are missing or cannot be evaluated.
    """
    assert section.name is not None
    name, build = section.name, EVALUATORS[section.name]
    fixed = {"images": section.images, "format": section.format, "split": section.split}
    given = {key: value for key, value in fixed.items() if value is not None}
    known = [key for key in inspect.signature(build).parameters if key != "data"]
    for key in (*given, *section.options):
        if key not in known or (key in fixed and key in section.options):
            options = [one for one in known if one not in fixed]
            hint = did_you_mean(key, options) if options else "It has none."
            raise ConfigError(f"[[eval]] name = {name!r}: {key!r} is no option of it. {hint}")
    data = [section.data] if isinstance(section.data, str) else list(section.data)
    checked = validate_call(config=ConfigDict(strict=True))(build)
    try:
        return checked("::".join(data), **given, **section.options)
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"[[eval]] name = {name!r}: options {lines}.") from error
    except ConfigError as error:
        raise ConfigError(f"[[eval]] name = {name!r}: {error}") from error


def retrieval(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    text_prefix: str = "",
    folds: int = 1,
) -> Evaluator:
    """`vlkit eval retrieval`."""
    source = read_source(
        data, format=format, images=images, split=split, image_column=image_column, caption_column=caption_column
    )
    return FoldedRetrieval(RetrievalEvaluator(source.records, text_prefix=text_prefix), folds)


def caption_judgement(data: str, *, images: str | None = None) -> Evaluator:
    """`vlkit eval caption-judgement`."""
    return CaptionJudgementEvaluator(read_flickr8k_judgements(data, images))


def image_caption_choice(
    data: str,
    *,
    form: Literal["winoground", "sugarcrepe", "swapped"],
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
) -> Evaluator:
    """`vlkit eval image-caption-choice`."""
    if form == "swapped":
        source = read_source(data, format=format, images=images, split=split)
        return ImageCaptionChoiceEvaluator(swap_nouns(source.records).instances)
    _no_effect(f"form = {form!r}", format=format, split=split)
    read = read_winoground if form == "winoground" else read_sugarcrepe
    return ImageCaptionChoiceEvaluator(read(data, images).instances)


def text_similarity(
    data: str,
    *,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    scored: bool = False,
    first_column: str = "sentence1",
    second_column: str = "sentence2",
    score_column: str = "score",
) -> Evaluator:
    """`vlkit eval text-similarity`."""
    if scored:
        _no_effect("scored = true", format=format, split=split)
        return ScoredPairsEvaluator(read_scored_pairs(data, first_column, second_column, score_column))
    return SameImageCaptionsEvaluator(read_source(data, format=format, split=split).records)


def segmentation(
    data: str,
    *,
    images: str | None = None,
    templates: str = "imagenet80",
    background: Background = "ignored",
    threshold: float = 0.0,
    logit_scale: float | None = None,
    denoise: float = 0.0,
    short_side: int | None = None,
    stride: int | None = None,
    refine: int = 0,
    refine_dilations: Sequence[int] = DILATIONS,
) -> Evaluator:
    """`vlkit eval segmentation`."""
    load_templates(templates)
    return SegmentationEvaluator(
        read_instances(data, images), None, templates, background, threshold, logit_scale, denoise, short_side, stride,
        refine, tuple(refine_dilations),
    )  # fmt: skip


def referring(
    data: str,
    *,
    images: str | None = None,
    split: str | None = None,
    form: Literal["objects", "refcoco"] = "objects",
    views: Sequence[View] = ("crop",),
    template: str = "a photo of {}",
    num_others: int = 0,
) -> Evaluator:
    """`vlkit eval referring`."""
    if form == "refcoco":
        if images is None:
            raise ConfigError("RefCOCO's files name photographs of COCO; say where they are: images = DIR.")
        expressions, _ = read_refcoco(data, images, split or "val")
    else:
        _no_effect(f"form = {form!r}", split=split)
        expressions = unique_objects(read_instances(data, images))
    return ReferringEvaluator(expressions, tuple(views), template, num_others)


def pointing(
    data: str,
    *,
    images: str | None = None,
    method: str = "patches",
    templates: str = "photo",
    tolerance: float = 15.0,
) -> Evaluator:
    """`vlkit eval pointing`."""
    load_templates(templates)
    return PointingEvaluator(read_instances(data, images), method, templates, tolerance)


def explanation(data: str, *, images: str | None = None, method: str = "legrad", templates: str = "photo") -> Evaluator:
    """`vlkit eval explanation`."""
    load_templates(templates)
    return ExplanationEvaluator(read_instances(data, images), method, templates)


def composed_retrieval(
    data: str,
    *,
    form: Literal["cirr", "patterncom", "domains", "objects"],
    images: str | None = None,
    split: str | None = None,
) -> Evaluator:
    """`vlkit eval composed-retrieval`."""
    if form == "cirr":
        return ComposedRetrievalEvaluator(read_cirr(data, split or "val", images))
    _no_effect(f"form = {form!r}", split=split)
    if form == "objects":
        return ComposedRetrievalEvaluator(add_objects(read_instances(data, images)))
    read = read_patterncom if form == "patterncom" else read_domains
    return ComposedRetrievalEvaluator(read(data, images))


def conditional_retrieval(
    data: str, *, form: Literal["genecis", "objects"], images: str | None = None, num_distractors: int = 14
) -> Evaluator:
    """`vlkit eval conditional-retrieval`."""
    if form == "genecis":
        if images is None:
            raise ConfigError("GeneCIS's files name photographs of COCO and Visual Genome; say where: images = DIR.")
        return ConditionalRetrievalEvaluator(read_genecis(data, images))
    return ConditionalRetrievalEvaluator(object_conditions(read_instances(data, images), num_distractors))


def blind_pairs(data: str, *, template: str = "a photo of {}") -> Evaluator:
    """`vlkit eval blind-pairs`."""
    return BlindPairsEvaluator(read_mmvp(data), template)


def mine_pairs(
    data: str,
    *,
    second: str,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    above: float = 0.95,
    below: float = 0.6,
    share: float | None = None,
    most: int | None = None,
) -> Evaluator:
    """`vlkit eval mine-pairs`; the second model encodes once, into the cache."""
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"share is {share}; expected a number within 0 and 1.")
    source = read_source(data, format=format, images=images, split=split)
    other = open_source(second, cache=FeatureCache.default())
    return MinedPairsEvaluator(source.records, other, above, below, share, most)


def _no_effect(why: str, **given: str | None) -> None:
    for key, value in given.items():
        if value is not None:
            raise ConfigError(f"{key} has no effect with {why}. Leave it out.")


_ALL = (
    retrieval, classification, probe, few_shot, knn, base_to_new, cross_dataset, ood, image_retrieval, worst_group,
    caption_judgement, image_caption_choice, text_similarity, segmentation, referring, pointing, explanation,
    composed_retrieval, conditional_retrieval, blind_pairs, mine_pairs, vocabulary_free, cluster_and_name, doubly_right,
)  # fmt: skip
EVALUATORS: Mapping[str, Callable[..., Evaluator]] = {one.__name__.replace("_", "-"): one for one in _ALL}
