"""Text against text: scipy's correlations, and captions that look for each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr

from eval.metrics import pearson, spearman
from eval.text_similarity import (
    SameImageCaptionsEvaluator,
    ScoredPairsEvaluator,
    read_scored_pairs,
)
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError, GalleryError


def test_correlations_equal_scipy() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=60), random.integers(0, 5, 60)
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    with pytest.raises(ValueError, match="single value"):
        spearman(x, np.ones(60))


def test_scored_pairs(named_vectors: Callable[..., Any], tmp_path: Path) -> None:
    table = tmp_path / "sts.tsv"
    rows = [f"text {row}\ttext {row + 1}\t{row % 4}" for row in range(20)]
    table.write_text("sentence1\tsentence2\tscore\n" + "\n".join(rows))
    pairs, source = read_scored_pairs(table), named_vectors(dim=4)
    evaluation = ScoredPairsEvaluator(pairs).run(source)
    cosine = [(source.vector(p.first) @ source.vector(p.second)).item() for p in pairs]
    scores = [p.score for p in pairs]
    assert evaluation.metrics["spearman"] == pytest.approx(spearmanr(cosine, scores).statistic, abs=1e-6)
    assert evaluation.metrics["pearson"] == pytest.approx(pearsonr(cosine, scores).statistic, abs=1e-6)
    assert evaluation.metrics["kendall_tau_b"] == pytest.approx(kendalltau(cosine, scores).statistic, abs=1e-6)
    assert evaluation.counts == {"pairs": 20, "texts": 21} and len(source.texts) == 21
    table.write_text("sentence1\tsentence2\tscore\na\tb\tmuch\n")
    with pytest.raises(DataError, match="score is 'much'; expected a number"):
        read_scored_pairs(table)
    with pytest.raises(DataError, match="2 scored pairs of 2 distinct scores"):
        ScoredPairsEvaluator(pairs[:2])


def test_captions_find_those_of_their_image(named_vectors: Callable[..., Any]) -> None:
    captions = [[f"{row} {n}" for n in range(1 + row % 3)] for row in range(9)]
    records = [Record(str(row), ImageRef(data=b""), tuple(texts)) for row, texts in enumerate(captions)]
    source = named_vectors(dim=4)
    evaluation = SameImageCaptionsEvaluator(records).run(source)
    texts = [(text, row) for row, some in enumerate(captions) for text in some]
    hits, precision = [], []
    for text, owner in texts:
        others = [(other, row) for other, row in texts if other != text]
        if len(captions[owner]) == 1:
            continue
        order = torch.stack([source.vector(other) for other, _ in others]) @ source.vector(text)
        right = [others[row][1] == owner for row in order.argsort(descending=True).tolist()]
        hits.append(right[0])
        precision.append(np.mean([np.mean(right[: i + 1]) for i in np.flatnonzero(right)]))
    assert evaluation.metrics["cmc@1"] == pytest.approx(np.mean(hits))
    assert evaluation.metrics["mean_average_precision"] == pytest.approx(np.mean(precision))
    assert evaluation.counts["texts_without_another"] == 3 and source.num_images == 0
    with pytest.raises(GalleryError, match="each caption has 2 others"):
        SameImageCaptionsEvaluator(records[:2]).run(source)
    with pytest.raises(DataError, match="has two captions"):
        SameImageCaptionsEvaluator(records[:1])
