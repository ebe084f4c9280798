"""Averaged weights: the recursion by hand, lending and giving back, the state dict."""

import pytest
import torch
from torch import nn

from vlkit.training.ema import Ema


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_the_recursion_by_hand() -> None:
    net = Net()
    start = net.linear.weight.detach().clone()
    ema = Ema(net, decay=0.25)
    net.linear.weight.data.add_(1.0)
    net.norm.running_mean.fill_(5.0)
    ema.update(net)  # decay min(0.25, 2 / 11): the early average forgets quickly
    expected = start + (1 - 2 / 11)
    with ema.in_place_of(net):
        torch.testing.assert_close(net.linear.weight, expected)
        assert torch.equal(net.norm.running_mean, torch.full((2,), 5.0))  # statistics are those of now
    ema.update(net)  # min(0.25, 3 / 12)
    with ema.in_place_of(net):
        torch.testing.assert_close(net.linear.weight, expected * 0.25 + (start + 1) * 0.75)


def test_the_weights_come_back_bit_for_bit_also_after_an_error() -> None:
    net, ema = Net(), Ema(Net(), decay=0.9)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    averaged = {name: value.clone() for name, value in ema.state_dict().items()}
    with pytest.raises(RuntimeError), ema.in_place_of(net):
        assert not torch.equal(net.linear.weight, before["linear.weight"])
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in ema.state_dict().items())


def test_state_round_trips_and_names_what_is_missing() -> None:
    net = Net()
    ema, other = Ema(net, decay=0.9), Ema(Net(), decay=0.9)
    ema.update(net)
    state = ema.state_dict()
    assert not any("frozen" in name for name in state)
    whole = nn.ModuleDict({"ema": other})
    whole.load_state_dict({f"ema.{name}": value for name, value in state.items()})
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*num_updates"):
        other.load_state_dict({name: value for name, value in state.items() if name != "num_updates"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*elsewhere"):
        other.load_state_dict({**state, "elsewhere": torch.zeros(1)})
