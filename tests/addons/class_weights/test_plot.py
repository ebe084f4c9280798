"""PLOT: transport plans, their identities, the loss, and what fails without patches."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vlkit.addons.class_weights.plot import Plot, transport
from vlkit.addons.exchange import Vectors
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]


def slow_plan(cost: list[list[float]], eps: float, rounds: int) -> list[list[float]]:
    import math

    kernel = [[math.exp(-one / eps) for one in row] for row in cost]
    num_rows, num_columns = len(cost), len(cost[0])
    left, right = [1.0] * num_rows, [1.0 / num_columns] * num_columns
    for _ in range(rounds):
        left = [1 / num_rows / sum(kernel[m][n] * right[n] for n in range(num_columns)) for m in range(num_rows)]
        right = [1 / num_columns / sum(kernel[m][n] * left[m] for m in range(num_rows)) for n in range(num_columns)]
    return [[left[m] * kernel[m][n] * right[n] for n in range(num_columns)] for m in range(num_rows)]


def test_plans_equal_a_slow_sinkhorn_and_have_uniform_marginals() -> None:
    cost = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    plan = transport(cost, 0.1, 400, 0.0)
    for one, found in zip(cost, plan, strict=True):
        assert torch.allclose(found, torch.tensor(slow_plan(one.tolist(), 0.1, 400)).double(), atol=1e-9)
    assert torch.allclose(plan.sum(-1), torch.full((2, 5), 0.2).double())
    assert torch.allclose(plan.sum(-2), torch.full((2, 3), 1 / 3).double())
    assert (plan * cost).sum((-2, -1)).lt(cost.mean((-2, -1))).all()  # cheaper than without a choice


def test_one_prompt_and_one_patch_are_the_cosine(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, patches=1)
    fitted = Plot(prompts=1, words="a photo of a", lr=0.0, epochs=1).fit(given, small())
    images = given.few_shot.vectors
    hand = small().embed_texts([f"a photo of a {name}." for name in NAMES])
    assert images.patches is not None
    scores = fitted.weights(given.class_names, small()).scores(images)  # type: ignore[arg-type]
    assert torch.allclose(scores, images.patches[:, 0] @ hand.T, atol=1e-6)


def test_loss_in_a_loop_with_and_without_the_whole_image(small: Any, labelled: Any, cross_entropy: Any) -> None:
    given, source = labelled(NAMES, patches=4), small()
    vectors = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    for whole in (False, True):
        fitted = Plot(prompts=2, context=3, lr=0.0, epochs=1, tolerance=0.0, whole=whole).fit(given, source)
        task = fitted.task(given, source, fitted.examples(given))
        loss = fitted.objective(task, {"vectors": parameter(vectors)})(torch.arange(4)).item()
        features = torch.stack([task.text.features(one) for one in vectors])  # (2,3,D)
        rows = []
        for image in range(4):
            patches = given.few_shot.vectors.patches[image]
            row = []
            for c in range(3):
                similarity = patches @ features[:, c].T
                plan = torch.tensor(slow_plan((1 - similarity).tolist(), 0.1, 100))
                extra = task.images[image] @ features[:, c].mean(0) if whole else 0
                row.append((plan * similarity).sum() + extra)
            rows.append(torch.stack(row))
        expected = cross_entropy(source.logit_scale * torch.stack(rows), task.labels[:4])
        assert loss == pytest.approx(expected, abs=1e-4)


def test_prompts_learn_and_patches_must_be_there(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, patches=3, noise=0.2)
    still, moved = (Plot(context=2, lr=lr, epochs=2).fit(given, small()).vectors for lr in (0.0, 0.1))
    assert not torch.equal(still, moved)  # type: ignore[arg-type]
    fitted = Plot(context=2, epochs=1).fit(given, small())
    with pytest.raises(ConfigError, match="patches"):
        fitted.weights(given.class_names, small()).scores(replace(given.few_shot.vectors, patches=None))
    with pytest.raises(ConfigError, match="positive"):
        Plot(eps=0.0).fit(given, small())
    assert isinstance(given.few_shot.vectors, Vectors)
