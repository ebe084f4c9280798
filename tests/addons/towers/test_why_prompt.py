from dataclasses import replace
from typing import Any

import pytest
import torch

from eval.metrics import Candidates, doubly_right
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part
from vlkit.addons.towers.why_prompt import WhyPrompt, rationale_texts, reasons_of
from vlkit.errors import DataError

SHORT = {"epochs": 20, "lr": 0.3, "batch_size": 6, "crop": 1.0}
REASONS = ("much of its colour.", "noise")


@pytest.fixture
def why(tower_case: Any) -> Any:
    """The pictures with reasons: the first two of a class have one, the last two the other."""
    shots = tower_case.reference.few_shot
    records = tuple(replace(one, captions=(REASONS[row % 4 // 2],)) for row, one in enumerate(shots.records))
    return replace(tower_case.reference, few_shot=Part("train", shots.vectors, shots.labels, records))


def test_texts_of_all_pairs(why: Any) -> None:
    distinct, own = reasons_of(why.few_shot.records)
    assert distinct == ["much of its colour", "noise"] and own.tolist() == [0, 0, 1, 1] * 3
    found = rationale_texts(["a {reason}", "dog"], distinct)
    assert found.texts[1] == "This is a photo of a a {reason} because there is noise"
    assert found.texts[2] == "This is a photo of a dog because there is much of its colour"
    assert found.classes.tolist() == [0, 0, 1, 1] and found.reasons.tolist() == [0, 1, 0, 1]


def test_learns_class_and_reason(tower_case: Any, why: Any) -> None:
    stock = tower_case.encoder.encode_image(tower_case.images)
    pipeline = Pipeline([WhyPrompt(**SHORT)]).fit(why, tower_case.source)
    again = Pipeline([WhyPrompt(**SHORT)]).fit(why, tower_case.source)
    assert pipeline.addons[0].key == again.addons[0].key
    distinct, own = reasons_of(why.few_shot.records)
    candidates = rationale_texts([item.shown for item in why.class_names], distinct)
    texts = tower_case.source.embed_texts(candidates.texts)

    def rates(edits: Any) -> Any:
        images = Passes(tower_case.source).read(why.few_shot.records, edits).vectors.pooled
        pairs = Candidates(candidates.classes, candidates.reasons)
        return doubly_right(images @ texts.T, pairs, why.few_shot.labels, own, k=1)

    assert rates(pipeline.edits).both > rates(()).both + 0.2
    assert torch.equal(tower_case.encoder.encode_image(tower_case.images), stock)


def test_the_loss_is_over_all_pairs(tower_case: Any, why: Any, task_of: Any) -> None:
    addon = WhyPrompt(crop=1.0)
    task = replace(task_of(addon), reference=why)
    rows = torch.tensor([1, 6, 10])
    with addon.training(task) as found:
        loss = addon.objective(task, found)(rows)
        images = tower_case.encoder.encode_image(task_of(addon).pixels.batch(rows))
    pairs = [(name, reason) for name in ("red", "green", "blue") for reason in ("much of its colour", "noise")]
    texts = [f"This is a photo of a {name} because there is {reason}" for name, reason in pairs]
    logits = tower_case.source.logit_scale * images @ tower_case.source.embed_texts(texts).T
    right = [pairs.index(pair) for pair in (("red", pairs[0][1]), ("green", "noise"), ("blue", "noise"))]
    expected = -sum(logits[row].log_softmax(0)[place].item() for row, place in enumerate(right)) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert addon.plan(task).weight_decay == 0 and found["prompts"].std() > 0.8


def test_images_without_a_reason(tower_case: Any) -> None:
    shots = tower_case.reference.few_shot
    records = tuple(replace(one, captions=("a reason " * 9,)) for one in shots.records)
    long = replace(tower_case.reference, few_shot=Part("train", shots.vectors, shots.labels, records))
    with pytest.raises(DataError, match=r"this model takes 20\. Shorten the reason"):
        Pipeline([WhyPrompt(**SHORT)]).fit(long, tower_case.source)
    with pytest.raises(DataError, match=r"12 of 12 images have no reason \(first: 0#0\)"):
        Pipeline([WhyPrompt(**SHORT)]).fit(tower_case.reference, tower_case.source)
