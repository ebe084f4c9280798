"""From paths to one result an image, in the order of the paths, without stopping at broken ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlkit.addons.adapted import AdaptedClassifier
from vlkit.addons.classifier import ZeroShotClassifier
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.classify.close_calls import SecondLook
from vlkit.contracts import Progress
from vlkit.data.records import ImageRef, Problems, Record, Source
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import Embedder


class Classified(NamedTuple):
    """The best classes of one image, most probable first."""

    record: Record
    classes: tuple[tuple[str, float], ...]
    unsure: bool  # the best probability is below the threshold


class Unreadable(NamedTuple):
    """An image that could not be decoded, and why."""

    record: Record
    reason: str


def gather_images(paths: Sequence[str | Path]) -> Source:
    """Every image behind folders (recursive), image files, tars and folders of tars.

    Keys are the paths as a user would type them, so that results can be found again.

    Raises:
        DataError: a path does not exist, or there is no image behind any of them.
    """
    records: list[Record] = []
    problems = Problems()
    for given in paths:
        path = Path(given)
        if path.is_file() and path.suffix.lower() != ".tar":
            records.append(Record(key=str(given), image=ImageRef(path=str(path))))
            continue
        if not path.exists():
            raise DataError(f"{given} does not exist; expected an image, a folder of images, or a .tar shard.")
        source = read_source(path, format=_container_format(path))
        records += [_named(record, path) for record in source.records]
        for cause, count in source.problems.counts.items():
            problems.counts[cause] += count
            problems.examples.setdefault(cause, []).extend(source.problems.examples[cause])
    if not records:
        raise DataError("There is no image behind the given paths; give image files, folders or .tar shards.")
    return Source(records=tuple(records), format="images", root=Path(paths[0]), problems=problems)


def classify_images(
    embedder: Embedder | FeatureSource,
    classifier: ZeroShotClassifier,
    records: Sequence[Record],
    *,
    top: int = 5,
    min_probability: float = 0.0,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
    second_look: SecondLook | None = None,
) -> Iterator[Classified | Unreadable]:
    """Classify images one after the other, in the order of `records`.

    Args:
        embedder: the encoder the classifier was built with, or it with its cache.
        classifier: class weights and how they become probabilities.
        records: where the images lie.
        top: how many classes to give for each image.
        min_probability: in [0, 1]; images whose best class stays below are marked unsure.
        batch_size: images encoded together.
        workers: processes or threads that decode; 0 decodes in this one.
        progress: called with (images done, all images).
        second_look: encodes close calls again in fp32, where `embedder` is in bf16.

    Yields:
        `Classified`, or `Unreadable` for an image that cannot be decoded.

    Raises:
        ConfigError: `top` or `min_probability` out of range.
    """
    if not 0 <= min_probability <= 1:
        raise ConfigError(f"The minimum probability is {min_probability}; it must lie between 0 and 1.")
    if top < 1:
        raise ConfigError(f"top is {top}; it must be at least 1.")
    done = 0
    chunks = embedder.iterate_embeddings(records, batch_size=batch_size, workers=workers)
    if second_look is not None:
        chunks = second_look.settle(chunks, records, batch_size, workers)
    for chunk in chunks:
        results: dict[int, Classified | Unreadable] = {
            row: Unreadable(records[row], reason) for row, reason in chunk.failures
        }
        if chunk.rows:
            predictions = classifier.predict(chunk.embeddings, top)
            for row, best, probabilities in zip(
                chunk.rows, predictions.indices.tolist(), predictions.probabilities.tolist(), strict=True
            ):
                named = tuple((classifier.class_names[i], p) for i, p in zip(best, probabilities, strict=True))
                results[row] = Classified(records[row], named, probabilities[0] < min_probability)
        yield from (results[row] for row in sorted(results))
        done += len(results)
        if progress is not None:
            progress(done, len(records))


def classify_with_addons(
    source: FeatureSource,
    pipeline: Pipeline,
    classifier: AdaptedClassifier,
    records: Sequence[Record],
    *,
    top: int = 5,
    min_probability: float = 0.0,
    batch_size: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Classified | Unreadable]:
    """As `classify_images`, through add-ons; a streaming one remembers the images before.

    Args:
        source: the model, without edits.
        pipeline: fitted.
        classifier: that `pipeline.classifier` made.
        records, top, min_probability, batch_size, workers, progress: as there.
    """
    for start in range(0, len(records), batch_size):
        chunk = records[start : start + batch_size]
        # New for each chunk: they keep what they read.
        passes = Passes(source, local=pipeline.local, batch_size=batch_size, workers=workers)
        read = passes.read(chunk, pipeline.edits, pipeline.views)
        results: dict[int, Classified | Unreadable] = {
            row: Unreadable(chunk[row], reason) for row, reason in read.failures
        }
        if read.kept:
            logits, classifier = classifier.step(read.vectors)
            best = classifier.best(logits, top)
            for row, indices, probabilities in zip(
                read.kept, best.indices.tolist(), best.probabilities.tolist(), strict=True
            ):
                named = tuple((classifier.class_names[i], p) for i, p in zip(indices, probabilities, strict=True))
                results[row] = Classified(chunk[row], named, probabilities[0] < min_probability)
        yield from (results[row] for row in sorted(results))
        if progress is not None:
            progress(start + len(chunk), len(records))


def _container_format(path: Path) -> str:
    if path.is_file():
        return "webdataset"
    holds_tars = any(child.suffix.lower() == ".tar" for child in path.iterdir())
    return "webdataset" if holds_tars else "folder"


def _named(record: Record, container: Path) -> Record:
    if record.image.path is not None and record.image.offset is None:
        return Record(key=record.image.path, image=record.image)
    return Record(key=f"{container}::{record.key}", image=record.image)
