from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.errors import ConfigError, DataError


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def reference() -> Reference:
    images, texts = Vectors("image", unit(30, 0)), Vectors("text", unit(40, 1))
    return Reference(task="retrieval", images=Part("train", images), captions=Captions(("t",) * 40, texts, "train"))


def test_it_is_the_mean_similarity_to_the_bank_of_the_other_kind(tiny_source: Any, reference: Reference) -> None:
    fitted = Mean(lam=0.25).fit(reference, tiny_source())
    gallery = unit(5, 2)
    for kind, bank in (("image", reference.captions), ("text", reference.images)):
        assert bank is not None
        slow = [0.25 * sum(float(item @ query) for query in bank.vectors.pooled) / len(bank) for item in gallery]
        assert torch.allclose(fitted.bias(Vectors(kind, gallery)), torch.tensor(slow), atol=1e-6)


def test_strength_zero_changes_nothing(tiny_source: Any, reference: Reference) -> None:
    fitted = Mean(lam=0.0).fit(reference, tiny_source())
    assert torch.equal(fitted.bias(Vectors("text", unit(5, 2))), torch.zeros(5))


def test_it_lifts_the_right_answer_over_a_hub(tiny_source: Any, reference: Reference) -> None:
    # A caption between all images comes up first for every image; its mean similarity gives it away.
    images = F.normalize(torch.eye(4, 8) + 0.8 * torch.ones(4, 8), dim=-1)
    hub = F.normalize(torch.ones(1, 8), dim=-1)
    texts = F.normalize(torch.cat([torch.eye(4, 8) + 0.15 * torch.ones(4, 8), hub]), dim=-1)
    bank = F.normalize(0.2 * unit(50, 3) + hub, dim=-1)
    fitted = Mean(lam=1.0).fit(replace(reference, images=Part("train", Vectors("image", bank))), tiny_source())
    scores = images @ texts.T
    assert (scores.argmax(1) == 4).all()
    assert (scores - fitted.bias(Vectors("text", texts))).argmax(1).tolist() == [0, 1, 2, 3]


def test_a_bank_is_drawn_by_seed(tiny_source: Any, reference: Reference) -> None:
    small = Mean(bank_size=10).fit(reference, tiny_source())
    again = Mean(bank_size=10).fit(reference, tiny_source())
    other = Mean(bank_size=10).fit(replace(reference, seed=1), tiny_source())
    assert small.images is not None and again.images is not None and other.images is not None
    assert torch.equal(small.images, again.images) and not torch.equal(small.images, other.images)


def test_what_cannot_be(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(DataError, match="bank of 31 unlabelled images was asked for, but the reference holds 30"):
        Mean(bank_size=31).fit(reference, tiny_source())
    with pytest.raises(ConfigError, match="needs a bank of queries"):
        Mean().fit(Reference(task="retrieval"), tiny_source())
    only_images = Mean().fit(replace(reference, captions=None), tiny_source())
    with pytest.raises(ConfigError, match="was fitted without captions, which a gallery of images needs"):
        only_images.bias(Vectors("image", unit(3, 4)))
