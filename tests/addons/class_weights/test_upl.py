"""UPL: which images stand for which class, the mean of probabilities, and classes that are predicted for none."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.upl import Upl, mean_of_probabilities, surest
from vlkit.errors import DataError

NAMES = ["dog", "black cat", "boat"]


def test_the_surest_of_each_predicted_class() -> None:
    chances = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.45, 0.55]])
    rows, labels = surest(chances, 2)
    assert rows.tolist() == [1, 2, 3, 4] and labels.tolist() == [0, 0, 1, 1]


def test_probabilities_are_averaged_not_logits() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 4
    found = mean_of_probabilities(logits).softmax(-1)
    assert torch.allclose(found, torch.stack([one.softmax(-1) for one in logits]).mean(0), atol=1e-6)
    assert not torch.allclose(found, logits.mean(0).softmax(-1), atol=1e-2)


def test_it_is_coop_on_its_pseudo_labels(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES, shots=6, noise=0.15), small()
    fitted = Upl(context=2, runs=1, per_class=2, epochs=2, lr=0.1).fit(given, source)
    chosen = fitted.examples(given)
    assert len(chosen.labels) == 6 and (chosen.labels == torch.tensor([0, 0, 1, 1, 2, 2])).all()
    shown = replace(given, few_shot=replace(given.few_shot, vectors=chosen.vectors, labels=chosen.labels), seed=0)
    coop = CoOp(context=2, epochs=2, lr=0.1).fit(shown, source)
    assert torch.allclose(fitted.vectors[0], coop.vectors, atol=1e-6)  # type: ignore[index, arg-type]
    images = given.images.vectors
    mine, other = (one.weights(given.class_names, source) for one in (fitted, coop))
    scale = source.logit_scale
    assert torch.allclose(
        (scale * mine.scores(images)).softmax(-1), (scale * other.scores(images.pooled)).softmax(-1), atol=1e-5
    )


def test_runs_differ_and_all_count(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, shots=4)
    fitted = Upl(context=2, runs=3, epochs=1).fit(given, small())
    assert fitted.vectors.shape == (3, 2, 32) and fitted.steps == 3  # type: ignore[union-attr]
    assert not torch.allclose(fitted.vectors[0], fitted.vectors[1])  # type: ignore[index]


def test_classes_that_are_never_predicted(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    part = replace(given.images, vectors=given.images.vectors.rows(range(8)))
    lacking = replace(given, images=part)
    with pytest.raises(DataError, match=r"1 of 3 classes .*'boat'"):
        Upl().fit(lacking, small())
    assert Upl(context=2, runs=1, epochs=1, missing="accept").fit(lacking, small()).steps == 1
