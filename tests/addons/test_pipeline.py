import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import (
    ClassWeighting,
    FeatureMap,
    GatedGalleryBias,
    Merge,
    Need,
    PairScoring,
    Step,
    StreamingTerm,
    Task,
    Term,
    TowerEdit,
    Vectors,
    learned,
)
from vlkit.addons.class_names import ClassName, parse_class
from vlkit.addons.class_weights.templates import Templates
from vlkit.addons.exchange import ClassWeights, ImageConditionedWeights
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.gallery_bias.top_k_mean import TopKMean
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Captions, Part, Reference, Stream
from vlkit.addons.towers.maskclip import MaskClip
from vlkit.addons.towers.naclip import NaClip
from vlkit.errors import ConfigError, DataError, GalleryError

CLASSES = [parse_class(name) for name in ("cat", "dog", "sea horse | seahorse")]


@dataclass(frozen=True)
class Plus(Term):
    amount: float = 1.0

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        return self.amount * logits


@dataclass(frozen=True)
class Scale(FeatureMap):
    by: float = 2.0

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        return images.with_pooled(images.pooled * self.by, unit=False), texts


@dataclass(frozen=True)
class Spy(Term):
    """Keeps what it was shown."""

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels"})
    uses: ClassVar[frozenset[Need]] = frozenset()
    shown: Any = learned()

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        SHOWN.append((reference, embedder))
        return self

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits)


@dataclass(frozen=True)
class ByOrder(StreamingTerm):
    """Adds the number of images before."""

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    seen: int = 0

    def step(self, query: Vectors, logits: Tensor) -> Step:
        return Step(torch.full_like(logits, float(self.seen)), replace(self, seen=self.seen + 1))


@dataclass(frozen=True)
class Conditioned(ClassWeighting):
    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def weights(self, class_names: Sequence[ClassName], embedder: Any) -> ImageConditionedWeights:
        return ImageConditionedWeights(lambda images: images.pooled[:, : len(class_names)], len(class_names))


@dataclass(frozen=True)
class Negative(PairScoring):
    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def score(self, queries: Vectors, gallery: Vectors) -> Tensor:
        return -(queries.pooled @ gallery.pooled.T)


@dataclass(frozen=True)
class Average(Merge):
    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(scores)).mean(0)


@dataclass(frozen=True)
class EvenOnly(GatedGalleryBias):
    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    def bias(self, gallery: Vectors) -> Tensor:
        return torch.ones(len(gallery))

    def gate(self, scores: Tensor, gallery: Vectors) -> Tensor:
        return torch.arange(len(scores)) % 2 == 0


@dataclass(frozen=True)
class Nothing(TowerEdit):
    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return self

    @contextmanager
    def edit(self, encoder: Any) -> Iterator[None]:
        yield


SHOWN: list[Any] = []


@pytest.fixture
def source(tiny_source: Any) -> Any:
    return tiny_source()


@pytest.fixture
def images(source: Any, toy_records: Any) -> Vectors:
    (chunk,) = source.iterate_embeddings(toy_records(["cat", "dog", "sea horse"], 4))
    return Vectors("image", chunk.embeddings, norm=chunk.norms)


@pytest.fixture
def reference(source: Any, toy_records: Any, images: Vectors) -> Reference:
    records = tuple(toy_records(["cat", "dog", "sea horse"], 4))
    labels = torch.tensor([record.label for record in records])
    texts = ("a cat", "a dog", "some sea horse", "a bird", "grass")
    return Reference(
        images=Part("train", images, records=records),
        captions=Captions(texts, Vectors("text", source.embed_texts(texts)), "train"),
        class_names=tuple(CLASSES),
        few_shot=Part("train", images, labels, records),
        val=Part("val", images, labels),
    )


def fitted(source: Any, *addons: Any, task: Task = "classification", reference: Any = None) -> Pipeline:
    given = replace(reference or Reference(), task=task)
    return Pipeline(addons).fit(replace(given, class_names=tuple(CLASSES)), source, "photo")


def test_plain_pipeline_is_the_zero_shot_classifier(source: Any, images: Vectors) -> None:
    from vlkit.addons.classifier import ZeroShotClassifier

    plain = ZeroShotClassifier.build(source, CLASSES, "photo")
    adapted = PLAIN.classifier(CLASSES, source, "photo")
    assert torch.equal(adapted.logits(images), 20.0 * plain.weights.scores(images.pooled))
    assert torch.equal(adapted.probabilities(images), plain.probabilities(images.pooled))
    assert adapted.predict(images, 2).indices.shape == (12, 2)


def test_add_ons_are_put_into_their_order_and_applied_in_it(source: Any, images: Vectors) -> None:
    pipeline = Pipeline([Plus(0.5), Scale(3.0), Plus(1.0)])
    assert [addon.slot for addon in pipeline.addons] == ["feature_maps", "terms", "terms"]
    assert [addon.amount for addon in pipeline.terms] == [0.5, 1.0]  # type: ignore[union-attr]
    plain = PLAIN.classifier(CLASSES, source, "photo").logits(images)
    # The second term sees the logits with the first: x 1.5, then x 2.
    found = fitted(source, *pipeline.addons).classifier(CLASSES, source, "photo").logits(images)
    assert torch.allclose(found, plain * 3.0 * 1.5 * 2.0, atol=1e-4)


def test_streaming_terms_take_images_in_order(source: Any, images: Vectors, reference: Reference) -> None:
    pipeline = fitted(source, ByOrder(), reference=replace(reference, stream=Stream(images)))
    assert pipeline.transductive and pipeline.streaming
    plain = PLAIN.classifier(CLASSES, source, "photo").logits(images)
    found = pipeline.classifier(CLASSES, source, "photo").logits(images)
    assert torch.allclose(found - plain, torch.arange(12.0)[:, None].expand(-1, 3), atol=1e-4)


def test_a_method_sees_only_what_it_declares(source: Any, reference: Reference) -> None:
    SHOWN.clear()
    everything = replace(reference, stream=Stream(reference.images.vectors))  # type: ignore[union-attr]
    fitted(source, Spy(), reference=everything)
    shown, model = SHOWN[0]
    assert len(shown.few_shot) == 12 and shown.few_shot.records == ()
    assert (shown.images, shown.captions, shown.val, shown.stream, shown.class_names) == (None, None, None, None, ())
    assert (shown.logits, shown.weights, shown.passes) == (None, None, None)
    with pytest.raises(AssertionError, match="reaches into the model"):
        _ = model.embedder


def test_a_missing_need_is_named(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"spy|test_pipeline needs few_shot_labels \(labelled images of every class"):
        fitted(source, Spy())


def test_the_test_split_is_refused(images: Vectors) -> None:
    with pytest.raises(ConfigError, match="not fitted on the test split"):
        Part("test", images)
    with pytest.raises(ConfigError, match="not fitted on the test split"):
        Captions((), Vectors("text", torch.empty(0, 16)), "TEST")
    assert not {field.name for field in dataclasses.fields(Stream)} & {"labels"}  # by type


def test_few_shot_images_must_cover_the_classes(images: Vectors) -> None:
    labels = torch.tensor([0, 1] * 6)
    with pytest.raises(DataError, match=r"leave out 1 of 3 classes \(first: 'sea horse'\)"):
        Reference(class_names=tuple(CLASSES), few_shot=Part("train", images, labels))
    with pytest.raises(DataError, match="no labels"):
        Reference(few_shot=Part("train", images))
    with pytest.raises(DataError, match="expected 0 to 2"):
        Reference(class_names=tuple(CLASSES), val=Part("val", images, labels + 2))
    broken = images.with_pooled(images.pooled.clone().fill_(torch.nan), unit=False)
    with pytest.raises(DataError, match="not finite"):
        Part("train", broken)


@pytest.mark.parametrize(
    ("addons", "reason"),
    [
        ([Mean(), TopKMean()], "correct twice"),
        ([Negative(), Negative()], "only one of them would count"),
        ([Templates(), Conditioned()], "choose one, or add a merge"),
        ([Average(), Average()], "after one merge"),
        ([Negative(), Mean()], "estimated from inner products"),
        ([NaClip(), MaskClip()], "naclip and maskclip do not go together: each mixes the patches of the last block"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(addons: list[Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Pipeline(addons)


def test_image_conditioned_weights_refuse_feature_maps(source: Any, images: Vectors) -> None:
    plain = fitted(source, Conditioned()).classifier(CLASSES, source).logits(images)
    assert torch.allclose(plain, 20 * images.pooled[:, :3])
    with pytest.raises(ConfigError, match="depend on the image"):
        fitted(source, Conditioned(), Scale()).classifier(CLASSES, source).logits(images)


def test_a_bias_must_be_fitted_again_behind_another_map(source: Any, reference: Reference) -> None:
    bias = fitted(source, Mean(), reference=reference).addons[0]
    with pytest.raises(ConfigError, match="must be fitted again"):
        Pipeline([Scale(), bias])
    together = fitted(source, Scale(), Mean(), reference=reference)
    # The bank was mapped before the bias was fitted.
    assert torch.allclose(together.bias.images, 2 * bias.images)  # type: ignore[attr-defined,union-attr]
    assert Pipeline(together.addons).fitted
    with pytest.raises(ConfigError, match="must be fitted again"):
        Pipeline([together.addons[1]])
    with pytest.raises(ConfigError, match="must be fitted again"):
        Pipeline([Scale(5.0), together.addons[1]])


def test_an_add_on_belongs_to_its_encoder_task_and_classes(
    source: Any, tiny_source: Any, reference: Reference, images: Vectors
) -> None:
    pipeline = fitted(source, Plus())
    with pytest.raises(GalleryError, match=r"test_pipeline.*do not go together: weights"):
        pipeline.classifier(CLASSES, tiny_source(name="other"))
    with pytest.raises(ConfigError, match="is for classification, not for retrieval"):
        pipeline.retrieval(images, images, source)
    with pytest.raises(ConfigError, match="not fitted"):
        Pipeline([Plus()]).classifier(CLASSES, source)
    with pytest.raises(ConfigError, match="is for classification, not for retrieval"):
        fitted(source, Plus(), task="retrieval")
    bias = fitted(source, Mean(), reference=reference)
    with pytest.raises(ConfigError, match="was fitted for classification; fit it anew for retrieval"):
        bias.retrieval(images, images, source)


def test_terms_hold_for_the_classes_they_were_fitted_with(source: Any, reference: Reference) -> None:
    from vlkit.addons.terms.tip_adapter import TipAdapter

    views = replace(reference.few_shot, vectors=replace(reference.few_shot.vectors, views=torch.rand(12, 2, 16)))  # type: ignore[union-attr,type-var]
    given = replace(reference, few_shot=views, logits=lambda images: torch.zeros(len(images), 3))
    tip = TipAdapter(alpha=1.0, beta=1.0).fit(given, source)
    with pytest.raises(ConfigError, match=r"fitted for other classes \('bird' is new\)"):
        Pipeline([tip]).classifier([*CLASSES, ClassName("bird", ("bird",))], source)


def test_merge_joins_several_class_weightings(source: Any, images: Vectors) -> None:
    parts = [Templates("photo"), Templates("none")]
    single = [fitted(source, part).classifier(CLASSES, source).logits(images) for part in parts]
    merged = fitted(source, *parts, Average()).classifier(CLASSES, source).logits(images)
    assert torch.allclose(merged, (single[0] + single[1]) / 2, atol=1e-5)


def test_a_gated_bias_acts_on_some_queries(source: Any, images: Vectors) -> None:
    plain = PLAIN.classifier(CLASSES, source, "photo").logits(images)
    found = fitted(source, EvenOnly()).classifier(CLASSES, source, "photo").logits(images)
    assert torch.allclose((plain - found)[::2], torch.full((6, 3), 20.0), atol=1e-4)
    assert torch.equal(plain[1::2], found[1::2])


def test_sigmoid_encoders_get_their_bias_in_probabilities_only(tiny_source: Any, images: Vectors) -> None:
    source = tiny_source(sigmoid=True)
    adapted = fitted(source, Plus(1.0)).classifier(CLASSES, source, "photo")
    plain = PLAIN.classifier(CLASSES, source, "photo")
    assert torch.allclose(adapted.logits(images), 2 * plain.logits(images))
    assert torch.allclose(adapted.probabilities(images), (2 * plain.logits(images) - 5).sigmoid())
    assert "sigmoid" in adapted.rule


def test_retrieval_uses_the_bank_of_the_query_side(source: Any, reference: Reference, images: Vectors) -> None:
    texts = Vectors("text", source.embed_texts(["a cat", "dog", "water"]))
    pipeline = fitted(source, Mean(lam=0.5), task="retrieval", reference=reference)
    scored = pipeline.retrieval(images, texts, source)
    plain = images.pooled @ texts.pooled.T
    of_texts = 0.5 * (texts.pooled @ reference.images.vectors.pooled.T).mean(1)  # type: ignore[union-attr]
    of_images = 0.5 * (images.pooled @ reference.captions.vectors.pooled.T).mean(1)  # type: ignore[union-attr]
    assert torch.allclose(torch.cat(list(scored.scores("image_to_text", chunk=5))), plain - of_texts, atol=1e-6)
    assert torch.allclose(torch.cat(list(scored.scores("text_to_image"))), plain.T - of_images, atol=1e-6)


def test_synonyms_reduce_after_the_bias(source: Any, images: Vectors, reference: Reference) -> None:
    weights = Templates("photo").weights(CLASSES, source)
    assert isinstance(weights, ClassWeights) and len(weights.vectors) == 4
    bank = F.normalize(reference.images.vectors.pooled.mean(0, keepdim=True), dim=-1)  # type: ignore[union-attr]
    found = fitted(source, Mean(lam=1.0), reference=reference).classifier(CLASSES, source, "photo").logits(images)
    mean = reference.images.vectors.pooled.mean(0)  # type: ignore[union-attr]
    similarity = images.pooled @ weights.vectors.T - weights.vectors @ mean
    by_hand = torch.stack([similarity[:, 0], similarity[:, 1], similarity[:, 2:].amax(1)], dim=1)
    assert bank.shape == (1, 16)
    assert torch.allclose(found, 20 * by_hand, atol=1e-4)


@dataclass(frozen=True)
class Diverged(Plus):
    """Learns a number that is none."""

    learned_value: Tensor | None = learned()

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        return replace(self, learned_value=torch.tensor([1.0, torch.nan]))


def test_a_fit_that_diverged_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match="gave learned_value with values that are not finite"):
        fitted(source, Diverged())
