"""Which parameters decay, and the first step of the optimiser worked by hand."""

import torch
from torch import nn

from vlkit.config import OptimSettings
from vlkit.training.optim import decay_groups, make_optimizer


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
