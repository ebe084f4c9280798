"""`vlkit eval probe | few-shot | knn | base-to-new | cross-dataset`: what frozen features and few labels are worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.evaluate_common import Exclude, Format, Images, Shared, remark_on, with_shared_options
from vlkit.cli.evaluate_options import ClassData, Seed, named_path, parse_numbers
from vlkit.cli.options import Templates
from vlkit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from eval.base_to_new import GeneralisationSet
    from vlkit.contracts import Evaluation
    from vlkit.data.records import Source


@with_shared_options
def probe(shared: Shared, labelled: ClassData, seed: Seed = 0) -> None:
    """Linear probe: L-BFGS logistic regression on frozen features, C chosen on validation; image-only models too."""
    source, classes = labelled.read()
    from eval.labelled import divide
    from eval.probe import LinearProbeEvaluator

    parts = divide(classes.records, seed)
    evaluator = LinearProbeEvaluator(
        parts, classes.names, batch_size=shared.batch_size, workers=shared.workers, seed=seed
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['images']} test images, {len(classes.names)} classes"

    shared.run(evaluator, "probe", "images", data=labelled.data, source=source, title=title)


@with_shared_options
def few_shot(
    shared: Shared,
    labelled: ClassData,
    shots: Annotated[str, typer.Option(help="Images a class, separated by commas.")] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Seeds of the draws, separated by commas.")] = "1,2,3",
    seed: Seed = 0,
) -> None:
    """Linear probes on a few images a class, averaged over draws."""
    chosen, drawn = parse_numbers(shots, "--shots"), parse_numbers(seeds, "--seeds")
    source, classes = labelled.read()
    from eval.few_shot import FewShotEvaluator
    from eval.labelled import divide

    parts = divide(classes.records, seed)
    evaluator = FewShotEvaluator(
        parts, classes.names, chosen, drawn, batch_size=shared.batch_size, workers=shared.workers
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['images']} test images, {len(classes.names)} classes, {len(drawn)} draws"

    shared.run(evaluator, "few-shot", "images and fits", data=labelled.data, source=source, title=title)


@with_shared_options
def knn(
    shared: Shared,
    labelled: ClassData,
    k: Annotated[str, typer.Option("-k", help="Numbers of neighbours, separated by commas.")] = "1,5,10,20",
    temperature: Annotated[float, typer.Option(help="A neighbour at cosine s votes exp(s / temperature).")] = 0.07,
    seed: Seed = 0,
) -> None:
    """Weighted vote of the k nearest training images; nothing is fitted."""
    ks = parse_numbers(k, "-k")
    source, classes = labelled.read()
    from eval.knn import KnnEvaluator
    from eval.labelled import divide

    parts = divide(classes.records, seed)
    evaluator = KnnEvaluator(
        parts, classes.names, ks, temperature, batch_size=shared.batch_size, workers=shared.workers, seed=seed
    )

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['images']} test images, {evaluation.counts['train_images']} neighbours"

    shared.run(evaluator, "knn", "images", data=labelled.data, source=source, title=title)


@with_shared_options
def base_to_new(
    shared: Shared,
    data: Annotated[list[str], typer.Option(help="A data set with classes; may be repeated, also as NAME=PATH.")],
    templates: Templates = "simple",
    shots: Annotated[int, typer.Option(min=1, help="Images a base class.")] = 16,
    exclude: Exclude = None,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    seed: Seed = 0,
) -> None:
    """CoOp's base and new classes, the zero-shot classifier in both; harmonic mean of the averages."""
    from eval.base_to_new import BaseToNewEvaluator, ZeroShot
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    source, sets = _sets(data, images, format, exclude, seed)
    evaluator = BaseToNewEvaluator(
        sets, ZeroShot(templates), shots, batch_size=shared.batch_size, workers=shared.workers
    )
    title = f"{len(sets)} sets, zero-shot"
    shared.run(evaluator, "base-to-new", "sets", data="::".join(data), source=source, title=lambda _: title)


@with_shared_options
def cross_dataset(
    shared: Shared,
    data: Annotated[str, typer.Option(help="The data set that is learned on, also as NAME=PATH.")],
    target: Annotated[list[str], typer.Option(help="A data set to test on; may be repeated, also as NAME=PATH.")],
    templates: Templates = "simple",
    shots: Annotated[int, typer.Option(min=1, help="Images a class of the data learned on.")] = 16,
    format: Format = None,  # noqa: A002  (the option's name)
    images: Images = None,
    seed: Seed = 0,
) -> None:
    """CoOp's transfer from one data set to others, with the zero-shot classifier."""
    from eval.base_to_new import CrossDatasetEvaluator, ZeroShot
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    source, sets = _sets([data, *target], images, format, None, seed)
    evaluator = CrossDatasetEvaluator(
        sets[0], sets[1:], ZeroShot(templates), shots, batch_size=shared.batch_size, workers=shared.workers
    )
    title, named = f"{len(sets) - 1} targets, zero-shot", "::".join([data, *target])
    shared.run(evaluator, "cross-dataset", "sets", data=named, source=source, title=lambda _: title)


def _sets(
    data: list[str],
    images: Path | None,
    format: str | None,  # noqa: A002
    exclude: list[str] | None,
    seed: int,
) -> "tuple[Source, list[GeneralisationSet]]":
    from eval.base_to_new import GeneralisationSet
    from eval.class_names import name_classes
    from eval.labelled import divide
    from vlkit.data.sources import read_source

    sets, known = [], set()
    for item in data:
        name, path = named_path(item)
        source = read_source(path, format=format, images=images)
        remark_on(source, None)
        known |= set(source.class_names)
        # A class of one set need not be in the others.
        classes = name_classes(
            source.class_names, source.records, None, [one for one in exclude or () if one in source.class_names]
        )
        parts = divide(classes.records, seed)
        sets.append(GeneralisationSet(name, classes.names, (*parts.train, *parts.val), parts.test, parts.how))
    for one in exclude or ():
        if one not in known:
            raise ConfigError(f"No data set has a class folder {one!r} to exclude. {did_you_mean(one, sorted(known))}")
    return source, sets
