from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from vlkit.addons.prompt_fit import frozen
from vlkit.addons.towers.clip_lora import ClipLora, merged_encoder
from vlkit.errors import ConfigError

SHORT = {"epochs": 6, "lr": 0.005, "batch_size": 6, "crop": 0.5}


def test_learns_and_leaves_the_model_as_it_was(learned_well: Any, tower_case: Any) -> None:
    fitted = learned_well(ClipLora(**SHORT))
    per_layer = 3 * 2 * 2  # q, k, v; A and B; rank
    assert fitted.update.shape == (2 * per_layer * 32 + 2 * per_layer * 24,)
    # Merged it is a plain model that gives the same.
    merged = merged_encoder(fitted, tower_case.encoder)
    assert merged.weights().keys() == tower_case.encoder.weights().keys()
    with fitted.edit(tower_case.encoder):
        inside = tower_case.encoder.encode_image(tower_case.images), tower_case.encoder.encode_text(tower_case.tokens)
    torch.testing.assert_close(merged.encode_image(tower_case.images), inside[0])
    torch.testing.assert_close(merged.encode_text(tower_case.tokens), inside[1])
    changed = [
        name for name, value in merged.weights().items() if not torch.equal(value, tower_case.encoder.weights()[name])
    ]
    assert len(changed) == 4 and all(name.endswith("attn.in_proj_weight") for name in changed), changed


def test_the_update_by_hand(tower_case: Any, task_of: Any) -> None:
    addon = ClipLora(rank=3, strength=2.0, targets="q+v")
    start = addon.start(task_of(addon))["update"]
    assert (start == 0).sum() == 4 * 3 * (32 + 24), "all B are 0, so nothing changes at first"
    merged = merged_encoder(ClipLora(rank=3, strength=2.0, targets="q+v", update=start), tower_case.encoder)
    with addon.acting(tower_case.encoder, {"update": start}):
        inside = tower_case.encoder.encode_image(tower_case.images)
    torch.testing.assert_close(inside, merged.encode_image(tower_case.images))
    torch.testing.assert_close(inside, tower_case.encoder.encode_image(tower_case.images))
    values = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    merged = merged_encoder(ClipLora(rank=3, strength=2.0, targets="q+v", update=values), tower_case.encoder)
    # The first numbers: A of q and of v of the vision tower's first layer, then their B.
    a_q, a_v = values[:96].view(3, 32), values[96:192].view(3, 32)
    b_q, b_v = values[192:288].view(32, 3), values[288:384].view(32, 3)
    old = tower_case.encoder.model.visual.transformer.resblocks[0].attn.in_proj_weight
    new = merged.model.visual.transformer.resblocks[0].attn.in_proj_weight
    scale = 2.0 / 3**0.5
    torch.testing.assert_close(new[:32], old[:32] + scale * b_q @ a_q)
    assert torch.equal(new[32:64], old[32:64]), "k has none"
    torch.testing.assert_close(new[64:], old[64:] + scale * b_v @ a_v)


def test_only_updates_are_trained(tower_case: Any, task_of: Any) -> None:
    addon = ClipLora(**SHORT)
    for one in tower_case.encoder.parameters():
        one.grad = None
    with addon.training(task := task_of(addon)) as found:
        updates = list(found.values())
        with frozen(tower_case.encoder, but=updates):
            addon.objective(task, found)(torch.arange(6)).backward()
        gradients = parameters_to_vector([one.grad for one in updates])
        assert all(one.grad is None or any(one is mine for mine in updates) for one in tower_case.encoder.parameters())
    assert (gradients != 0).float().mean() > 0.4, "every B; no A while B is 0"


def test_steps_follow_the_shots(task_of: Any) -> None:
    addon = ClipLora()
    plan = addon.plan(task_of(addon))
    # 4 shots: 2000 steps of 32 of the 12 images; the last batch of an epoch counts as a step.
    assert plan.epochs * 12 == pytest.approx(2000 * 32, rel=1e-3)
    assert plan.optimizer == "adamw" and plan.weight_decay == 0.01


@pytest.mark.parametrize("settings", [{"targets": "q+w"}, {"rank": 0}, {"strength": 0.0}])
def test_bad_settings(settings: Any) -> None:
    with pytest.raises(ConfigError, match="expected a rank of at least 1, a strength above 0 and some of q, k, v"):
        ClipLora(**settings)


def test_updates_of_another_size(tower_case: Any) -> None:
    with (
        pytest.raises(ConfigError, match="Updates of 7 numbers do not fit"),
        ClipLora(update=torch.zeros(7)).edit(tower_case.encoder),
    ):
        pass
    assert not any("parametrizations" in name for name in tower_case.encoder.state_dict())
