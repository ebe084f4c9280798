from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.pipeline import Pipeline
from vlkit.addons.towers.visual_prompt import VisualPrompt


@pytest.mark.parametrize("depth", [1, 2])
def test_learns_and_leaves_the_model_as_it_was(learned_well: Any, depth: int) -> None:
    fitted = learned_well(VisualPrompt(epochs=20, lr=0.01, batch_size=6, crop=1.0, tokens=2, depth=depth))
    assert fitted.prompts.shape == (depth, 2, 32) and fitted.steps == 40


def test_the_start_is_within_the_authors_bound(task_of: Any) -> None:
    addon = VisualPrompt(depth=9)
    prompts = addon.start(task_of(addon))["prompts"]
    bound = (6 / (3 * 16**2 + 32)) ** 0.5
    assert prompts.shape == (2, 5, 32), "as deep as the tower"
    assert 0.9 * bound < prompts.abs().max() <= bound


def test_deep_prompts_replace_what_the_layer_before_made_of_them(tower_case: Any) -> None:
    prompts = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    encoder, images = tower_case.encoder, tower_case.images
    with torch.no_grad():
        with VisualPrompt(prompts=prompts).edit(encoder):
            deep = encoder.encode_image(images)
        with VisualPrompt(prompts=prompts[:1]).edit(encoder):
            shallow = encoder.encode_image(images)
        tower = encoder.vision_tower
        x = tower.blocks[0](torch.cat([tower.embed(images), prompts[0].expand(3, -1, -1)], 1))
        on = F.normalize(tower.finish(tower.blocks[1](x)), dim=-1)
        again = torch.cat([x[:, :5], prompts[1].expand(3, -1, -1)], 1)
        replaced = F.normalize(tower.finish(tower.blocks[1](again)), dim=-1)
    torch.testing.assert_close(shallow, on)
    torch.testing.assert_close(deep, replaced)
    assert not torch.allclose(deep, shallow, atol=1e-3)


def test_the_loss_is_cross_entropy_over_the_zero_shot_weights(tower_case: Any, task_of: Any) -> None:
    addon = VisualPrompt(crop=1.0, tokens=2)
    task = task_of(addon)
    rows = torch.tensor([0, 5, 11])
    with addon.training(task) as found:
        loss = addon.objective(task, found)(rows)
        images = task_of(addon).pixels.batch(rows)
        features = tower_case.encoder.encode_image(images).detach()
    weights, scale = task.reference.weights.vectors, tower_case.source.logit_scale
    total = 0.0
    for feature, row in zip(features, rows.tolist(), strict=True):
        # "green" has a second name: the better of the two counts.
        cosines = [float(feature @ vector) for vector in weights]
        logits = scale * torch.tensor([cosines[0], max(cosines[1:3]), cosines[3]])
        total -= logits.log_softmax(0)[row // 4].item()
    assert loss.item() == pytest.approx(total / 3, abs=1e-4)


def test_options_change_how_it_is_computed_only(tower_case: Any) -> None:
    def learned(**settings: Any) -> torch.Tensor:
        addon = VisualPrompt(epochs=1, lr=0.005, batch_size=6, **settings)
        fitted: Any = Pipeline([addon]).fit(tower_case.reference, tower_case.source).addons[0]
        return fitted.prompts

    plain = learned()
    torch.testing.assert_close(learned(checkpointing=True), plain)
    half = learned(precision="bf16")
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, atol=0.02, rtol=0)
