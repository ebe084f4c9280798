"""The choice among methods: on images none has seen, the winner by hand, failures named."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.auto import ZERO_SHOT, choose, halves
from vlkit.addons.exchange import Vectors
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.addons.registry import make_addon
from vlkit.errors import ConfigError


@pytest.fixture
def given(tiny_source: Any, toy_records: Any) -> Any:
    from vlkit.addons.adapt import labelled_reference
    from vlkit.addons.class_names import parse_class

    names = ["cat", "dog", "cow", "fox"]

    def make(source: Any) -> Reference:
        passes = Passes(source)
        reference, _ = labelled_reference(
            passes, toy_records(names, 12), [parse_class(name) for name in names], shots=4, seed=1
        )
        return reference

    return make


def test_half_of_each_class_compares() -> None:
    tuning, comparing = halves(torch.tensor([1, 0, 0, 1, 0, 2]))
    assert tuning == [1, 0] and comparing == [2, 4, 3, 5]


def test_the_best_on_images_that_none_has_seen(given: Any, tiny_source: Any) -> None:
    source = tiny_source()
    reference = given(source)
    candidates = ("lp_plus_plus", "templates:templates=the {}")
    choice = choose(reference, source, "photo", candidates)
    tuning, comparing = halves(reference.val.labels)
    judged = reference.val.rows(comparing)
    counts = {}
    for name in (ZERO_SHOT, *candidates):
        inner = replace(reference, val=reference.val.rows(tuning))
        pipeline = PLAIN if name == ZERO_SHOT else Pipeline([make_addon(name)]).fit(inner, source, "photo")
        logits = pipeline.classifier(reference.class_names, source, "photo").logits(judged.vectors)
        counts[name] = (logits.argmax(1) == judged.labels).double().mean().item()
    assert {row.name: row.accuracy for row in choice.compared} == counts
    best = max(candidates, key=lambda name: counts[name])
    assert choice.adapted.addon.name == best.partition(":")[0]
    assert (choice.adapted.plain, choice.adapted.adapted) == (counts[ZERO_SHOT], counts[best])
    assert choice.adapted.addon.fitted is not None
    assert choice.why.startswith(f"{best} is chosen")


def test_what_cannot_be_fitted_is_named_and_left_out(given: Any, tiny_source: Any) -> None:
    source = tiny_source()
    reference = given(source)
    choice = choose(reference, source, "photo", ("upl:runs=0", "lp_plus_plus"))
    failed = next(row for row in choice.compared if row.name == "upl:runs=0")
    assert failed.accuracy is None and "runs" in failed.reason
    assert choice.adapted.addon.name == "lp_plus_plus"
    with pytest.raises(ConfigError, match="None of the candidates"):
        choose(reference, source, "photo", ("upl:runs=0",))
    with pytest.raises(ConfigError, match="there are none"):
        choose(replace(reference, val=None), source)


def test_it_says_when_nothing_is_better(given: Any, tiny_source: Any) -> None:
    source = tiny_source()
    reference = given(source)
    assert reference.val is not None and reference.val.labels is not None
    texts = source.embed_texts([f"a photo of a {item.shown}." for item in reference.class_names])
    easy = F.normalize(texts[reference.val.labels] + 0.01, dim=-1)
    reference = replace(reference, val=Part("val", Vectors("image", easy), reference.val.labels))
    choice = choose(reference, source, "photo", ("lp_plus_plus:epochs=1",))
    assert "consider leaving it" in choice.why
