"""`vlkit eval vocabulary-free | cluster-and-name`: names for images nobody listed classes for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.console import say
from vlkit.cli.evaluate_common import Shared, with_shared_options
from vlkit.cli.evaluate_options import ClassSplit, parse_numbers, read_lines_of
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.contracts import Evaluation

Captions = Annotated[str, typer.Option(help="Images with captions to take names from, e.g. a training set.")]


@with_shared_options
def vocabulary_free(
    shared: Shared,
    unsorted: ClassSplit,
    captions: Captions,
    num_captions: Annotated[int, typer.Option(min=1, help="Nearest captions of an image.")] = 10,
    alpha: Annotated[float, typer.Option(help="Weight of the image; the rest is that of its captions.")] = 0.7,
    template: Annotated[str, typer.Option(help="Of a candidate name.")] = "a photo of a {}",
) -> None:
    """CaSED: name images with the nouns of their nearest captions; the classes only measure the names."""
    from eval.vocabulary_free import VocabularyFreeEvaluator

    source, classes = unsorted.read_if_any()
    evaluator = VocabularyFreeEvaluator(
        classes.records,
        classes.names,
        caption_texts(captions),
        num_captions,
        alpha,
        template,
        batch_size=shared.batch_size,
        workers=shared.workers,
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['images']} images, {evaluation.counts['names']} names from {captions}"

    shared.run(
        evaluator,
        "vocabulary-free",
        "images and captions",
        data=unsorted.data,
        source=source,
        title=title,
        split=unsorted.split,
    )


@with_shared_options
def cluster_and_name(
    shared: Shared,
    unsorted: ClassSplit,
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
    numbers = parse_numbers(clusters, "--clusters")
    source, classes = unsorted.read_if_any()
    vocabulary = caption_nouns(caption_texts(captions)) if captions is not None else _words(words)
    evaluator = ClusterAndNameEvaluator(
        classes.records, classes.names, vocabulary, numbers, settings, template, shared.batch_size, shared.workers
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['images']} images, {evaluation.counts['clusters']} clusters"

    evaluation = shared.run(
        evaluator,
        "cluster-and-name",
        "images and steps",
        data=unsorted.data,
        source=source,
        title=title,
        split=unsorted.split,
    )
    for number, name in enumerate(evaluation.figures["cluster_names"]):
        say(f"cluster {number}: {name}")


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


def _words(file: Path | None) -> list[str]:
    return [] if file is None else [line.strip() for line in read_lines_of(file, "words") if line.strip()]
