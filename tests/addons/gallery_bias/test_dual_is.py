import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.gallery_bias.dual_is import DualIS
from vlkit.addons.gallery_bias.log_sum_exp import LogSumExp
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.errors import ConfigError


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def reference() -> Reference:
    captions = Captions(("t",) * 25, Vectors("text", unit(25, 1)), "train")
    return Reference(task="retrieval", images=Part("train", Vectors("image", unit(20, 0))), captions=captions)


def test_it_ranks_as_the_product_of_both_ratios(tiny_source: Any, reference: Reference) -> None:
    first, second = 4.0, 12.0
    fitted = DualIS(beta_gallery=first, beta_queries=second).fit(reference, tiny_source())
    assert reference.images is not None and reference.captions is not None
    images, texts = reference.images.vectors.pooled, reference.captions.vectors.pooled
    gallery, queries = unit(10, 2), unit(5, 3)
    for kind, own, bank in (("image", images, texts), ("text", texts, images)):
        found = queries @ gallery.T - fitted.bias(Vectors(kind, gallery))  # type: ignore[arg-type]
        for row, query in enumerate(queries):
            ratio = []
            for item in gallery:
                of_own = math.exp(first * float(query @ item)) / sum(math.exp(first * float(o @ item)) for o in own)
                of_bank = math.exp(second * float(query @ item)) / sum(math.exp(second * float(b @ item)) for b in bank)
                ratio.append(of_own * of_bank)
            assert found[row].argsort().tolist() == torch.tensor(ratio, dtype=torch.float64).argsort().tolist()


def test_with_the_query_bank_alone_it_is_the_inverted_softmax(tiny_source: Any, reference: Reference) -> None:
    gallery = Vectors("image", unit(6, 2))
    alone = DualIS(beta_gallery=0.0, beta_queries=20.0).fit(reference, tiny_source()).bias(gallery)
    assert torch.allclose(alone, LogSumExp(beta=20.0).fit(reference, tiny_source()).bias(gallery), atol=1e-6)
    # The second bank is what the method adds.
    assert not torch.allclose(DualIS(beta_gallery=5.0).fit(reference, tiny_source()).bias(gallery), alone, atol=1e-3)


def test_what_cannot_be(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(ConfigError, match="dual_is needs captions"):
        DualIS().fit(Reference(task="retrieval", images=reference.images), tiny_source())
    with pytest.raises(ConfigError, match="beta_gallery = -1"):
        DualIS(beta_gallery=-1.0).fit(reference, tiny_source())
