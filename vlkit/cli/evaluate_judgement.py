"""`vlkit eval caption-judgement | image-caption-choice | text-similarity`: scores of texts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import progress_bar, say
from vlkit.cli.evaluate_common import Data, Format, Images, Shared, Split, remark_on, with_shared_options
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from eval.choice_sets import ChoiceSet
    from vlkit.data.records import Source


@with_shared_options
def caption_judgement(shared: Shared, data: Data, images: Images = None) -> None:
    """CLIPScore and RefCLIPScore against the human judgements of Flickr8k-Expert and Flickr8k-CF."""
    from eval.caption_judgement import CaptionJudgementEvaluator, read_flickr8k_judgements
    from vlkit.data.sources import read_source

    sets = read_flickr8k_judgements(data, images)
    source = read_source(data, format="flickr8k", images=images)
    evaluator = CaptionJudgementEvaluator(sets, batch_size=shared.batch_size, workers=shared.workers)
    embedder = shared.source()
    with progress_bar("caption-judgement", "images and texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = ", ".join(f"{len(one.judgements)} {one.name} judgements" for one in sets)
    shared.finish(evaluation, "caption-judgement", embedder, data, source, title)


@with_shared_options
def image_caption_choice(
    shared: Shared,
    data: Data,
    form: Annotated[
        str,
        typer.Option(
            help="winoground (examples.jsonl), sugarcrepe (its .json file or their folder), or swapped: a substitute "
            "made from any captions by exchanging nouns."
        ),
    ],
    images: Images = None,
    format: Format = None,  # noqa: A002  (the option's name)
    split: Split = None,
) -> None:
    """Choose the caption of an image, and the image of a caption, among ones that are easily confused."""
    from eval.image_caption_choice import ImageCaptionChoiceEvaluator

    source, chosen = _choice_set(form, data, images, format, split)
    for reason, count in chosen.left_out:
        if count:
            say(f"left out: {count} {reason.replace('_', ' ')}")
    evaluator = ImageCaptionChoiceEvaluator(chosen.instances, batch_size=shared.batch_size, workers=shared.workers)
    embedder = shared.source()
    with progress_bar("image-caption-choice", "images and texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    evaluation = replace(
        evaluation,
        protocol={**evaluation.protocol, "instances": chosen.how},
        counts={**evaluation.counts, **dict(chosen.left_out)},
    )
    title = f"{evaluation.counts['instances']} instances, {chosen.how}"
    shared.finish(evaluation, "image-caption-choice", embedder, data, source, title, split)


@with_shared_options
def text_similarity(
    shared: Shared,
    data: Annotated[str, typer.Option(help="Images with captions; or, with --scored, a table of text pairs.")],
    scored: Annotated[bool, typer.Option("--scored", help="Pairs of texts with human scores (STS).")] = False,
    first_column: Annotated[str, typer.Option(help="With --scored: column of one text.")] = "sentence1",
    second_column: Annotated[str, typer.Option(help="With --scored: column of the other.")] = "sentence2",
    score_column: Annotated[str, typer.Option(help="With --scored: column of the score.")] = "score",
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
) -> None:
    """Text against text: captions of one image find each other; or correlation with human scores of pairs."""
    from eval.text_similarity import SameImageCaptionsEvaluator, ScoredPairsEvaluator, read_scored_pairs
    from vlkit.data.sources import read_source

    evaluator: SameImageCaptionsEvaluator | ScoredPairsEvaluator
    if scored:
        if (format, images, split) != (None, None, None):
            raise ConfigError("--format, --images and --split have no effect with --scored. Leave them out.")
        source = _no_images(data, "table")
        evaluator = ScoredPairsEvaluator(read_scored_pairs(data, first_column, second_column, score_column))
    else:
        source = read_source(data, format=format, images=images, split=split)
        remark_on(source, split)
        evaluator = SameImageCaptionsEvaluator(source.records)
    embedder = shared.source()
    with progress_bar("text-similarity", "texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = f"{evaluation.counts['texts']} texts"
    shared.finish(evaluation, "text-similarity", embedder, data, source, title, split)


def _choice_set(
    form: str,
    data: str,
    images: Path | None,
    format: str | None,  # noqa: A002
    split: str | None,
) -> "tuple[Source, ChoiceSet]":
    from eval.choice_sets import FORMS, read_sugarcrepe, read_winoground, swap_nouns
    from vlkit.data.sources import read_source
    from vlkit.errors import did_you_mean

    if form not in FORMS:
        raise ConfigError(f"Unknown form {form!r}. {did_you_mean(form, FORMS)}")
    if form == "swapped":
        source = read_source(data, format=format, images=images, split=split)
        remark_on(source, split)
        return source, swap_nouns(source.records)
    if format is not None or split is not None:
        raise ConfigError(f"--format and --split have no effect with --form {form}. Leave them out.")
    chosen = read_winoground(data, images) if form == "winoground" else read_sugarcrepe(data, images)
    return _no_images(data, form), chosen


def _no_images(data: str, form: str) -> "Source":
    """Stands for data that are no source of images, in the line of the result."""
    from vlkit.data.records import Source

    return Source((), form, Path(data))
