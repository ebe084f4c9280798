"""The few types that every part of vlkit exchanges.

Shape letters, the same in every docstring:
    B images on this rank       R texts on this rank     G items over all ranks   T text tokens
    P patches                   W tower width            D embedding width        C classes
    M prompts per class         V views                  N items of a gallery     Q queries    K results
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

# Long work reports (done, total) to whoever passed this in; the library itself never prints.
Progress = Callable[[int, int], None]


def continued(progress: Progress | None, before: int, total: int) -> Progress | None:
    """For a part of long work: what it reports as done counts on from `before`, of the whole's total."""
    if progress is None:
        return None
    report = progress
    return lambda done, of: report(before + done, total)


class ImageTextBatch(NamedTuple):
    """One batch of image-text pairs as it leaves the loader.

    A broken sample keeps its row with `valid=False`: shapes, order and resume do not depend on it.
    """

    images: "Tensor"  # (B,3,H,W) uint8; out of the loader in channels_last memory
    tokens: "Tensor"  # (R,T) int64
    text_to_image: "Tensor"  # (R,) int64: the image row each text describes; arange for one caption an image
    ids: "Tensor"  # (B,) int64: position in the shard index
    caption_hash: "Tensor"  # (R,) int64: equal for equal caption strings
    valid: "Tensor"  # (B,) bool
    extra: "dict[str, Tensor]"  # second views, labels, stored teacher embeddings, ...
    keys: list[str]  # (B,) "shard/key", for messages


class Features(NamedTuple):
    """What a dual encoder makes of one batch."""

    image: "Tensor"  # (B,D) unit norm
    text: "Tensor"  # (R,D) unit norm
    text_to_image: "Tensor"  # (R,)
    logit_scale: "Tensor"  # () already exponentiated
    logit_bias: "Tensor | None" = None  # ()
    patches: "Tensor | None" = None  # (B,P,D)
    words: "Tensor | None" = None  # (R,T,D)
    word_mask: "Tensor | None" = None  # (R,T) bool
    extra: "Mapping[str, Tensor]" = {}  # noqa: RUF012  (shared, but a Mapping: nobody writes into it)


class MethodRow(NamedTuple):
    """One row of a folder's table of methods: what `vlkit methods` and the README show.

    Each folder of methods (losses/, models/heads/, addons/<slot>/) holds in its `__init__.py` one dict literal
    `METHODS: dict[str, MethodRow]` whose keys are the stems of its method files; tests/test_architecture.py
    asks for a row and a test of every file.
    """

    name: str  # the file's stem, as on the command line
    slot: str  # where it acts: "loss", "head", "class_weights", ...
    needs: str  # what it needs besides the encoder: "pairs", "class names", "unlabelled images", ...
    cost: str  # what it costs, in words a user can weigh: "none", "one pass over the gallery", ...
    source: str  # paper or code it comes from
    when: str  # when to use it, in one sentence


class PairScore(ABC):
    """How a query vector and a gallery vector become one score."""

    @abstractmethod
    def score(self, queries: "Tensor", gallery: "Tensor") -> "Tensor":
        """Scores (q,g) of a chunk of queries (q,D) against a chunk of the gallery (g,D)."""

    @abstractmethod
    def as_inner_product(self, side: str) -> "Callable[[Tensor], Tensor] | None":
        """The map of one side ("query" or "gallery") to vectors whose inner product is the score, or None."""


class CosineScore(PairScore):
    """Inner product of unit vectors: the score of every plain CLIP model."""

    def score(self, queries: "Tensor", gallery: "Tensor") -> "Tensor":
        """Scores (q,g); both sides are unit norm."""
        return queries @ gallery.T

    def as_inner_product(self, side: str) -> "Callable[[Tensor], Tensor] | None":
        """The identity: cosine of unit vectors is their inner product."""
        return lambda vectors: vectors


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluator on one model and one data set.

    `metrics` are fractions under keys like `image_to_text/recall@1`; `intervals` hold (low, high) at 95%
    for the same keys; `counts` say how many images, texts and classes entered and how many were left out;
    `protocol` states every choice that decides comparability.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    protocol: Mapping[str, Any]
    counts: Mapping[str, int]
    per_item: "pa.Table | None" = None
    figures: Mapping[str, Any] = field(default_factory=dict)


class Evaluator(ABC):
    """Turns a source of features into numbers. Stage one of the interface: issue by issue evaluators join."""

    @abstractmethod
    def run(self, source: Any, pipeline: Any = None) -> Evaluation:
        """Evaluate; `source` gives features, `pipeline` is applied to them first."""
