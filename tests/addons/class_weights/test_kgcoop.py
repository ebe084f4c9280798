"""KgCoOp: its regulariser in a loop, 0 at the template, and what it holds."""

from typing import Any

import pytest
import torch

from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.kgcoop import KgCoOp
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]


def parts(addon: Any, given: Any, source: Any, context: torch.Tensor) -> tuple[Any, Any, float]:
    fitted = addon.fit(given, source)
    task = fitted.task(given, source, fitted.examples(given))
    return task, fitted, fitted.objective(task, {"vectors": context})(torch.arange(4)).item()


def test_the_loss_in_a_loop(small: Any, labelled: Any) -> None:
    given, context = labelled(NAMES), parameter(torch.randn(4, 32, generator=torch.Generator().manual_seed(2)))
    task, _, held = parts(KgCoOp(lr=0.0, epochs=1), given, small(), context)
    _, _, plain = parts(KgCoOp(lr=0.0, epochs=1, weight=0.0), given, small(), context)
    learned = task.text.features(context).detach()
    apart = 0.0
    for row, name in enumerate(NAMES):
        hand = small().embed_texts([f"a photo of a {name}."])[0]
        apart += 1 - sum(float(a) * float(b) for a, b in zip(learned[row], hand, strict=True))
    assert held == pytest.approx(plain + 8.0 * small().logit_scale / 100 * apart / 3, abs=1e-4)
    assert apart > 0.05


def test_nothing_is_added_at_the_template(small: Any, labelled: Any) -> None:
    given = labelled(NAMES)
    start = KgCoOp(lr=0.0, epochs=1).fit(given, small()).vectors
    _, _, held = parts(KgCoOp(lr=0.0, epochs=1), given, small(), start)
    _, _, plain = parts(KgCoOp(lr=0.0, epochs=1, weight=0.0), given, small(), start)
    assert held == pytest.approx(plain, abs=1e-5)


def test_weight_0_is_coop_and_a_great_one_keeps_the_template(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, noise=0.3)
    common = {"lr": 0.02, "epochs": 6, "batch_size": 4, "words": "a photo of a"}
    learners = (KgCoOp(weight=0.0, **common), CoOp(**common), KgCoOp(weight=56.0, **common))  # type: ignore[arg-type]
    free, coop, held = (one.fit(given, small()) for one in learners)
    assert torch.equal(free.vectors, coop.vectors)  # type: ignore[arg-type]
    hand = small().embed_texts([f"a photo of a {name}." for name in NAMES])
    near, far = ((one.weights(given.class_names, small()).vectors * hand).sum(1).mean() for one in (held, coop))
    assert near > far + 1e-4


def test_a_template_needs_its_braces(small: Any, labelled: Any) -> None:
    with pytest.raises(ConfigError, match="needs one"):
        KgCoOp(template="a photo").fit(labelled(NAMES), small())
