"""Evaluators of labelled images out of a run file's [[eval]] section; see `eval.training_evaluators`."""

from collections.abc import Sequence
from pathlib import Path

from eval.base_to_new import SHOTS, BaseToNewEvaluator, CrossDatasetEvaluator, GeneralisationSet, ZeroShot
from eval.class_names import NamedClasses, name_classes
from eval.classification import ClassificationEvaluator
from eval.cluster_and_name import ClusterAndNameEvaluator
from eval.doubly_right import DoublyRightEvaluator
from eval.few_shot import FewShotEvaluator
from eval.image_retrieval import ImageRetrievalEvaluator, read_relevance
from eval.knn import KnnEvaluator
from eval.labelled import divide
from eval.multi_label import MultiLabelEvaluator
from eval.ood import Kind, OodEvaluator, OutSet
from eval.probe import LinearProbeEvaluator
from eval.rate_reduction import CppSettings
from eval.vocabulary_free import VocabularyFreeEvaluator
from eval.worst_group import WorstGroupEvaluator, read_groups
from vlkit.addons.class_weights.templates import load_templates
from vlkit.addons.words import caption_nouns
from vlkit.contracts import Evaluator
from vlkit.data.records import Source
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError


def classification(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    image_column: str | None = None,
    class_column: str | None = None,
    templates: str | None = None,
    class_names: str | None = None,
    exclude: Sequence[str] = (),
) -> Evaluator:
    """`vlkit eval classification`, of one or of several classes an image."""
    source, classes = _classes(data, images, format, split, class_names, exclude, image_column, class_column)
    chosen: str | tuple[str, ...] = templates or source.templates or "simple"
    if isinstance(chosen, str):
        load_templates(chosen)
    several = any(record.labels is not None for record in classes.records)
    make = MultiLabelEvaluator if several else ClassificationEvaluator
    return make(classes.records, classes.names, chosen, classes.how)


def doubly_right(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    class_names: str | None = None,
    exclude: Sequence[str] = (),
    k: int = 5,
) -> Evaluator:
    """`vlkit eval doubly-right`."""
    _, classes = _classes(data, images, format, split, class_names, exclude)
    return DoublyRightEvaluator(classes.records, classes.names, k)


def probe(data: str, *, images: str | None = None, format: str | None = None, seed: int = 0) -> Evaluator:  # noqa: A002
    """`vlkit eval probe`."""
    _, classes = _classes(data, images, format)
    return LinearProbeEvaluator(divide(classes.records, seed), classes.names, seed=seed)


def few_shot(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    seed: int = 0,
) -> Evaluator:
    """`vlkit eval few-shot`."""
    _, classes = _classes(data, images, format)
    return FewShotEvaluator(divide(classes.records, seed), classes.names, tuple(shots), tuple(seeds))


def knn(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    k: Sequence[int] = (1, 5, 10, 20),
    temperature: float = 0.07,
    seed: int = 0,
) -> Evaluator:
    """`vlkit eval knn`."""
    _, classes = _classes(data, images, format)
    return KnnEvaluator(divide(classes.records, seed), classes.names, tuple(k), temperature, seed=seed)


def base_to_new(data: str, *, templates: str = "simple", shots: int = SHOTS, seed: int = 0) -> Evaluator:
    """`vlkit eval base-to-new`, zero-shot; `data` may be several sets."""
    load_templates(templates)
    return BaseToNewEvaluator(_sets(data.split("::"), seed), ZeroShot(templates), shots)


def cross_dataset(
    data: str, *, targets: Sequence[str], templates: str = "simple", shots: int = SHOTS, seed: int = 0
) -> Evaluator:
    """`vlkit eval cross-dataset`, zero-shot."""
    load_templates(templates)
    sets = _sets([data, *targets], seed)
    return CrossDatasetEvaluator(sets[0], sets[1:], ZeroShot(templates), shots)


def ood(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    near: Sequence[str] = (),
    far: Sequence[str] = (),
    shifted: Sequence[str] = (),
    templates: str = "simple",
    temperature: float = 1.0,
) -> Evaluator:
    """`vlkit eval ood`."""
    load_templates(templates)
    _, classes = _classes(data, images, format, split)
    sides: dict[Kind, Sequence[str]] = {"near": near, "far": far, "shifted": shifted}
    outside = [OutSet(kind, Path(p).stem, read_source(p).records) for kind, paths in sides.items() for p in paths]
    return OodEvaluator(classes.records, classes.names, outside, templates, temperature)


def image_retrieval(
    data: str,
    *,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    relevance: str | None = None,
    seed: int = 0,
) -> Evaluator:
    """`vlkit eval image-retrieval`."""
    lists = None if relevance is None else read_relevance(relevance)
    _, classes = _classes(data, images, format, split)
    return ImageRetrievalEvaluator(classes.records, None, lists, seed=seed)


def worst_group(
    data: str,
    *,
    groups: str,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    key_column: str = "file",
    group_column: str = "group",
    by_class: bool = False,
    min_images: int = 1,
    templates: str = "simple",
) -> Evaluator:
    """`vlkit eval worst-group`."""
    load_templates(templates)
    table = read_groups(groups, key_column, group_column)
    _, classes = _classes(data, images, format, split)
    inner = ClassificationEvaluator(classes.records, classes.names, templates, classes.how)
    return WorstGroupEvaluator(inner, table, by_class, min_images)


def vocabulary_free(
    data: str, *, captions: str, num_captions: int = 10, alpha: float = 0.7, template: str = "a photo of a {}"
) -> Evaluator:
    """`vlkit eval vocabulary-free`."""
    _, classes = _classes(data)
    return VocabularyFreeEvaluator(classes.records, classes.names, _captions(captions), num_captions, alpha, template)


def cluster_and_name(
    data: str, *, clusters: Sequence[int], captions: str, hidden: int = 4096, dim: int = 128, epochs: int = 15
) -> Evaluator:
    """`vlkit eval cluster-and-name`."""
    _, classes = _classes(data)
    settings = CppSettings(hidden=hidden, dim=dim, epochs=epochs)
    words = caption_nouns(_captions(captions))
    return ClusterAndNameEvaluator(classes.records, classes.names, words, tuple(clusters), settings)


def _classes(
    data: str,
    images: str | None = None,
    format: str | None = None,  # noqa: A002
    split: str | None = None,
    class_names: str | None = None,
    exclude: Sequence[str] | None = None,
    image_column: str | None = None,
    class_column: str | None = None,
) -> tuple[Source, NamedClasses]:
    columns = {"image_column": image_column, "class_column": class_column}
    source = read_source(data, format=format, images=images, split=split, **columns)
    file = None if class_names is None else Path(class_names)
    return source, name_classes(source.class_names, source.records, file, exclude or ())


def _sets(paths: Sequence[str], seed: int) -> list[GeneralisationSet]:
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"Data sets {', '.join(names)}: each needs a folder name of its own.")
    found = []
    for name, path in zip(names, paths, strict=True):
        _, classes = _classes(path)
        parts = divide(classes.records, seed)
        train = (*parts.train, *parts.val)
        found.append(GeneralisationSet(name, classes.names, train, parts.test, parts.how))
    return found


def _captions(data: str) -> list[str]:
    """Those of split train where there are splits: names must not come from the test set."""
    records = read_source(data).records
    train = [record for record in records if record.split == "train"] or records
    texts = [text for record in train for text in record.captions]
    if not texts:
        raise DataError(f"{data} has no captions. Name images with captions.")
    return texts
