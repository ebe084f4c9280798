from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import Vectors
from vlkit.addons.feature_maps.inv_gc import InvGC
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.errors import ConfigError, DataError


def unit(rows: int, seed: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) + 0.5, dim=-1)


@pytest.fixture
def reference() -> Reference:
    captions = Captions(("t",) * 30, Vectors("text", unit(30, 1)), "train")
    return Reference(task="retrieval", images=Part("train", Vectors("image", unit(20, 0))), captions=captions)


def slow(item: torch.Tensor, bank: torch.Tensor, rate: float, near: int) -> torch.Tensor:
    nearest = sorted(bank, key=lambda one: -float(item @ one))[:near]
    moved = item.clone()
    for one in nearest:
        moved -= rate / near * float(item @ one) * one
    return F.normalize(moved, dim=0)


def test_against_the_equation_in_a_slow_loop(tiny_source: Any, reference: Reference) -> None:
    fitted = InvGC(rate_gallery=0.7, rate_queries=0.3, share=0.2).fit(reference, tiny_source())
    images, texts = Vectors("image", unit(6, 2)), Vectors("text", unit(5, 3))
    mapped, same = fitted.map(images, texts)
    for item, found in zip(images.pooled, mapped.pooled, strict=True):
        both = slow(item, unit(20, 0), 0.7, 4) + slow(item, unit(30, 1), 0.3, 6)
        assert torch.allclose(found, both / both.norm(), atol=1e-5)
    assert torch.equal(same.pooled, texts.pooled)  # queries stay
    other = replace(fitted, gallery="text").map(images, texts)
    assert torch.equal(other[0].pooled, images.pooled) and not torch.equal(other[1].pooled, texts.pooled)


def test_items_in_a_crowd_come_apart(tiny_source: Any, reference: Reference) -> None:
    # What the method is for: near neighbours are subtracted, so items of one crowd get less like each other.
    fitted = InvGC(share=0.5).fit(reference, tiny_source())
    gallery = Vectors("image", unit(10, 2))
    moved = fitted.map(gallery, Vectors("text", unit(2, 3)))[0].pooled
    off = ~torch.eye(10, dtype=torch.bool)
    assert (moved @ moved.T)[off].mean() < (gallery.pooled @ gallery.pooled.T)[off].mean() - 0.03


def test_strength_zero_and_a_permuted_gallery(tiny_source: Any, reference: Reference) -> None:
    gallery, texts, order = Vectors("image", unit(9, 2)), Vectors("text", unit(2, 3)), torch.randperm(9)
    still = InvGC(rate_gallery=0.0, rate_queries=0.0).fit(reference, tiny_source())
    assert torch.equal(still.map(gallery, texts)[0].pooled, gallery.pooled)
    fitted = InvGC().fit(reference, tiny_source())
    moved, permuted = (fitted.map(one, texts)[0].pooled for one in (gallery, gallery.rows(order)))
    assert torch.allclose(moved[order], permuted, atol=1e-6)


def test_to_classify_the_class_vectors_move(tiny_source: Any, reference: Reference) -> None:
    source, classes = tiny_source(), [parse_class(name) for name in ("cat", "dog", "cow")]
    given = replace(reference, task="classification", captions=None, class_names=tuple(classes))
    pipeline, images = Pipeline([InvGC()]).fit(given, source), Vectors("image", unit(4, 2))
    weights = pipeline.class_weights(classes, source)[0].vectors  # type: ignore[union-attr]
    fitted = pipeline.maps[0]
    moved = fitted.map(images, Vectors("text", weights))[1].pooled
    both = [slow(one, weights, 0.5, 1) + slow(one, unit(20, 0), 0.5, 1) for one in weights]
    assert torch.allclose(moved, F.normalize(torch.stack(both), dim=-1), atol=1e-5)
    assert torch.allclose(pipeline.classifier(classes, source).logits(images), 20 * images.pooled @ moved.T, atol=1e-4)


def test_what_cannot_be(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(ConfigError, match="share = 0"):
        InvGC(share=0.0).fit(reference, tiny_source())
    with pytest.raises(ConfigError, match="inv_gc needs the class names"):
        InvGC().fit(replace(reference, captions=None), tiny_source())
    with pytest.raises(DataError, match="bank of 25 unlabelled images"):
        InvGC(bank_size=25).fit(reference, tiny_source())
