from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import Vectors
from vlkit.addons.feature_maps.distribution_norm import DistributionNorm
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.errors import ConfigError, DataError


def unit(rows: int, seed: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) + 0.5, dim=-1)


@pytest.fixture
def reference() -> Reference:
    images = Vectors("image", unit(20, 0), norm=torch.linspace(1, 5, 20))
    captions = Captions(("t",) * 20, Vectors("text", unit(20, 1)), "train")
    return Reference(task="retrieval", images=Part("train", images), captions=captions)


def test_retrieval_form_against_the_equation(tiny_source: Any, reference: Reference) -> None:
    fitted = DistributionNorm(lam=0.5, bank_size=20).fit(reference, tiny_source())
    images, texts = Vectors("image", unit(4, 2)), Vectors("text", unit(5, 3))
    mapped = fitted.map(images, texts)
    mu_x, mu_y = unit(20, 0).mean(0), unit(20, 1).mean(0)
    by_hand = torch.tensor([[float((x - 0.5 * mu_x) @ (y - 0.5 * mu_y)) for y in unit(5, 3)] for x in unit(4, 2)])
    assert torch.allclose(mapped[0].pooled @ mapped[1].pooled.T, by_hand, atol=1e-6)
    assert not mapped[0].unit and fitted.normalise == "before"


def test_the_ranking_is_that_of_the_mean_bias(tiny_source: Any, reference: Reference) -> None:
    source = tiny_source()
    images, texts = Vectors("image", unit(30, 2)), Vectors("text", unit(40, 3))
    dn = Pipeline([DistributionNorm(lam=0.5, bank_size=20)]).fit(reference, source).retrieval(images, texts, source)
    bias = Pipeline([Mean(lam=0.5)]).fit(reference, source).retrieval(images, texts, source)
    for direction in ("image_to_text", "text_to_image"):
        ours, theirs = (torch.cat(list(one.scores(direction))) for one in (dn, bias))  # type: ignore[arg-type]
        # Equal up to a constant of each query.
        assert torch.allclose(ours - ours[:, :1], theirs - theirs[:, :1], atol=1e-5)


def test_at_full_strength_the_bank_is_centred(tiny_source: Any, reference: Reference) -> None:
    fitted = DistributionNorm(lam=1.0, bank_size=20).fit(reference, tiny_source())
    bank, _ = fitted.map(reference.images.vectors, Vectors("text", torch.empty(0, 16)))  # type: ignore[union-attr]
    assert torch.allclose(bank.pooled.mean(0), torch.zeros(16), atol=1e-6)


def test_classification_form_against_the_equation(tiny_source: Any, reference: Reference) -> None:
    source, classes = tiny_source(), [parse_class(name) for name in ("cat", "dog", "bird")]
    given = replace(reference, task="classification", class_names=tuple(classes))
    pipeline = Pipeline([DistributionNorm(lam=0.25, bank_size=20)]).fit(given, source, "photo")
    images = Vectors("image", unit(6, 2), norm=torch.linspace(2, 3, 6))
    weights = pipeline.class_weights(classes, source, "photo")[0].vectors  # type: ignore[union-attr]
    mu_x = given.images.vectors.raw.mean(0)  # type: ignore[union-attr]
    mu_y = weights.mean(0)
    moved = F.normalize(images.raw - 0.25 * mu_x, dim=-1) @ F.normalize(weights - 0.25 * mu_y, dim=-1).T
    assert torch.allclose(pipeline.classifier(classes, source, "photo").logits(images), 20 * moved, atol=1e-4)


def test_strength_zero_is_the_identity(tiny_source: Any, reference: Reference) -> None:
    fitted = DistributionNorm(lam=0.0, bank_size=20).fit(reference, tiny_source())
    images, texts = Vectors("image", unit(4, 2)), Vectors("text", unit(5, 3))
    assert torch.equal(fitted.map(images, texts)[0].pooled, images.pooled)


def test_fewer_images_than_asked_for_is_an_error(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(DataError, match="bank of 100 unlabelled images was asked for, but the reference holds 20"):
        DistributionNorm().fit(reference, tiny_source())
    with pytest.raises(ConfigError, match="needs the class names"):
        DistributionNorm(bank_size=5).fit(replace(reference, captions=None), tiny_source())
