import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import Vectors
from vlkit.addons.reference import Part, Reference
from vlkit.addons.terms.tip_adapter import TipAdapter

CLASSES = tuple(parse_class(name) for name in ("cat", "dog"))


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reference(val: bool = False, **changes: Any) -> Reference:
    shots = Vectors("image", unit(6, seed=0), views=unit(6, 3, seed=1))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # Validation images look like the keys of their class; the base logits are wrong about all of them.
    of_val = Part("val", Vectors("image", F.normalize(unit(6, 3, seed=1).mean(1), dim=-1)), labels) if val else None
    base = -5.0 * F.one_hot(labels, 2).float()
    return Reference(
        class_names=CLASSES, few_shot=Part("train", shots, labels), val=of_val, logits=lambda images: base, **changes
    )


def test_against_the_equation_in_a_slow_loop(tiny_source: Any) -> None:
    fitted = TipAdapter(alpha=1.5, beta=4.0).fit(reference(), tiny_source(logit_scale=50.0))
    queries = unit(3, seed=2)
    keys = F.normalize(unit(6, 3, seed=1).mean(1), dim=-1)
    slow = torch.zeros(3, 2)
    for i in range(3):
        for j, label in enumerate([0, 0, 0, 1, 1, 1]):
            # The paper's alpha stands beside 100 x cosine; this model multiplies by 50.
            slow[i, label] += 1.5 * 50 / 100 * math.exp(-4.0 * (1 - float(queries[i] @ keys[j])))
    found = fitted.term(Vectors("image", queries), torch.zeros(3, 2))
    assert torch.allclose(found, slow, atol=1e-5)


def test_a_sharp_cache_gives_the_label_of_the_nearest_key(tiny_source: Any) -> None:
    fitted = TipAdapter(alpha=1.0, beta=500.0).fit(reference(), tiny_source())
    assert fitted.keys is not None
    found = fitted.term(Vectors("image", fitted.keys), torch.zeros(6, 2))
    assert found.argmax(1).tolist() == [0, 0, 0, 1, 1, 1]


def test_alpha_and_beta_are_chosen_on_validation_images(tiny_source: Any) -> None:
    source = tiny_source(logit_scale=100.0)
    chosen = TipAdapter().fit(reference(val=True), source)
    assert chosen.alpha is not None and chosen.beta is not None
    given = reference(val=True)
    assert given.val is not None and given.val.labels is not None and given.logits is not None
    base = given.logits(given.val.vectors)
    logits = base + chosen.term(given.val.vectors, base)
    assert given.metric(base, given.val.labels) == 0.0
    assert given.metric(logits, given.val.labels) == 1.0  # only because the cache was weighted against the base
    fixed = TipAdapter().fit(reference(), source)
    assert (fixed.alpha, fixed.beta) == (1.17, 1.0)
    assert TipAdapter(alpha=3.0).fit(reference(val=True), source).alpha == 3.0


def test_alpha_zero_adds_nothing(tiny_source: Any) -> None:
    fitted = TipAdapter(alpha=0.0, beta=1.0).fit(reference(), tiny_source())
    assert torch.equal(fitted.term(Vectors("image", unit(3, seed=2)), torch.zeros(3, 2)), torch.zeros(3, 2))


def test_without_views_it_is_refused(tiny_source: Any) -> None:
    labels = torch.tensor([0, 1])
    bare = Reference(class_names=CLASSES, few_shot=Part("train", Vectors("image", unit(2, seed=0)), labels))
    from vlkit.addons.pipeline import Pipeline
    from vlkit.errors import ConfigError

    with pytest.raises(ConfigError, match="wants the reference images once more"):
        Pipeline([TipAdapter()]).fit(bare, tiny_source())
