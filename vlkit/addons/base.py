"""The interface of every method that acts on a frozen model: what it needs, how it is fitted, where it acts.

    @dataclass(frozen=True)
    class MyTerm(Term):
        needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels"})
        alpha: float = 1.0                            # a setting: `--addon my_term:alpha=2`
        keys: Tensor | None = learned()               # filled by `learn`, saved with the add-on

        def learn(self, reference, embedder, progress=None):
            return replace(self, keys=reference.few_shot.vectors.pooled)

        def term(self, queries, logits): ...

An add-on is a frozen dataclass below the class of its slot, one file in the slot's folder, whose last line names it:
`ADDON = MyTerm`. `fit` hands `learn` nothing but what `needs` (and, where it is there, `uses`) declares.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import (
    ClassWeights,
    ImageConditionedWeights,
    Kind,
    Reduce,
    Vectors,
    Weights,
    no_vectors,
)
from vlkit.contracts import Progress
from vlkit.errors import ConfigError
from vlkit.features.feature_set import Fingerprint
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.addons.views import ViewRecipe
    from vlkit.features.source import FeatureSource

__all__ = [
    "NEEDS",
    "SLOTS",
    "AddOn",
    "ClassWeighting",
    "ClassWeights",
    "FeatureMap",
    "Fitted",
    "GalleryBias",
    "GatedGalleryBias",
    "ImageConditionedWeights",
    "InputEdit",
    "Kind",
    "Merge",
    "Need",
    "PairScoring",
    "Reduce",
    "Slot",
    "State",
    "Step",
    "StreamingTerm",
    "Task",
    "Term",
    "TowerEdit",
    "Vectors",
    "Weights",
    "learned",
    "no_vectors",
]

Slot = Literal[
    "inputs", "towers", "class_weights", "feature_maps", "pair_scores", "terms", "gallery_bias", "merges"
]  # fmt: skip
# In the order in which a pipeline applies them.
SLOTS: tuple[Slot, ...] = (
    "inputs", "towers", "class_weights", "feature_maps", "pair_scores", "terms", "gallery_bias", "merges",
)  # fmt: skip

Need = Literal[
    "unlabelled_images", "captions", "class_names", "few_shot_labels", "val_labels", "labels",
    "patches", "patch_tokens", "views", "pixels", "grad_text", "grad_image", "test_stream", "oracle", "extra_model",
]  # fmt: skip
NEEDS: dict[Need, str] = {
    "unlabelled_images": "images without labels, not of the test split",
    "captions": "texts such as those the gallery is asked for, not of the test split",
    "class_names": "the names of the classes, and their zero-shot weights",
    "few_shot_labels": "a few labelled images of each class",
    "val_labels": "labelled validation images, to choose hyper-parameters on",
    "labels": "a fully labelled training set",
    "patches": "patch features in the joint space, at fit and at use",
    "patch_tokens": "patch tokens before projection, at fit and at use",
    "views": "further views of each image, see `views` and `fit_views`",
    "pixels": "the records of images, at fit",
    "grad_text": "gradients through the text tower",
    "grad_image": "gradients through the image tower",
    "test_stream": "the unlabelled test images themselves (transductive)",
    "oracle": "labels of images it asks for",
    "extra_model": "another model",
}

Task = Literal["classification", "retrieval"]
TASKS: frozenset[Task] = frozenset({"classification", "retrieval"})

# Papers write constants beside logits of 100 x cosine, the learned scale of OpenAI's models.
PAPER_LOGIT_SCALE = 100.0


def learned() -> Any:
    """A field that `learn` fills: a tensor, or a plain value JSON can hold; saved with the add-on."""
    return field(default=None, kw_only=True, repr=False, metadata={"learned": True})


@dataclass(frozen=True)
class Fitted:
    """What an add-on was fitted for: it is of no use elsewhere.

    Attributes:
        encoder: fingerprint of the model.
        logit_scale: the model's multiplier of the cosine.
        task: classification or retrieval.
        class_names: those it was fitted with; empty where it was given none.
        before: keys of the add-ons before it that change features, in order.
        seen: what of the reference it was given, in words: need -> "train: 1600 images".
    """

    encoder: Fingerprint
    logit_scale: float
    task: Task
    class_names: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    seen: Mapping[str, str] = field(default_factory=dict)


class State(NamedTuple):
    """Everything an add-on holds: tensors, and what JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class AddOn(ABC):
    """One method. Settings and learned values are its fields; nothing else belongs to it.

    Class attributes:
        slot: where it acts; set by the class of the slot.
        needs: what it cannot do without. `fit` refuses a reference that lacks any of it.
        uses: what else it takes where it is there (validation labels that replace fixed hyper-parameters).
        tasks: where it makes sense.
        any_classes: whether, fitted with some classes, it may be used with others.
        text_space: for class weights: whether the vectors are text features, so that feature maps fit them.
        views: recipe of the views it wants of the images it is used on.
        fit_views: recipe of the views it wants of the images it is fitted on.
    """

    slot: ClassVar[Slot]
    needs: ClassVar[frozenset[Need]] = frozenset()
    uses: ClassVar[frozenset[Need]] = frozenset()
    tasks: ClassVar[frozenset[Task]] = TASKS
    any_classes: ClassVar[bool] = True
    text_space: ClassVar[bool] = True
    views: "ClassVar[ViewRecipe | None]" = None
    fit_views: "ClassVar[ViewRecipe | None]" = None

    fitted: Fitted | None = field(default=None, kw_only=True, repr=False)

    @abstractmethod
    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """A copy with its learned fields filled; `self` where there is nothing to learn.

        Args:
            reference: only what `needs` and `uses` declare, every part already changed by the add-ons before.
            embedder: embeds texts; `embedder.embedder.encoder` is the model, for those that declare "pixels",
                "grad_text" or "grad_image".
            progress: called with (done, total).
        """

    def fit(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """A new add-on, fitted for this encoder and this reference.

        Raises:
            ConfigError: the reference lacks something it needs, or it makes no sense for the task.
            VlkitError: what `learn` finds wrong.
        """
        from vlkit.addons.reference import restricted

        seen, allowed = restricted(self, reference, embedder)
        record = Fitted(
            encoder=embedder.card.fingerprint,
            logit_scale=embedder.logit_scale,
            task=reference.task,
            class_names=tuple(name.shown for name in reference.class_names) if self._by_class() else (),
            before=reference.before,
            seen=seen.summary(),
        )
        # The record comes first: `learn` may ask for the logit scale.
        done = replace(self, fitted=record).learn(seen, allowed, progress)
        for name, tensor in done.state().tensors.items():
            if not torch.isfinite(tensor).all():
                raise ConfigError(
                    f"Fitting {self.name} gave {name} with values that are not finite. Lower its learning rate or look "
                    "for broken features in the reference."
                )
        return done

    def _by_class(self) -> bool:
        """Whether it was shown anything that belongs to certain classes."""
        return bool((self.needs | self.uses) & {"class_names", "few_shot_labels", "val_labels", "labels"})

    @property
    def name(self) -> str:
        """The stem of its file, as on the command line."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def transductive(self) -> bool:
        """Whether it sees the unlabelled test images."""
        return "test_stream" in self.needs

    @property
    def logit_scale(self) -> float:
        """The model's multiplier of the cosine."""
        assert self.fitted is not None, f"{self.name} is not fitted"
        return self.fitted.logit_scale

    def from_paper(self, logits: float) -> float:
        """A constant that a paper adds to logits of 100 x cosine, for the logits of this model."""
        return logits * self.logit_scale / PAPER_LOGIT_SCALE

    def settings(self) -> dict[str, Any]:
        """The fields a user sets."""
        return {one.name: getattr(self, one.name) for one in fields(self) if is_setting(one)}

    def state(self) -> State:
        """Settings and learned values; `from_state` makes an equal add-on of them, but for `fitted`."""
        values = self.settings()
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("learned")}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        values.update({name: value for name, value in found.items() if name not in tensors and value is not None})
        return State(tensors, values)

    @classmethod
    def from_state(cls, state: State, fitted: Fitted | None = None) -> Self:
        """The add-on of a state.

        Raises:
            ConfigError: names that are no fields of this method.
        """
        known = {one.name for one in fields(cls)} - {"fitted"}
        unknown = sorted((set(state.tensors) | set(state.values)) - known)
        if unknown:
            raise ConfigError(f"{cls.__name__} has no {', '.join(unknown)}; it was saved by another version.")
        return cls(**state.tensors, **state.values, fitted=fitted)

    @property
    def key(self) -> str:
        """Sixteen hex digits: equal for add-ons that do the same."""
        state = self.state()
        digest = hashlib.sha256(f"{self.slot}/{self.name} {json.dumps(state.values, sort_keys=True)}".encode())
        for name, tensor in sorted(state.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def is_setting(one: Any) -> bool:
    """Whether a field of an add-on is set by users."""
    return one.init and one.name != "fitted" and not one.metadata.get("learned")


@dataclass(frozen=True)
class InputEdit(AddOn):
    """Changes the pixels before the image tower sees them."""

    slot: ClassVar[Slot] = "inputs"

    @abstractmethod
    def edit_image(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) float32 in [0,1], at the model's size, to the same."""


@dataclass(frozen=True)
class TowerEdit(AddOn):
    """Changes what a tower computes, and puts everything back."""

    slot: ClassVar[Slot] = "towers"
    towers: ClassVar[frozenset[Kind]] = frozenset({"image"})  # those it changes

    @abstractmethod
    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """Within it the encoder computes something else; afterwards its outputs are those of before, to the bit."""


@dataclass(frozen=True)
class ClassWeighting(AddOn):
    """Makes the weights of classes out of their names, or learned them."""

    slot: ClassVar[Slot] = "class_weights"
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})

    @abstractmethod
    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> Weights:
        """Of C classes. A class's `names` are its synonyms, the shown one first."""


@dataclass(frozen=True)
class FeatureMap(AddOn):
    """Changes features, of images, of texts, or of both."""

    slot: ClassVar[Slot] = "feature_maps"

    @abstractmethod
    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """Both sides changed, each row on its own; a side may have no rows. In classification texts are the class
        weights' vectors."""


@dataclass(frozen=True)
class PairScoring(AddOn):
    """Takes the place of the cosine."""

    slot: ClassVar[Slot] = "pair_scores"

    @abstractmethod
    def score(self, queries: Vectors, gallery: Vectors) -> Tensor:
        """(q,g) on the scale of the cosine; either side may be the images, `kind` says which."""


@dataclass(frozen=True)
class Term(AddOn):
    """Adds something to the logits of each image and class."""

    slot: ClassVar[Slot] = "terms"
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})
    any_classes: ClassVar[bool] = False

    @abstractmethod
    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,N) to be added. `logits` (Q,N) are the model's own, logit_scale x score; see `from_paper`."""


class Step(NamedTuple):
    """What a streaming term makes of one image."""

    term: Tensor  # (1,N) to be added to its logits
    addon: "StreamingTerm"  # for the next one


@dataclass(frozen=True)
class StreamingTerm(AddOn):
    """A term that remembers the images before: their order matters, and is recorded."""

    slot: ClassVar[Slot] = "terms"
    needs: ClassVar[frozenset[Need]] = frozenset({"test_stream"})
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})
    any_classes: ClassVar[bool] = False

    @abstractmethod
    def step(self, query: Vectors, logits: Tensor) -> Step:
        """One image and its logits (1,N)."""


@dataclass(frozen=True)
class GalleryBias(AddOn):
    """Subtracts a number from the scores of each gallery item, known from queries of another split."""

    slot: ClassVar[Slot] = "gallery_bias"

    @abstractmethod
    def bias(self, gallery: Vectors) -> Tensor:
        """(N,) on the scale of the cosine. `gallery.kind` says which side is the gallery."""


@dataclass(frozen=True)
class GatedGalleryBias(GalleryBias):
    """A bias for some of the queries only."""

    @abstractmethod
    def gate(self, scores: Tensor, gallery: Vectors) -> Tensor:
        """(Q,) bool: the queries it is for, out of their scores (Q,N) without the bias."""


@dataclass(frozen=True)
class Merge(AddOn):
    """Makes one matrix of scores out of several."""

    slot: ClassVar[Slot] = "merges"

    @abstractmethod
    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """Matrices (Q,N) of logits, one for each class weighting or part of the query, to one (Q,N)."""
