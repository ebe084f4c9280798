"""What fitting an add-on may see, and from which split. The test split is refused by type.

    reference = Reference(
        task="retrieval", images=Part.of(vectors, "train"), captions=Captions(texts, vectors, "train"),
    )
    pipeline = Pipeline([Mean()]).fit(reference, source)

Labelled parts hold a split that is not the test split; the test images can only come as a `Stream`, which has no
labels, and only add-ons that declare "test_stream" are shown it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.contracts import Progress
from vlkit.data.images import ImageLike
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError
from vlkit.features.model_card import ModelCard
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import EmbeddedChunk, Embedder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlkit.addons.base import AddOn, Need, Task
    from vlkit.addons.passes import Passes

# Scores of labelled images (n,C) and their labels (n,) to a number, more is better.
Metric = Callable[[Tensor, Tensor], float]
_EXTRAS = frozenset({"patches", "patch_tokens", "views"})


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose class has the highest logit: the metric hyper-parameters are chosen by."""
    return (logits.argmax(1) == labels).double().mean().item()


@dataclass(frozen=True)
class Part:
    """Images of one split, with labels where they have any.

    Attributes:
        split: its name, which is not "test".
        vectors: (n,D) features.
        labels: (n,) int64 classes, or None.
        records: where the images lie; needed by add-ons that declare "pixels", and before those that edit towers.
    """

    split: str
    vectors: Vectors
    labels: Tensor | None = None
    records: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: the test split.
            DataError: rows that do not go together, or features that are not finite.
        """
        _refuse_test(self.split)
        _check_rows(self.split, self.vectors, self.labels, self.records)

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, which: Sequence[int]) -> "Part":
        """Some of the images."""
        labels = None if self.labels is None else self.labels[list(which)]
        records = tuple(self.records[row] for row in which) if self.records else ()
        return Part(self.split, self.vectors.rows(list(which)), labels, records)


@dataclass(frozen=True)
class Captions:
    """Texts of one split, which is not the test split.

    Attributes:
        texts: (m,) strings.
        vectors: (m,D) features.
        split: its name.
        image_row: (m,) the row of `Reference.images` each describes, where that is known.
    """

    texts: tuple[str, ...]
    vectors: Vectors
    split: str
    image_row: Tensor | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: the test split.
            DataError: rows that do not go together, or features that are not finite.
        """
        _refuse_test(self.split)
        _check_rows(self.split, self.vectors, self.image_row, self.texts)

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Stream:
    """The test images in the order they come, without labels: for add-ons that are transductive and say so."""

    vectors: Vectors
    records: tuple[Record, ...] = ()

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Reference:
    """Everything that is there to fit on. Each add-on is shown what it declares; see `restricted`.

    Attributes:
        task: what the add-on will be used for.
        images: unlabelled images ("unlabelled_images").
        captions: texts ("captions").
        class_names: (C,) classes ("class_names").
        few_shot: a few labelled images of every class ("few_shot_labels").
        val: labelled validation images ("val_labels"), disjoint from `few_shot`.
        labelled: a whole labelled training set ("labels").
        stream: the unlabelled test images ("test_stream").
        metric: what hyper-parameters are chosen by, on `val`.
        seed: of whatever is drawn while fitting.
        passes: where features of records under edits, and views, come from; None where no such add-on is fitted.
        weights: set by the pipeline: class weights so far (with "class_names"), texts already mapped.
        logits: set by the pipeline: logits (n,C) that the add-ons before give image vectors (with "class_names").
        before: set by the pipeline: keys of the add-ons before that change features.
        partial: the few-shot images may leave classes out, while their labels are still being asked for.
    """

    task: "Task" = "classification"
    images: Part | None = None
    captions: Captions | None = None
    class_names: tuple[ClassName, ...] = ()
    few_shot: Part | None = None
    val: Part | None = None
    labelled: Part | None = None
    stream: Stream | None = None
    metric: Metric = accuracy
    seed: int = 0
    passes: "Passes | None" = field(default=None, repr=False)
    weights: ClassWeights | None = None
    logits: Callable[[Vectors], Tensor] | None = field(default=None, repr=False)
    before: tuple[str, ...] = ()
    partial: bool = False

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: labels that are missing, that are no class, or few-shot images that leave a class out.
        """
        for what, part in (("few-shot", self.few_shot), ("validation", self.val), ("labelled", self.labelled)):
            if part is not None:
                self._check_labels(what, part)
        if self.few_shot is not None and self.class_names and not self.partial:
            assert self.few_shot.labels is not None
            counts = torch.bincount(self.few_shot.labels, minlength=len(self.class_names))
            missing = [self.class_names[c].shown for c in (counts == 0).nonzero().flatten().tolist()]
            if missing:
                raise DataError(
                    f"The few-shot images leave out {len(missing)} of {len(self.class_names)} classes (first: "
                    f"{missing[0]!r}); every class needs at least one. Add images or leave the class out."
                )

    def gives(self) -> dict[str, str]:
        """What is there: need -> in words."""
        parts = {
            "unlabelled_images": self.images,
            "captions": self.captions,
            "few_shot_labels": self.few_shot,
            "val_labels": self.val,
            "labels": self.labelled,
        }
        found = {need: f"{part.split}: {len(part)}" for need, part in parts.items() if part is not None and len(part)}
        if self.class_names:
            found["class_names"] = f"{len(self.class_names)}"
        if self.stream is not None:
            found["test_stream"] = f"test: {len(self.stream)}, unlabelled"
        images = [part for part in (self.images, self.few_shot, self.val, self.labelled, self.stream) if part]
        if images and all(part.records for part in images):
            found["pixels"] = "records"
        return found

    def summary(self) -> dict[str, str]:
        """As `gives`, for the record."""
        return {need: words for need, words in self.gives().items() if need != "pixels"}

    def image_parts(self) -> dict[str, Part | Stream]:
        """The parts that hold images, by attribute."""
        names = ("images", "few_shot", "val", "labelled", "stream")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def _check_labels(self, what: str, part: Part) -> None:
        if part.labels is None:
            raise DataError(f"The {what} images have no labels; expected one for each of {len(part)}.")
        highest = int(part.labels.max()) if len(part) else -1
        lowest = int(part.labels.min()) if len(part) else 0
        if lowest < 0 or (self.class_names and highest >= len(self.class_names)):
            raise DataError(
                f"The {what} images have labels from {lowest} to {highest}; expected 0 to {len(self.class_names) - 1}."
            )


def restricted(addon: "AddOn", reference: Reference, embedder: FeatureSource) -> tuple[Reference, FeatureSource]:
    """What one add-on may see of a reference, and of the model.

    Raises:
        ConfigError: it makes no sense for the task, or the reference lacks what it needs; the message says what.
    """
    if reference.task not in addon.tasks:
        raise ConfigError(f"{addon.name} is for {' and '.join(sorted(addon.tasks))}, not for {reference.task}.")
    given = reference.gives()
    lacking = sorted(need for need in addon.needs if need in _HOW and need not in given)
    if lacking:
        raise ConfigError(f"{addon.name} needs {', '.join(f'{need} ({_HOW[need]})' for need in lacking)}.")
    allowed: frozenset[Need] = addon.needs | addon.uses
    hidden = {field_: None for need, field_ in _FIELDS.items() if need not in allowed}
    seen = replace(reference, **hidden)  # type: ignore[arg-type]
    if "class_names" not in allowed:
        seen = replace(seen, class_names=(), weights=None, logits=None)
    keep_records = "pixels" in allowed
    changed = {
        name: replace(part, vectors=part.vectors.only(allowed & _EXTRAS), records=part.records if keep_records else ())
        for name, part in seen.image_parts().items()
    }
    seen = replace(seen, **changed)  # type: ignore[arg-type]
    inside = bool(allowed & {"grad_text", "grad_image", "pixels", "oracle", "patches", "patch_tokens", "extra_model"})
    return replace(seen, passes=seen.passes if keep_records else None), _Declared(embedder, addon.name, inside)


@dataclass(frozen=True)
class _Declared(FeatureSource):
    """A model that shows its inside only to those who declared that they need it."""

    plain: FeatureSource
    who: str
    inside: bool

    @property
    def card(self) -> ModelCard:
        return self.plain.card

    @property
    def embedder(self) -> Embedder:
        assert self.inside, f"{self.who} reaches into the model, but its `needs` name no grad_text, grad_image, pixels"
        return self.plain.embedder

    def iterate_embeddings(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> "Iterator[EmbeddedChunk]":
        return self.plain.iterate_embeddings(images, batch_size, progress, workers)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        return self.plain.embed_texts(texts, batch_size, progress)


_FIELDS: "dict[Need, str]" = {
    "unlabelled_images": "images",
    "captions": "captions",
    "few_shot_labels": "few_shot",
    "val_labels": "val",
    "labels": "labelled",
    "test_stream": "stream",
}


def needed_for(part: str) -> "Need":
    """The need that stands for a part of a reference, by the part's attribute."""
    return next(need for need, name in _FIELDS.items() if name == part)


# What must be in a reference, and how a user gives it.
_HOW = {
    "unlabelled_images": "images of another split than the test split; --reference names them",
    "captions": "captions of another split than the test split; --reference names them",
    "class_names": "the names of the classes",
    "few_shot_labels": "labelled images of every class; `vlkit adapt` takes them from a folder",
    "val_labels": "labelled validation images; `vlkit adapt` holds some out",
    "labels": "a labelled training set",
    "test_stream": "the test images themselves: nothing is fitted beforehand, --addon names it where images are judged",
    "pixels": "images that can be read anew, not features alone",
}


def _refuse_test(split: str) -> None:
    if split.lower() == "test":
        raise ConfigError(
            "Add-ons are not fitted on the test split. Give train or val images; what a method may see of the test "
            "split without labels (test_stream) the evaluator gives it, and says so in the result."
        )


def _check_rows(split: str, vectors: Vectors, column: Tensor | None, names: Sequence[object]) -> None:
    if (column is not None and len(column) != len(vectors)) or (names and len(names) != len(vectors)):
        raise DataError(f"{len(vectors)} features of split {split}, but another number of labels, records or texts.")
    broken = int((~vectors.pooled.isfinite().all(1)).sum())
    if broken:
        raise DataError(
            f"{broken} of {len(vectors)} reference features of split {split} are not finite. Embed them again, or use "
            "another checkpoint: this one is damaged or diverged."
        )
