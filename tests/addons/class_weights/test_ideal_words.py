from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.ideal_words import IdealWordWeights, compositionality, ideal_words
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.errors import ConfigError

CLASSES = tuple(parse_class(name) for name in ("wet dog", "dry dog", "wet cat", "old cat"))


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_against_the_equations_in_a_slow_loop() -> None:
    vectors = unit(2, 3, 4, 8)
    weights = [torch.tensor([0.3, 0.7]), torch.tensor([0.2, 0.3, 0.5]), torch.full((4,), 0.25)]
    found = ideal_words(vectors, weights)
    tuples = list(product(range(2), range(3), range(4)))

    def share(place: tuple[int, ...]) -> float:
        return float(weights[0][place[0]] * weights[1][place[1]] * weights[2][place[2]])

    origin = torch.stack([share(one) * vectors[one] for one in tuples]).sum(0)
    assert torch.allclose(found.origin, origin, atol=1e-6)
    for factor, words in enumerate(found.factors):
        for word in range(len(words)):
            of_word = torch.stack([share(one) * vectors[one] for one in tuples if one[factor] == word]).sum(0)
            assert torch.allclose(words[word], of_word / weights[factor][word] - origin, atol=1e-6)
        assert torch.allclose(weights[factor] @ words, torch.zeros(8), atol=1e-6)  # weighted mean 0
    composed = found.composed()
    for one in tuples:
        by_hand = origin + torch.stack([words[word] for words, word in zip(found.factors, one, strict=True)]).sum(0)
        assert torch.allclose(composed[one], by_hand, atol=1e-6)


def test_sums_are_reproduced_exactly_and_one_factor_is_itself() -> None:
    first, second = unit(3, 8), unit(5, 8) * 0.3
    sums = 0.1 + first[:, None] + second[None]
    assert torch.allclose(ideal_words(sums).composed(), sums, atol=1e-6)
    assert torch.allclose(ideal_words(first).composed(), first, atol=1e-6)
    assert compositionality(sums)[0] < 1e-10
    own, between = compositionality(unit(3, 5, 8))
    assert 0.1 < own < between


def test_the_best_tuple_is_the_tuple_of_the_best_words() -> None:
    vectors, images = unit(3, 4, 8), unit(20, 8)
    found = ideal_words(vectors)
    scores = found.scores(images)
    assert torch.allclose(scores, torch.einsum("bd,ijd->bij", images, found.composed()), atol=1e-5)
    best = scores.flatten(1).argmax(1)
    assert torch.equal(best // 4, (images @ found.factors[0].T).argmax(1))
    assert torch.equal(best % 4, (images @ found.factors[1].T).argmax(1))


def test_composed_classes(tiny_source: Any) -> None:
    source = tiny_source()
    pipeline = Pipeline([IdealWordWeights()]).fit(Reference(class_names=CLASSES), source)
    (weights,) = pipeline.class_weights(CLASSES, source)
    names = [[f"an image of a {state} {kind}" for kind in ("dog", "cat")] for state in ("wet", "dry", "old")]
    grid = torch.stack([source.embed_texts(row) for row in names])
    by_hand = [
        grid.mean((0, 1)) + (grid[i].mean(0) - grid.mean((0, 1))) + (grid[:, j].mean(0) - grid.mean((0, 1)))
        for i, j in ((0, 0), (1, 0), (0, 1), (2, 1))
    ]
    assert torch.allclose(weights.vectors, torch.stack(by_hand), atol=1e-5)  # type: ignore[union-attr]
    # Sums of words are what the method is: the vectors are not those of the texts themselves.
    assert not torch.allclose(weights.vectors[0], grid[0, 0], atol=1e-2)  # type: ignore[union-attr]
    unit_norm = IdealWordWeights(normalise=True).weights(CLASSES, source).vectors
    assert torch.allclose(unit_norm, F.normalize(torch.stack(by_hand), dim=-1), atol=1e-5)


def test_contexts_that_must_not_count_are_left_out(tiny_source: Any) -> None:
    source, classes = tiny_source(), [parse_class("gull | seagull"), parse_class("sparrow")]
    weights = IdealWordWeights(spurious="on land|on water").weights(classes, source)
    names = ("gull", "seagull", "sparrow")
    texts = [source.embed_texts([f"an image of a {n} {c}" for c in ("on land", "on water")]).mean(0) for n in names]
    assert torch.allclose(weights.vectors, torch.stack(texts), atol=1e-5)
    assert weights.class_of.tolist() == [0, 0, 1]


def test_what_cannot_be(tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match="'hen' has 1"):
        Pipeline([IdealWordWeights()]).fit(Reference(class_names=(*CLASSES, parse_class("hen"))), tiny_source())
    with pytest.raises(ConfigError, match="expected two contexts or more"):
        Pipeline([IdealWordWeights(spurious="on land")]).fit(Reference(class_names=CLASSES), tiny_source())
    with pytest.raises(ConfigError, match="placeholders"):
        Pipeline([IdealWordWeights(template="an image")]).fit(Reference(class_names=CLASSES), tiny_source())
