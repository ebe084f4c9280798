from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.pair_scores.calip import Calip, attended
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.errors import ConfigError, ModelError

CLASSES = tuple(parse_class(name) for name in ("cat", "dog", "owl"))


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def images(count: int = 4) -> Vectors:
    return Vectors("image", unit(count, seed=0), patches=unit(count, 6, seed=1), grid=(2, 3))


def test_against_the_authors_equations_in_a_slow_loop() -> None:
    given, texts = images(), Vectors("text", unit(3, seed=2))
    scoring = Calip(beta_text=0.7, beta_image=0.2)
    assert given.patches is not None
    expected = torch.zeros(4, 3)
    for i, (x, patches) in enumerate(zip(given.pooled, given.patches, strict=True)):
        attention = torch.tensor([[2 * float(patch @ text) for text in texts.pooled] for patch in patches]).exp()
        over_patches, over_classes = attention / attention.sum(0), attention / attention.sum(1, keepdim=True)
        for c, text in enumerate(texts.pooled):
            new_text = sum(over_patches[p, c] * patches[p] for p in range(6))
            new_patches = torch.stack([sum(over_classes[p, k] * texts.pooled[k] for k in range(3)) for p in range(6)])
            pooled = new_patches.mean(0) + new_patches.max(0).values
            expected[i, c] = x @ text + 0.7 * x @ new_text + 0.2 * pooled @ text
    torch.testing.assert_close(scoring.score(given, texts), expected)
    torch.testing.assert_close(scoring.score(texts, given), expected.T)


def test_betas_of_zero_are_plain_clip_and_the_order_of_patches_is_nothing() -> None:
    given, texts = images(), Vectors("text", unit(3, seed=2))
    assert given.patches is not None
    assert torch.allclose(Calip(beta_text=0, beta_image=0).score(given, texts), given.pooled @ texts.pooled.T)
    shuffled = Vectors("image", given.pooled, patches=given.patches.flip(1))
    torch.testing.assert_close(Calip(beta_text=1, beta_image=1).score(shuffled, texts),
                               Calip(beta_text=1, beta_image=1).score(given, texts))  # fmt: skip


def test_betas_are_chosen_on_validation_images(tiny_source: Any) -> None:
    """The pooled features know nothing; one patch of each image is the text of its class."""
    texts, labels = unit(3, seed=2), torch.arange(3).repeat(8)
    patches = unit(24, 6, seed=5)
    patches[:, 2] = texts[labels]
    val = Part("val", Vectors("image", unit(24, seed=6), patches=patches), labels)
    reference = Reference(class_names=CLASSES, val=val, weights=ClassWeights(texts, torch.arange(3)))
    fitted = Calip().fit(reference, tiny_source())
    assert fitted.beta_image is not None and fitted.beta_image > 0

    def accuracy(scoring: Calip) -> float:
        found = scoring.score(val.vectors, Vectors("text", texts)).argmax(1)
        return (found == labels).double().mean().item()

    assert accuracy(fitted) > accuracy(Calip(beta_text=0.0, beta_image=0.0)) + 0.2
    assert Calip(beta_text=0.5).fit(reference, tiny_source()).beta_text == 0.5
    alone = Calip().fit(Reference(), tiny_source())
    assert alone.beta_text == alone.beta_image == 0.1


def test_needs_patches_and_classes(tiny_source: Any) -> None:
    with pytest.raises(ModelError, match="patches"):
        attended(Vectors("image", unit(2, seed=0)), unit(3, seed=2))
    with pytest.raises(ConfigError, match="calip is for classification"):
        Pipeline([Calip()]).fit(Reference(task="retrieval"), tiny_source())
    assert attended(images(0), unit(3, seed=2)).plain.shape == (0, 3)
