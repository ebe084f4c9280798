import math
from typing import Any

import pytest
import torch

from vlkit.addons.towers.dpl import Dpl, scaled, separate
from vlkit.addons.towers.ivlp import Ivlp
from vlkit.errors import ConfigError

SHORT = {"epochs": 6, "lr": 0.05, "batch_size": 6, "crop": 0.5}


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "text": torch.randn(2, 2, 24, generator=random),
        "image": torch.randn(2, 2, 32, generator=random),
    }


@pytest.mark.parametrize("mode", ["separate", "scaled"])
def test_learns_and_leaves_the_model_as_it_was(learned_well: Any, mode: Any) -> None:
    fitted = learned_well(Dpl(**SHORT, mode=mode))
    assert (fitted.text_gates is None) == (mode == "scaled")
    if mode == "separate":
        assert fitted.text_gates.abs().min() > 0 and fitted.image_gates.abs().min() > 0, "every gate opens"


def test_factors_of_1_are_ordinary_attention(tower_case: Any, prompts: Any) -> None:
    encoder = tower_case.encoder
    with torch.no_grad():
        with Ivlp(**prompts).edit(encoder):
            ordinary = encoder.encode_image(tower_case.images), encoder.encode_text(tower_case.tokens)
        with Dpl(**prompts, mode="scaled").edit(encoder):
            found = encoder.encode_image(tower_case.images), encoder.encode_text(tower_case.tokens)
        with Dpl(**prompts, mode="scaled", to_prompt=1e-9).edit(encoder):
            weak = encoder.encode_image(tower_case.images)
    torch.testing.assert_close(found[0], ordinary[0])
    torch.testing.assert_close(found[1], ordinary[1])
    torch.testing.assert_close(weak, encoder.encode_image(tower_case.images).detach()), "nothing attends to prompts"
    assert not torch.allclose(found[0], weak, atol=1e-3)


def test_closed_gates_leave_the_instance_tokens_alone(tower_case: Any, prompts: Any) -> None:
    encoder, images = tower_case.encoder, tower_case.images
    with torch.no_grad():
        tower = encoder.vision_tower
        stock = tower.through_blocks(images)
        closed = Dpl(**prompts, text_gates=torch.zeros(2), image_gates=torch.zeros(2))
        with closed.edit(encoder):
            torch.testing.assert_close(tower.through_blocks(images), stock)  # the class and every patch
        ajar = Dpl(**prompts, text_gates=torch.zeros(2), image_gates=torch.tensor([0.0, 0.3]))
        with ajar.edit(encoder):
            assert not torch.allclose(tower.through_blocks(images), stock, atol=1e-3)


def test_maps_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 4, 4, generator=random)
    mask = torch.full((4, 4), -math.inf).triu(1)
    prompts = torch.tensor([False, True, True, False])  # as in a text: behind the start token
    rows = (logits + mask)[0, 0]
    found = separate(logits + mask, prompts, torch.tensor(0.25))[0, 0]
    assert torch.equal(found[0], torch.tensor([1.0, 0, 0, 0])), "the start token sees no prompt and loses nothing"
    assert torch.allclose(found[1], rows[1].softmax(0)) and torch.allclose(found[2], rows[2].softmax(0))
    own, other = rows[3][[0, 3]].softmax(0), rows[3][[1, 2]].softmax(0)
    assert found[3].tolist() == pytest.approx(
        [0.75 * own[0].item(), 0.25 * other[0].item(), 0.25 * other[1].item(), 0.75 * own[1].item()]
    )
    factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = scaled(logits + mask, prompts, factors)[0, 0]
    for row in range(4):
        weights = [
            factors[int(prompts[row]), int(prompts[column])].item() * rows[row, column].exp().item()
            for column in range(4)
        ]
        assert found[row].tolist() == pytest.approx([one / sum(weights) for one in weights])


def test_gradients_are_finite_where_nothing_is_seen() -> None:
    logits = torch.zeros(1, 1, 3, 3, requires_grad=True)
    masked = logits + torch.full((3, 3), -math.inf).triu(1)
    separate(masked, torch.tensor([False, True, False]), torch.tensor(0.5)).square().sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="mode=separate has a learned gate and no factors"):
        Dpl(to_prompt=0.5)
    with pytest.raises(ConfigError, match="each must be above 0"):
        Dpl(mode="scaled", to_self=0.0)
