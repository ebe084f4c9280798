"""Which parameters decay, and the learning rate worked by hand."""

import math

import pytest
import torch
from torch import nn

from vlkit.config import OptimSettings
from vlkit.settings import Duration
from vlkit.training.optim import decay_groups, learning_rate, make_optimizer, make_schedule


class Towers(nn.Module):
    """Every kind of parameter that an image-text model has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.token_embedding = nn.Embedding(10, 4)
        self.positional_embedding = nn.Parameter(torch.zeros(5, 4))
        self.class_embedding = nn.Parameter(torch.zeros(4))
        self.proj = nn.Parameter(torch.zeros(4, 3))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_matrices_decay_and_nothing_else() -> None:
    decayed, plain = decay_groups(Towers(), 0.2)
    assert decayed["weight_decay"] == 0.2 and plain["weight_decay"] == 0
    assert sorted(decayed["names"]) == ["attention.in_proj_weight", "attention.out_proj.weight", "conv.weight", "proj"]
    assert sorted(plain["names"]) == [
        "attention.in_proj_bias", "attention.out_proj.bias", "batch_norm.bias", "batch_norm.weight",
        "class_embedding", "conv.bias", "logit_bias", "logit_scale", "norm.bias", "norm.weight",
        "positional_embedding", "token_embedding.weight",
    ]  # fmt: skip
    for group in (decayed, plain):
        assert len(group["names"]) == len(group["params"])


def test_groups_hold_the_parameters_they_name() -> None:
    module = Towers()
    named = dict(module.named_parameters())
    for group in decay_groups(module, 0.1):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert named[name] is parameter


def test_without_anything_to_decay_there_is_one_group() -> None:
    assert len(decay_groups(nn.LayerNorm(3), 0.1)) == 1


def test_the_optimizer_follows_adamw_of_the_paper() -> None:
    # Loshchilov and Hutter 2019, algorithm 2, in the first step: m / sqrt(v) is the sign of the gradient.
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2.0]]))
        linear.bias.fill_(3.0)
    optimizer = make_optimizer(linear, OptimSettings(lr=0.1, weight_decay=0.5, eps=1e-12))
    (linear(torch.tensor([[4.0, -5.0]]))).sum().backward()
    optimizer.step()
    # weight - lr * decay * weight - lr * sign(gradient); the bias does not decay.
    torch.testing.assert_close(linear.weight, torch.tensor([[1 - 0.05 - 0.1, -2 + 0.1 + 0.1]]))
    torch.testing.assert_close(linear.bias, torch.tensor([3 - 0.1]))


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(step, steps=8, warmup=4, peak=1.0, end=0.2) for step in range(8)]
    # Four steps up; then 0.2 + 0.4 (1 + cos(pi t)) for t = 0, 1/4, 1/2, 3/4.
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half])
    assert learning_rate(8, steps=8, warmup=4, peak=1.0, end=0.2) == pytest.approx(0.2)


def test_learning_rate_at_the_edges() -> None:
    assert learning_rate(0, steps=1, warmup=0, peak=2.0) == 2.0
    assert learning_rate(5, steps=5, warmup=5, peak=2.0) == 2.0  # a run that is all warmup
    assert [learning_rate(step, steps=4, warmup=2, peak=3.0, kind="constant") for step in range(4)] == [1.5, 3, 3, 3]
    assert learning_rate(100, steps=10, warmup=0, peak=1.0, end=0.1) == pytest.approx(0.1)  # never rises again


@pytest.mark.parametrize("warmup", [Duration(10, "steps"), Duration(0.1, "fraction"), Duration(0.5, "epochs")])
def test_warmup_in_every_unit(warmup: Duration) -> None:
    schedule = make_schedule(OptimSettings(lr=1.0, warmup=warmup), steps=100, steps_per_epoch=20, batch_size=8)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(9) == 1.0
    assert schedule(99) < 0.01
