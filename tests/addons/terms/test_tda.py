import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.saved import load_addon, save_addon
from vlkit.addons.terms.tda import Tda

Blobs = Callable[..., Reference]


def streamed(addon: Tda, images: Vectors, logits: torch.Tensor) -> tuple[torch.Tensor, Tda]:
    rows = []
    for row in range(len(images)):
        term, later = addon.step(images.rows([row]), logits[row : row + 1])
        assert isinstance(later, Tda)
        rows.append(term)
        addon = later
    return torch.cat(rows), addon


def slow(images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The paper's two caches as lists, with its constants beside logits of 100 x cosine."""
    num_classes = logits.shape[1]
    positive: dict[int, list[tuple[float, torch.Tensor]]] = {}
    negative: dict[int, list[tuple[float, torch.Tensor, torch.Tensor]]] = {}
    rows = []
    for image, own in zip(images, logits, strict=True):
        p = torch.softmax(own, 0)
        entropy = float(-(p * p.log()).sum())
        best = int(own.argmax())
        slots = positive.setdefault(best, [])
        slots.append((entropy, image))
        positive[best] = sorted(slots, key=lambda slot: slot[0])[:3]
        if 0.2 < entropy / math.log2(num_classes) < 0.5:
            others = negative.setdefault(best, [])
            others.append((entropy, image, p))
            negative[best] = sorted(others, key=lambda slot: slot[0])[:2]
        row = torch.zeros(num_classes)
        for label, kept in positive.items():
            for _, key in kept:
                row[label] += 0.2 * 2.0 * torch.exp(-5.0 * (1 - image @ key))
        for kept_too in negative.values():
            for _, key, of_key in kept_too:
                mask = ((of_key > 0.03) & (of_key < 1.0)).float()
                row -= 0.2 * 0.117 * torch.exp(-1.0 * (1 - image @ key)) * mask
        rows.append(row)
    return torch.stack(rows)


def test_against_the_two_caches_written_out(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(classes=4, stream=15, noise=0.4)
    assert given.stream is not None and given.logits is not None
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    images = given.stream.vectors.rows(order)
    logits = given.logits(images) / 2
    fitted = Tda().fit(given, tiny_source())
    found, later = streamed(fitted, images, logits)
    assert torch.allclose(found, slow(images.pooled, logits), atol=1e-5)
    assert later.keys is not None and len(later.keys) == 12
    assert later.negative_keys is not None and 0 < len(later.negative_keys) <= 8
    assert fitted.keys is None  # the one it began with is unchanged


def test_an_image_is_in_the_cache_before_it_is_scored(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(stream=1)
    assert given.stream is not None
    fitted = Tda(negative_alpha=0.0).fit(given, tiny_source())
    term, _ = fitted.step(given.stream.vectors.rows([0]), torch.tensor([[0.0, 3.0, 1.0]]))
    assert torch.allclose(term, torch.tensor([[0.0, 0.2 * 2.0, 0.0]]), atol=1e-6)


def test_what_came_before_decides(blobs: Blobs, tiny_source: Any) -> None:
    # One image, its logits undecided; the ones before it, alike, were sure of class 1.
    image = F.normalize(torch.ones(1, 16), dim=-1)
    fitted = Tda().fit(blobs(stream=1), tiny_source())
    undecided = torch.tensor([[0.02, 0.0, -9.0]])
    cold, _ = fitted.step(Vectors("image", image), undecided)
    _, warm = streamed(fitted, Vectors("image", image.expand(3, -1)), torch.tensor([[0.0, 9.0, 0.0]] * 3))
    after, _ = warm.step(Vectors("image", image), undecided)
    assert (undecided + cold).argmax() == 0
    assert (undecided + after).argmax() == 1


def test_strength_zero_is_zero_shot_and_a_run_repeats(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(stream=5)
    assert given.stream is not None and given.logits is not None
    images = given.stream.vectors
    off = Tda(alpha=0.0, negative_alpha=0.0).fit(given, tiny_source())
    assert not streamed(off, images, given.logits(images))[0].any()
    fitted = Tda().fit(given, tiny_source())
    one, two = (streamed(fitted, images, given.logits(images)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1].key == two[1].key


def test_in_a_pipeline_it_is_transductive_and_keeps_what_it_saw(blobs: Blobs, tiny_source: Any, tmp_path: Any) -> None:
    source = tiny_source()
    given = blobs(stream=5)
    assert given.stream is not None
    pipeline = Pipeline([Tda()]).fit(given, source)
    assert pipeline.transductive and pipeline.streaming
    images = given.stream.vectors
    classifier = pipeline.classifier(given.class_names, source)
    whole = classifier.logits(images)
    first = classifier.step(images.rows(slice(0, 7)))
    rest = first.classifier.logits(images.rows(slice(7, None)))
    assert torch.allclose(torch.cat([first.logits, rest]), whole, atol=1e-6)
    (warm,) = first.classifier.terms
    save_addon(warm, tmp_path / "tda")
    assert load_addon(tmp_path / "tda").key == warm.key
