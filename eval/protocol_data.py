"""A protocol and its data on disk made an evaluator: what `vlkit eval suite` and training run.

    prepared = prepare(find_protocol("flickr8k-test"), "data/flickr8k")
    prepared.run(source).metrics

CLIP_benchmark's `wds` folders bring their own class names, templates and kind; `wds_protocols` makes a protocol of
each.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.classification import ClassificationEvaluator
from eval.features import ClassifyingSource
from eval.folds import FoldedRetrieval
from eval.multi_label import MultiLabelEvaluator
from eval.protocols import FROM_DATA, Protocol
from eval.retrieval import RetrievalEvaluator
from vlkit.contracts import Evaluation, Progress
from vlkit.data.records import Record, Source
from vlkit.data.sources import read_source
from vlkit.errors import ConfigError, DataError
from vlkit.models.zero_shot_text import imagenet_class_names

ProtocolEvaluator = FoldedRetrieval | ClassificationEvaluator | MultiLabelEvaluator


@dataclass(frozen=True)
class Prepared:
    """A protocol with its data read and checked.

    Attributes:
        protocol: what fixes the choices.
        evaluator: with its records.
        source: the data.
        data_hash: of the items, captions and labels that enter.
    """

    protocol: Protocol
    evaluator: ProtocolEvaluator
    source: Source
    data_hash: str

    def run(self, source: ClassifyingSource, progress: Progress | None = None) -> Evaluation:
        """Evaluate."""
        return replace(self.evaluator, progress=progress).run(source)


def prepare(
    protocol: Protocol,
    data: str | Path,
    *,
    images: str | Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    num_examples: int = 0,
) -> Prepared:
    """Read the data of a protocol and check that they are what it demands.

    Args:
        protocol: fixes split, captions, names and templates.
        data: its folder or file.
        images: folder of the images where it is not the customary one.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        num_examples: of the report.

    Raises:
        DataError: no such data, or another number of images or classes than the protocol has.
        ConfigError: the format does not bring what the protocol takes from it.
    """
    source = read_source(data, format=protocol.format, images=images, split=protocol.split)
    if protocol.num_images is not None and len(source) != protocol.num_images:
        raise DataError(
            f"{data} gives {len(source)} images"
            + (f" of split {protocol.split}" if protocol.split else "")
            + f"; protocol {protocol.name} has {protocol.num_images}. Numbers on another set cannot be compared with "
            "it; evaluate with `vlkit eval retrieval` or `classification`, or name the right folder."
        )
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "num_examples": num_examples}
    evaluator = _TASKS[protocol.task](protocol, source, options)
    return Prepared(protocol, evaluator, source, _data_hash(evaluator.records))


def find_data(protocol: Protocol, root: str | Path) -> Path:
    """The folder of a protocol's data below `root`, or `root` itself where it is that folder.

    Raises:
        DataError: it is not there.
    """
    root = Path(root)
    for name in protocol.folders:
        if (root / name).exists():
            return root / name
    if root.name in {Path(name).name for name in protocol.folders}:
        return root
    raise DataError(
        f"{root} holds none of {', '.join(protocol.folders)}, which protocol {protocol.name} reads. Put it there, or "
        f"write {protocol.name}=FOLDER."
    )


def wds_protocols(root: str | Path) -> dict[str, tuple[Protocol, Path]]:
    """A protocol for each data set in CLIP_benchmark's `wds` layout below `root`, under the folder's name.

    Raises:
        DataError: there is none.
    """
    root = Path(root)
    folders = sorted(path.parent for path in root.glob("*/test") if any(path.glob("*.tar")))
    if not folders:
        raise DataError(
            f"No data set in CLIP_benchmark's wds layout below {root}; expected {root}/NAME/test/0.tar with "
            "classnames.txt, zeroshot_classification_templates.txt or dataset_type.txt beside test/."
        )
    return {folder.name: (wds_protocol(folder), folder) for folder in folders}


def wds_protocol(data: str | Path) -> Protocol:
    """The protocol of one data set in CLIP_benchmark's `wds` layout: its kind, names and templates are its own.

    Raises:
        DataError: another kind of data than can be evaluated.
    """
    folder = Path(data)
    kind_file = folder / "dataset_type.txt"
    kind = kind_file.read_text(encoding="utf-8").strip() if kind_file.is_file() else "classification"
    name, title = f"wds/{folder.name}", f"CLIP_benchmark's {folder.name}, test part"
    if kind == "retrieval":
        return Protocol(name, title, "retrieval", (folder.name,), "mean_recall@1", "test", "webdataset")
    own: dict[str, Any] = {"templates": FROM_DATA, "class_names": "from the data"}
    if kind == "multilabel":
        metric = "mean_average_precision"
        return Protocol(name, title, "multi-label", (folder.name,), metric, "test", "webdataset", **own)
    if kind != "classification":
        raise DataError(f"{kind_file} says {kind!r}; expected classification, multilabel or retrieval.")
    return Protocol(name, title, "classification", (folder.name,), "accuracy@1", "test", "webdataset", **own)


def _retrieval(protocol: Protocol, source: Source, options: dict[str, Any]) -> FoldedRetrieval:
    records = [record for record in source.records if record.captions]
    if protocol.captions is not None:
        records = [replace(record, captions=record.captions[: protocol.captions]) for record in records]
    return FoldedRetrieval(RetrievalEvaluator(records, **options), protocol.folds)


def _classification(
    protocol: Protocol, source: Source, options: dict[str, Any]
) -> ClassificationEvaluator | MultiLabelEvaluator:
    kept = [name for name in source.class_names if name not in protocol.excluded]
    if protocol.num_classes is not None and len(kept) != protocol.num_classes:
        raise DataError(
            f"{source.root} has {len(kept)} classes (first: {', '.join(kept[:3]) or 'none'}); protocol {protocol.name} "
            f"has {protocol.num_classes}."
        )
    if not protocol.prompts() and not source.templates:
        raise ConfigError(
            f"{source.root} brings no zeroshot_classification_templates.txt, which {protocol.name} needs."
        )
    names, templates = _class_names(protocol, kept), protocol.prompts() or source.templates
    naming = str(protocol.settings("", "")["class_names"])
    if protocol.task == "multi-label":
        del options["num_examples"]
        return MultiLabelEvaluator(source.records, names, templates, naming, **options)
    middle = -(-len(kept) // 2)  # CoOp: the first half, rounded up, is base
    half = {None: slice(None), "base": slice(middle), "new": slice(middle, None)}[protocol.half]
    position = {source.class_names.index(folder): place for place, folder in enumerate(kept[half])}
    records = [
        replace(record, label=position[record.label])
        for record in source.records
        if record.label is not None and record.label in position
    ]
    distinct = protocol.class_names != "imagenet"  # two pairs of its classes share a name
    return ClassificationEvaluator(records, names[half], templates, naming, distinct=distinct, **options)


def _class_names(protocol: Protocol, folders: Sequence[str]) -> tuple[str, ...]:
    if protocol.class_names == "imagenet":
        return imagenet_class_names()
    renamed = dict(protocol.renamed)
    as_given = protocol.class_names == FROM_DATA
    return tuple(renamed.get(name, name if as_given else name.replace("_", " ")) for name in folders)


_TASKS: dict[str, Callable[[Protocol, Source, dict[str, Any]], ProtocolEvaluator]] = {
    "retrieval": _retrieval,
    "classification": _classification,
    "multi-label": _classification,
}


def _data_hash(records: Sequence[Record]) -> str:
    found = hashlib.sha256()
    for record in records:
        several = () if record.labels is None else (record.labels,)
        found.update(repr((record.key, record.captions, record.label, *several)).encode("utf-8", "backslashreplace"))
    return found.hexdigest()[:12]
