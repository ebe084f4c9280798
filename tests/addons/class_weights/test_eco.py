"""ECO: the mean of several contexts, in a loop."""

from typing import Any

import pytest
import torch

from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.eco import Eco
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]


def test_at_step_0_words_give_the_hand_template(small: Any, labelled: Any) -> None:
    fitted = Eco(words="a photo of a", lr=0.0, epochs=1).fit(labelled(NAMES), small())
    hand = small().embed_texts([f"a photo of a {name}." for name in NAMES])
    assert torch.allclose(fitted.weights(labelled(NAMES).class_names, small()).vectors, hand, atol=1e-6)


def test_loss_of_the_mean_in_a_loop(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = Eco(lr=0.0, epochs=1).fit(given, source)
    task = fitted.task(given, source, fitted.examples(given))
    contexts = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(1))
    loss = fitted.objective(task, {"vectors": parameter(contexts)})(torch.arange(6)).item()
    total = torch.zeros(3, 32)
    for context in contexts:
        total += task.text.features(context)
    mean = torch.stack([row / row.norm() for row in total / 4])
    assert loss == pytest.approx(
        cross_entropy(source.logit_scale * task.images[:6] @ mean.T, task.labels[:6]), abs=1e-5
    )


def test_contexts_start_apart_and_are_all_trained(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, noise=0.3)
    still, moved = (Eco(lr=lr, epochs=2).fit(given, small()).vectors for lr in (0.0, 0.1))
    assert not torch.allclose(still[0], still[1], atol=1e-3)
    assert all(not torch.equal(one, other) for one, other in zip(still, moved, strict=True))


def test_one_context_is_coop(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, noise=0.3)
    one, coop = (
        addon.fit(given, small()) for addon in (Eco(contexts=1, lr=0.1, epochs=3), CoOp(context=4, lr=0.1, epochs=3))
    )
    assert torch.allclose(one.vectors[0], coop.vectors, atol=1e-6)
    with pytest.raises(ConfigError, match="at least one"):
        Eco(contexts=0).fit(given, small())
