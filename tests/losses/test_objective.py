"""The weighted sum, its parts, and the check of what a loss needs."""

import pytest
import torch
from torch import Tensor, nn

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import ConfigError
from vlkit.losses import Objective


class Sum(nn.Module):
    needs = frozenset({"image"})

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        return features.image.sum()


class Words(Sum):
    needs = frozenset({"words", "image"})


def inputs() -> tuple[Features, ImageTextBatch]:
    image = torch.ones(2, 3, requires_grad=True)
    return Features(image, image, torch.arange(2), torch.tensor(1.0)), ImageTextBatch(*[torch.empty(0)] * 6, {}, [])


def test_weights_are_numbers_or_functions_of_the_step() -> None:
    objective = Objective({"a": (0.5, Sum()), "b": (lambda step: step / 10, Sum())}, gives=frozenset({"image"}))
    features, batch = inputs()
    output = objective(features, batch, 20)
    assert output.total.item() == 0.5 * 6 + 2 * 6
    assert {name: part.item() for name, part in output.parts.items()} == {"a": 6, "b": 6}
    output.total.backward()
    assert torch.equal(features.image.grad, torch.full((2, 3), 2.5))
    assert not any(part.requires_grad for part in output.parts.values())


def test_a_loss_that_lacks_something_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="Loss flair needs words, which neither this model nor the data gives"):
        Objective({"flair": (1.0, Words())}, gives=frozenset({"image", "text"}))
    with pytest.raises(ConfigError, match="no term"):
        Objective({}, gives=frozenset({"image"}))


def test_state_of_terms_is_in_the_state_dict() -> None:
    term = Sum()
    term.register_buffer("seen", torch.zeros(2))
    assert list(Objective({"a": (1.0, term)}, gives=frozenset({"image"})).state_dict()) == ["terms.a.seen"]
