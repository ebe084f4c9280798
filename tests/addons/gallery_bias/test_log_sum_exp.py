import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.gallery_bias.log_sum_exp import LogSumExp
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.gallery_bias.top_k_mean import TopKMean
from vlkit.addons.reference import Captions, Reference
from vlkit.errors import ConfigError


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def reference() -> Reference:
    return Reference(task="retrieval", captions=Captions(("t",) * 40, Vectors("text", unit(40, 1)), "train"))


def test_it_ranks_as_the_inverted_softmax(tiny_source: Any, reference: Reference) -> None:
    gallery, queries, fitted = unit(12, 2), unit(5, 3), LogSumExp(beta=20.0).fit(reference, tiny_source())
    assert reference.captions is not None
    found = queries @ gallery.T - fitted.bias(Vectors("image", gallery))
    for row, query in enumerate(queries):
        ratio = []
        for item in gallery:
            below = sum(math.exp(20 * float(item @ other)) for other in reference.captions.vectors.pooled)
            ratio.append(math.exp(20 * float(query @ item)) / below)
        assert found[row].argsort().tolist() == torch.tensor(ratio).argsort().tolist()
    assert found.argsort(1).tolist() != (queries @ gallery.T).argsort(1).tolist()  # it does change something


def test_its_limits_are_the_mean_and_the_maximum(tiny_source: Any, reference: Reference) -> None:
    gallery, source = Vectors("image", unit(6, 2)), tiny_source()
    mean = Mean(lam=1.0).fit(reference, source).bias(gallery)
    largest = TopKMean(alpha=1.0, k=1).fit(reference, source).bias(gallery)
    assert torch.allclose(LogSumExp(beta=1e-2).fit(reference, source).bias(gallery), mean, atol=2e-3)
    # No overflow at a sharpness where exp(beta) itself is infinite in float32.
    assert torch.allclose(LogSumExp(beta=1e4).fit(reference, source).bias(gallery), largest, atol=1e-3)


def test_beta_must_be_positive(tiny_source: Any, reference: Reference) -> None:
    with pytest.raises(ConfigError, match="beta = 0"):
        LogSumExp(beta=0.0).fit(reference, tiny_source())
