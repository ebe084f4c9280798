from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.gallery_bias.top_k_mean import TopKMean
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.errors import ConfigError, DataError


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def reference() -> Reference:
    captions = Captions(("t",) * 40, Vectors("text", unit(40, 1)), "train")
    return Reference(task="retrieval", images=Part("train", Vectors("image", unit(40, 0))), captions=captions)


def test_against_the_equation_in_a_slow_loop(tiny_source: Any, reference: Reference) -> None:
    gallery, fitted = unit(6, 2), TopKMean(alpha=0.75, k=5).fit(reference, tiny_source())
    assert reference.captions is not None
    slow = []
    for item in gallery:
        similarities = sorted((float(item @ query) for query in reference.captions.vectors.pooled), reverse=True)
        slow.append(0.75 * sum(similarities[:5]) / 5)
    assert torch.allclose(fitted.bias(Vectors("image", gallery)), torch.tensor(slow), atol=1e-6)


def test_with_the_whole_bank_it_is_the_mean(tiny_source: Any, reference: Reference) -> None:
    gallery = Vectors("text", unit(6, 2))
    whole = TopKMean(alpha=0.5, k=40).fit(reference, tiny_source()).bias(gallery)
    assert torch.allclose(whole, Mean(lam=0.5).fit(reference, tiny_source()).bias(gallery), atol=1e-6)
    # The nearest queries are what the method is about: fewer of them give another, larger bias.
    assert (TopKMean(alpha=0.5, k=3).fit(reference, tiny_source()).bias(gallery) > whole + 0.05).all()


def test_a_constant_on_one_gallery_item_is_removed(tiny_source: Any, reference: Reference) -> None:
    # With alpha 1 and any k, what is added to all scores of one item goes into its bias and out again.
    bank = F.normalize(torch.cat([unit(40, 5, 7), torch.ones(40, 1)], dim=1), dim=-1)
    captions = Captions(("t",) * 40, Vectors("text", bank), "train")
    fitted = TopKMean(alpha=1.0, k=7).fit(Reference(task="retrieval", captions=captions), tiny_source())
    gallery, lifted = unit(4, 6), unit(4, 6)
    lifted = lifted + 3.0 * torch.eye(8)[7] * torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]
    queries = bank[:10]
    plain = queries @ gallery.T - fitted.bias(Vectors("image", gallery))
    hub = queries @ lifted.T - fitted.bias(Vectors("image", lifted))
    amount = queries[:, 7:8] * 3.0 - (hub - plain)[:, 1:2]
    assert torch.allclose(amount, amount.mean().expand_as(amount), atol=1e-5)
    assert torch.equal((hub - plain)[:, [0, 2, 3]], torch.zeros(10, 3))


def test_a_permuted_gallery_permutes_the_bias(tiny_source: Any, reference: Reference) -> None:
    fitted, gallery, order = TopKMean(k=4).fit(reference, tiny_source()), unit(9, 2), torch.randperm(9)
    assert torch.allclose(
        fitted.bias(Vectors("image", gallery))[order], fitted.bias(Vectors("image", gallery[order])), atol=1e-6
    )


def test_too_small_a_bank_is_refused(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(DataError, match="k = 128, but the bank holds 40 images"):
        TopKMean().fit(reference, tiny_source())
    with pytest.raises(ConfigError, match="expected at least 1"):
        TopKMean(k=0).fit(reference, tiny_source())
