"""Out-of-distribution scores by hand and against scikit-learn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from eval.ood import OodEvaluator, OutSet, ood_scores
from vlkit.addons.classifier import ZeroShotClassifier
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError, GalleryError

NAMES = ("cat", "dog")


def records(name: str, num: int) -> list[Record]:
    return [Record(f"{name}/{row}", ImageRef(data=b"")) for row in range(num)]


def test_scores_by_hand(named_vectors: Callable[..., Any]) -> None:
    source = named_vectors({"a cat": [1.0, 0.0], "a dog": [0.0, 1.0]}, logit_scale=10.0)
    classifier = ZeroShotClassifier.build(source, NAMES, "a {}")
    scores = ood_scores(classifier, torch.tensor([[1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]]), temperature=2.0)
    # First image: cosines 1 and 0. MCM at temperature 2: e^0.5 / (e^0.5 + 1). Logits 10 and 0.
    assert scores["mcm"].tolist() == pytest.approx([math.exp(0.5) / (math.exp(0.5) + 1), 0.5], abs=1e-6)
    assert scores["max_softmax"].tolist() == pytest.approx([1 / (1 + math.exp(-10)), 0.5], abs=1e-6)
    assert scores["energy"].tolist() == pytest.approx(
        [math.log(math.exp(10) + 1), 10 * math.sqrt(0.5) + math.log(2)], abs=1e-5
    )
    assert scores["max_similarity"].tolist() == pytest.approx([1, math.sqrt(0.5)], abs=1e-6)


def test_near_far_and_shifted_sets_stay_apart(named_vectors: Callable[..., Any]) -> None:
    source = named_vectors(dim=6)
    known, sets = records("known", 40), [("near", "a"), ("near", "b"), ("far", "c"), ("shifted", "d")]
    outside = [OutSet(kind, name, records(name, 25)) for kind, name in sets]  # type: ignore[arg-type]
    evaluation = OodEvaluator(known, NAMES, outside, "a {}").run(source)
    prompts = torch.stack([source.vector(f"a {name}") for name in NAMES])

    def mcm(of: list[Record]) -> list[float]:
        cosines = torch.stack([source.vector(record.key) for record in of]) @ prompts.T
        return cosines.softmax(1).amax(1).tolist()

    for one in outside:
        truth = np.repeat([1, 0], [40, 25])
        expected = roc_auc_score(truth, mcm(known) + mcm(list(one.records)))
        assert evaluation.metrics[f"{one.kind}/{one.name}/mcm/auroc"] == pytest.approx(expected, abs=1e-6)
    near = [evaluation.metrics[f"near/{name}/mcm/auroc"] for name in "ab"]
    assert evaluation.metrics["near/mcm/auroc"] == pytest.approx(np.mean(near))
    assert evaluation.metrics["shifted/mcm/auroc"] == evaluation.metrics["shifted/d/mcm/auroc"]
    assert evaluation.counts["near/a_images"] == 25
    assert evaluation.per_item is not None and evaluation.per_item.num_rows == 140


def test_bad_input_is_refused(named_vectors: Callable[..., Any]) -> None:
    known, out = records("known", 4), OutSet("near", "a", records("a", 2))
    with pytest.raises(ConfigError, match="Give at least one with --near"):
        OodEvaluator(known, NAMES, [])
    with pytest.raises(ConfigError, match="have its own name"):
        OodEvaluator(known, NAMES, [out, out])
    with pytest.raises(ConfigError, match="one known class"):
        OodEvaluator(known, NAMES[:1], [out])
    with pytest.raises(DataError, match="has no image"):
        OodEvaluator(known, NAMES, [OutSet("near", "a", [])])
    with pytest.raises(GalleryError, match="not finite for 1 of 2 images"):
        OodEvaluator(known, NAMES, [out]).run(named_vectors({"a/1": [math.nan, 0.0]}))
