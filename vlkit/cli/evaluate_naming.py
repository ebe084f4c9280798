"""`vlkit eval vocabulary-free | cluster-and-name`: names for images nobody listed classes for."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import progress_bar, say
from vlkit.cli.evaluate_common import (
    ClassNames,
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
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.data.records import Record, Source

Captions = Annotated[str, typer.Option(help="Images with captions to take names from, e.g. a training set.")]


@with_shared_options
def vocabulary_free(
    shared: Shared,
    data: Data,
    captions: Captions,
    num_captions: Annotated[int, typer.Option(min=1, help="Nearest captions of an image.")] = 10,
    alpha: Annotated[float, typer.Option(help="Weight of the image; the rest is that of its captions.")] = 0.7,
    template: Annotated[str, typer.Option(help="Of a candidate name.")] = "a photo of a {}",
    class_names: ClassNames = None,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
) -> None:
    """CaSED: name images with the nouns of their nearest captions; the classes only measure the names."""
    from eval.vocabulary_free import VocabularyFreeEvaluator

    source, records, names = _with_classes(data, images, format, split, class_names, exclude)
    evaluator = VocabularyFreeEvaluator(
        records,
        names,
        caption_texts(captions),
        num_captions,
        alpha,
        template,
        batch_size=shared.batch_size,
        workers=shared.workers,
    )
    embedder = shared.source()
    with progress_bar("vocabulary-free", "images and captions") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = f"{evaluation.counts['images']} images, {evaluation.counts['names']} names from {captions}"
    shared.finish(evaluation, "vocabulary-free", embedder, data, source, title, split)


@with_shared_options
def cluster_and_name(
    shared: Shared,
    data: Data,
    clusters: Annotated[str, typer.Option(help="How many; several with commas: the coding length chooses.")],
    captions: Annotated[str | None, typer.Option(help="Images with captions whose nouns name clusters.")] = None,
    words: Annotated[Path | None, typer.Option(help="A file with a name a line, in place of captions.")] = None,
    template: Annotated[str, typer.Option(help="Of a name.")] = "a photo of a {}",
    hidden: Annotated[int, typer.Option(min=1, help="Width of the trained head.")] = 4096,
    dim: Annotated[int, typer.Option(min=1, help="Of its features and codes.")] = 128,
    eta: Annotated[float, typer.Option(help="Temperature of the memberships.")] = 0.175,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the features.")] = 15,
    warm_up: Annotated[int, typer.Option(min=0, help="First steps, which only spread the features.")] = 50,
    head_batch: Annotated[int, typer.Option(min=2, help="Images a step of the head.")] = 1024,
    lr: Annotated[float, typer.Option(help="Learning rate of the head.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of the head's training and of the clustering.")] = 0,
    class_names: ClassNames = None,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    split: Split = None,
) -> None:
    """CPP: cluster images by rate reduction, find how many clusters there are, and name them.

    Classes, where the data have them, only measure. --per-item FILE.parquet keeps cluster and name of every image.
    """
    from eval.cluster_and_name import ClusterAndNameEvaluator
    from eval.rate_reduction import CppSettings
    from vlkit.addons.words import caption_nouns

    if words is not None and captions is not None:
        raise ConfigError("--words and --captions both name clusters; give one.")
    settings = CppSettings(hidden, dim, eta, epochs, warm_up, head_batch, lr, seed)
    numbers = _numbers(clusters)
    source, records, names = _with_classes(data, images, format, split, class_names, exclude)
    vocabulary = caption_nouns(caption_texts(captions)) if captions is not None else _lines(words)
    evaluator = ClusterAndNameEvaluator(
        records, names, vocabulary, numbers, settings, template, shared.batch_size, shared.workers
    )
    embedder = shared.source()
    with progress_bar("cluster-and-name", "images and steps") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    for number, name in enumerate(evaluation.figures["cluster_names"]):
        say(f"cluster {number}: {name}")
    title = f"{evaluation.counts['images']} images, {evaluation.counts['clusters']} clusters"
    shared.finish(evaluation, "cluster-and-name", embedder, data, source, title, split)


def caption_texts(data: str) -> list[str]:
    """Captions of a source; of its split train where it has splits, since names must not come from the test set."""
    from vlkit.data.sources import read_source

    records = read_source(data).records
    train = [record for record in records if record.split == "train"] or records
    texts = [text for record in train for text in record.captions]
    if not texts:
        raise DataError(f"{data} has no captions. Name images with captions.")
    say(f"names come from {len(texts)} captions of {data}" + (", split train" if len(train) < len(records) else ""))
    return texts


def _with_classes(
    data: str,
    images: Path | None,
    format: str | None,  # noqa: A002  (the option's name)
    split: str | None,
    class_names: Path | None,
    exclude: list[str] | None,
) -> "tuple[Source, tuple[Record, ...], tuple[str, ...]]":
    """Images with the names of their classes, or without any: these commands are for folders that nobody sorted."""
    from vlkit.data.sources import read_source

    if class_names is None and not exclude:
        source = read_source(data, format=format, images=images, split=split)
        if not source.class_names:
            remark_on(source, split)
            say("The images have no classes, so nothing is measured; --per-item FILE.parquet keeps what is found.")
            return source, tuple(source.records), ()
    source, classes = read_classes(data, images, format, split, class_names, exclude)
    return source, tuple(classes.records), tuple(classes.names)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--clusters is {text!r}; expected numbers, separated by commas.") from error


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the words {file}: {error}.") from error
