"""Bayesian prompts: without variance they are CoOp, the divergence by hand, the loss in a loop."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vlkit.addons.class_weights.bayesian_prompt import BayesianPrompt, divergence
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat"]
SHORT = {"lr": 0.0, "epochs": 1, "draws": 3}


def chances(addon: Any, given: Any, source: Any) -> torch.Tensor:
    images = given.few_shot.vectors
    scores: torch.Tensor = addon.weights(given.class_names, source).scores(images)
    return (source.logit_scale * scores).softmax(-1)


def test_without_variance_it_is_coop(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = BayesianPrompt(**SHORT).fit(given, source)  # type: ignore[arg-type]
    sharp = replace(fitted, log_variance=torch.full_like(fitted.log_variance, -60.0))  # type: ignore[arg-type]
    coop = CoOp(words="a photo of a", lr=0.0, epochs=1).fit(given, source)
    plain = (
        source.logit_scale * coop.weights(given.class_names, source).scores(given.few_shot.vectors.pooled)
    ).softmax(-1)
    assert torch.allclose(chances(sharp, given, source), plain, atol=1e-5)
    assert not torch.allclose(chances(fitted, given, source), plain, atol=1e-2)


def test_divergence_equals_torchs_and_is_0_at_the_standard_normal() -> None:
    mean, log_variance = torch.randn(2, 4), torch.randn(2, 4)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(divergence(mean, log_variance), expected, atol=1e-5)
    assert divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


@pytest.mark.parametrize("conditional", [False, True])
def test_loss_in_a_loop(small: Any, labelled: Any, conditional: bool) -> None:
    given, source = labelled(NAMES), small()
    fitted = BayesianPrompt(**SHORT, conditional=conditional, beta=0.01).fit(given, source)  # type: ignore[arg-type]
    task = fitted.task(given, source, fitted.examples(given))
    found = {name: parameter(start) for name, start in fitted.start(task).items()}
    rows = torch.tensor([0, 6])
    loss = fitted.objective(task, found)(rows).item()
    noise = torch.randn(3, 32, generator=torch.Generator().manual_seed(task.seed + 3))
    total = 0.0
    for row in rows.tolist():
        if conditional:
            inner = task.images[row]
            for name in ("first", "second"):
                inner = torch.nn.functional.elu(found[name][:, :-1] @ inner + found[name][:, -1])
            mean, log_variance = (found["third"][:, :-1] @ inner + found["third"][:, -1]).split(32)
        else:
            mean, log_variance = found["mean"], found["log_variance"]
        likely = 0.0
        for draw in noise:
            context = found["vectors"] + mean + (log_variance / 2).exp() * draw
            logits = source.logit_scale * task.text.features(context) @ task.images[row]
            likely += logits.softmax(-1)[task.labels[row]].item() / 3
        apart = divergence(mean[None], log_variance[None]).item()
        total += -math.log(likely) + 0.01 * source.logit_scale / 100 * apart
    assert loss == pytest.approx(total / 2, abs=1e-4)


@pytest.mark.parametrize("conditional", [False, True])
def test_all_parts_learn_and_predictions_repeat(small: Any, labelled: Any, conditional: bool) -> None:
    given = labelled(NAMES, noise=0.3)
    still, moved = (
        BayesianPrompt(lr=lr, epochs=2, draws=3, conditional=conditional).fit(given, small()) for lr in (0.0, 0.05)
    )
    for name in ("vectors", *(("first", "second", "third") if conditional else ("mean", "log_variance"))):
        assert not torch.equal(getattr(still, name), getattr(moved, name)), name
    assert torch.equal(chances(moved, given, small()), chances(moved, given, small()))


def test_bad_settings(small: Any, labelled: Any) -> None:
    with pytest.raises(ConfigError, match="draws"):
        BayesianPrompt(draws=0).fit(labelled(NAMES), small())
