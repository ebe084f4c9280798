from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.channels import best_channels, channel_scores, single_vectors
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.reference import Part, Reference
from vlkit.addons.terms.ape import Ape
from vlkit.addons.terms.tip_adapter import TipAdapter
from vlkit.errors import ConfigError

Blobs = Callable[..., Reference]


def randoms(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_channel_scores_against_all_pairs() -> None:
    texts, shots, labels = randoms(3, 5, seed=0), randoms(7, 5, seed=1), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    samples = [(text, number) for number, text in enumerate(texts)]
    samples += [(shot, int(label)) for shot, label in zip(shots, labels, strict=True)]
    products = [one * two for one, first in samples for two, second in samples if first != second]
    expected = -0.7 * torch.stack(products).mean(0) + 0.3 * texts.var(0)
    assert torch.allclose(channel_scores(texts, shots, labels, 0.7), expected, atol=1e-6)
    assert best_channels(torch.tensor([0.1, 0.9, 0.5, 0.2]), 0.5).tolist() == [1, 2]


def test_all_channels_and_no_weights_is_tip_adapter(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs()
    assert given.few_shot is not None
    images = given.few_shot.vectors
    plain = TipAdapter(alpha=2.0, beta=3.0).fit(given, tiny_source())
    refined = Ape(alpha=2.0, beta=3.0, gamma=0.0, share=1.0).fit(given, tiny_source())
    logits = torch.zeros(len(images), 3)
    assert torch.allclose(plain.term(images, logits), refined.term(images, logits), atol=1e-5)


def test_against_the_equation_in_a_slow_loop(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(shots=2)
    fitted = Ape(alpha=1.5, beta=4.0, gamma=0.3).fit(given, tiny_source())
    shots, weights = given.few_shot, given.weights
    assert shots is not None and shots.vectors.views is not None and shots.labels is not None and weights is not None
    assert fitted.channels is not None and len(fitted.channels) == 8  # 500/1024 of 16

    def refined(vector: torch.Tensor) -> torch.Tensor:
        kept = torch.stack([vector[channel] for channel in fitted.channels])  # type: ignore[union-attr]
        return F.normalize(kept, dim=0)

    images = F.normalize(randoms(4, 16, seed=2), dim=-1)
    slow = torch.zeros(4, 3)
    for j, label in enumerate(shots.labels.tolist()):
        key = refined(F.normalize(shots.vectors.views[j].mean(0), dim=0))
        believed = torch.softmax(torch.stack([key @ refined(text) for text in weights.vectors]), 0)
        one_hot = F.one_hot(torch.tensor(label), 3).float()
        divergence = (one_hot * ((one_hot + 1e-6) / (believed + 1e-6)).log2()).sum()
        for i, image in enumerate(images):
            slow[i, label] += 0.2 * 1.5 * torch.exp(-4.0 * (1 - refined(image) @ key)) * torch.exp(0.3 * divergence)
    assert torch.allclose(fitted.term(Vectors("image", images), torch.zeros(4, 3)), slow, atol=1e-4)


def test_it_leaves_out_the_channels_in_which_classes_agree(tiny_source: Any, blobs: Blobs) -> None:
    # Channels 0..7 hold the class; the others a large common part that differs from image to image for no reason.
    random = torch.Generator().manual_seed(0)
    codes = F.one_hot(torch.arange(4), 8).float()

    def images(labels: torch.Tensor) -> torch.Tensor:
        common = 1.5 + 0.8 * torch.randn(len(labels), 8, generator=random)
        return F.normalize(torch.cat([codes[labels], common], 1), dim=-1)

    labels = torch.arange(4).repeat_interleave(4)
    shots = images(labels)
    texts = F.normalize(torch.cat([codes, torch.full((4, 8), 1.5)], 1), dim=-1)
    given = replace(
        blobs(classes=4),
        few_shot=Part("train", Vectors("image", shots, views=shots[:, None]), labels),
        weights=ClassWeights(texts, torch.arange(4)),
    )
    tested = torch.arange(4).repeat_interleave(25)
    queries, logits = Vectors("image", images(tested)), torch.zeros(100, 4)

    def right(share: float) -> float:
        fitted = Ape(alpha=1.0, beta=20.0, gamma=0.0, share=share).fit(given, tiny_source())
        return float((fitted.term(queries, logits).argmax(1) == tested).float().mean())

    fitted = Ape(share=0.25).fit(given, tiny_source())
    assert fitted.channels is not None and fitted.channels.max() < 8
    assert right(0.5) > 0.9
    assert right(1.0) < 0.8


def test_a_key_that_its_name_gets_wrong_counts_more(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(noise=0.6, beside=0.8)
    assert given.few_shot is not None
    logits = torch.zeros(len(given.few_shot), 3)
    plain, weighed = (Ape(alpha=1.0, beta=1.0, gamma=g).fit(given, tiny_source()) for g in (0.0, 1.0))
    assert plain.divergence is not None and plain.divergence.max() > plain.divergence.min()
    ratio = weighed.term(given.few_shot.vectors, logits) / plain.term(given.few_shot.vectors, logits)
    assert ratio.min() >= float(plain.divergence.min().exp()) - 1e-4
    assert ratio.max() <= float(plain.divergence.max().exp()) + 1e-4


def test_constants_come_from_validation_images(blobs: Blobs, tiny_source: Any) -> None:
    given = blobs(val=True, beside=0.8)
    assert given.val is not None and given.val.labels is not None and given.logits is not None
    base = given.logits(given.val.vectors)
    chosen = Ape().fit(given, tiny_source())
    assert given.metric(base + chosen.term(given.val.vectors, base), given.val.labels) >= given.metric(
        base, given.val.labels
    )
    fixed = Ape(gamma=0.7).fit(blobs(), tiny_source())
    assert (fixed.alpha, fixed.beta, fixed.gamma) == (1.0, 1.0, 0.7)


def test_what_it_refuses(blobs: Blobs, tiny_source: Any) -> None:
    with pytest.raises(ConfigError, match="share is 0"):
        Ape(share=0.0).fit(blobs(), tiny_source())
    with pytest.raises(ConfigError, match="depend on the image"):
        Ape().fit(replace(blobs(), weights=None), tiny_source())


def test_names_of_a_class_count_as_their_mean() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]])
    assert torch.allclose(single_vectors(vectors, torch.tensor([0, 0, 1])), expected)
