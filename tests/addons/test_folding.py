from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import Vectors
from vlkit.addons.feature_maps.distribution_norm import DistributionNorm
from vlkit.addons.folding import fold_bias
from vlkit.addons.gallery_bias.dual_is import DualIS
from vlkit.addons.gallery_bias.log_sum_exp import LogSumExp
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.gallery_bias.qb_norm import QbNorm
from vlkit.addons.gallery_bias.top_k_mean import TopKMean
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Captions, Part, Reference
from vlkit.errors import ConfigError
from vlkit.index.faiss_index import EmbeddingIndex


def unit(rows: int, seed: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def reference() -> Reference:
    captions = Captions(("t",) * 40, Vectors("text", unit(40, 1)), "train")
    return Reference(task="retrieval", images=Part("train", Vectors("image", unit(30, 0))), captions=captions)


@pytest.mark.parametrize("bias", [Mean(lam=0.5), TopKMean(k=4), LogSumExp(), DualIS()], ids=lambda one: one.name)
def test_an_index_gives_the_same_order_and_scores(tiny_source: Any, reference: Reference, bias: Any) -> None:
    source, gallery, queries = tiny_source(), Vectors("image", unit(50, 2)), unit(7, 3)
    pipeline = Pipeline([bias]).fit(reference, source)
    exact = torch.cat(list(pipeline.retrieval(gallery, Vectors("text", queries), source).scores("text_to_image")))
    assert pipeline.bias is not None
    folded = fold_bias(pipeline.bias, gallery)
    found = EmbeddingIndex.build(folded.vectors, [str(row) for row in range(50)]).search(folded.queries(queries), 50)
    best = exact.sort(dim=1, descending=True)
    assert [[int(name) for name in row] for row in found.ids] == best.indices.tolist()
    assert torch.allclose(folded.scores(found.scores, queries), best.values, atol=1e-5)
    # Without the bias the order is another one.
    assert (queries @ gallery.pooled.T).argsort(1, descending=True).tolist() != best.indices.tolist()


def test_features_that_are_no_longer_unit_fold_too(tiny_source: Any, reference: Reference) -> None:
    source, images, texts = tiny_source(), Vectors("image", unit(20, 2)), Vectors("text", unit(5, 3))
    pipeline = Pipeline([DistributionNorm(bank_size=20), Mean()]).fit(reference, source)
    exact = torch.cat(list(pipeline.retrieval(images, texts, source).scores("text_to_image")))
    gallery, queries = pipeline.map(images, texts)
    assert pipeline.bias is not None
    folded = fold_bias(pipeline.bias, gallery)
    scores = folded.scores(folded.queries(queries.pooled) @ folded.vectors.T, queries.pooled)
    assert torch.allclose(scores, exact, atol=1e-5)


def test_what_cannot_be_folded(tiny_source: Any, reference: Reference) -> None:
    gallery = Vectors("image", unit(5, 2))
    with pytest.raises(ConfigError, match="qb_norm corrects some queries only"):
        fold_bias(QbNorm().fit(reference, tiny_source()), gallery)
    with pytest.raises(ConfigError, match="no vector in the gallery"):
        fold_bias(Mean().fit(reference, tiny_source()), replace(gallery, pooled=torch.empty(0, 16)))
