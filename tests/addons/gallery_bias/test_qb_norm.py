import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.adapted import subtracted
from vlkit.addons.exchange import Vectors
from vlkit.addons.gallery_bias.log_sum_exp import LogSumExp
from vlkit.addons.gallery_bias.qb_norm import QbNorm
from vlkit.addons.reference import Captions, Reference
from vlkit.errors import ConfigError


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def reference() -> Reference:
    return Reference(task="retrieval", captions=Captions(("t",) * 6, Vectors("text", unit(6, 1)), "train"))


def test_against_the_paper_in_a_slow_loop(tiny_source: Any, reference: Reference) -> None:
    gallery, queries, fitted = unit(12, 2), unit(30, 3), QbNorm(beta=20.0).fit(reference, tiny_source())
    assert reference.captions is not None
    bank = reference.captions.vectors.pooled
    hubs = {int((other @ gallery.T).argmax()) for other in bank}
    scores = queries @ gallery.T
    found = scores - subtracted(fitted, scores, Vectors("image", gallery))
    gated = 0
    for row, query in enumerate(queries):
        plain = [float(query @ item) for item in gallery]
        if plain.index(max(plain)) in hubs:
            gated += 1
            below = [sum(math.exp(20 * float(item @ other)) for other in bank) for item in gallery]
            plain = [math.exp(20 * score) / under for score, under in zip(plain, below, strict=True)]
        assert found[row].argsort().tolist() == torch.tensor(plain, dtype=torch.float64).argsort().tolist()
    assert 0 < gated < 30  # both ways were taken


def test_without_hubs_the_ranking_is_plain_and_with_all_it_is_the_inverted_softmax(
    tiny_source: Any, reference: Reference
) -> None:
    gallery, scores = Vectors("image", unit(12, 2)), unit(30, 3) @ unit(12, 2).T
    none = QbNorm(k=0).fit(reference, tiny_source())
    assert torch.equal(scores - subtracted(none, scores, gallery), scores)
    everywhere = QbNorm(k=12).fit(reference, tiny_source())
    ungated = LogSumExp().fit(reference, tiny_source()).bias(gallery)
    assert torch.equal(subtracted(everywhere, scores, gallery), ungated.expand(30, -1))
    # The gate is what the method adds: with one item a bank query, some queries are left alone.
    some = subtracted(QbNorm(k=1).fit(reference, tiny_source()), scores, gallery)
    assert 0 < int((some == 0).all(1).sum()) < 30


def test_what_cannot_be(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(ConfigError, match="beta = 0"):
        QbNorm(beta=0.0).fit(reference, tiny_source())
    with pytest.raises(ConfigError, match="k = -1"):
        QbNorm(k=-1).fit(reference, tiny_source())
