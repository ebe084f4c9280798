from typing import Any

import torch

from vlkit.addons.towers.maple import Maple

SHORT = {"epochs": 6, "lr": 0.02, "batch_size": 6, "crop": 0.5}


def test_learns_and_leaves_the_model_as_it_was(learned_well: Any) -> None:
    fitted = learned_well(Maple(**SHORT))
    assert fitted.text.shape == (2, 2, 24) and fitted.maps.shape == (2, 32, 24) and fitted.offsets.shape == (2, 32)


def test_image_prompts_are_the_maps_of_text_prompts(tower_case: Any) -> None:
    random = torch.Generator().manual_seed(0)
    text, maps, offsets = (torch.randn(shape, generator=random) for shape in ((2, 2, 24), (2, 32, 24), (2, 32)))
    addon = Maple(text=text, maps=maps, offsets=offsets)
    encoder, images, tokens = tower_case.encoder, tower_case.images, tower_case.tokens
    with addon.edit(encoder), torch.no_grad():
        found = encoder.encode_image(images, normalize=False), encoder.encode_text(tokens, normalize=False)
    with torch.no_grad():
        tower = encoder.vision_tower
        x = tower.embed(images)
        for layer, block in enumerate(tower.blocks):
            prompts = torch.stack([maps[layer] @ vector + offsets[layer] for vector in text[layer]])
            x = block(torch.cat([x[:, :5], prompts.expand(3, -1, -1)], dim=1))
        torch.testing.assert_close(found[0], tower.finish(x))
        tower = encoder.text_tower
        x = tower.embed(tokens)
        for layer, block in enumerate(tower.blocks):
            x = block(torch.cat([x[:, :1], text[layer].expand(2, -1, -1), x[:, 3:]], dim=1))
        torch.testing.assert_close(found[1], tower.finish(x, tokens))


def test_the_image_moves_the_text(tower_case: Any, task_of: Any) -> None:
    addon = Maple(**SHORT)
    with addon.training(task_of(addon)) as found:
        (of_text,) = torch.autograd.grad(tower_case.encoder.encode_image(tower_case.images).sum(), found["text"])
    assert of_text.abs().amax((1, 2)).min() > 0, "gradients of the image reach the text's prompts, layer by layer"


def test_start(tower_case: Any, task_of: Any) -> None:
    addon = Maple(depth=9)
    start = addon.start(task_of(addon))
    words = tower_case.encoder.text_tower.embed(tower_case.tokens)[0, 1:3]
    assert torch.equal(start["text"][0], words), "a photo"
    assert start["text"][1].std() < 0.03 and start["text"].shape[0] == 2
    assert start["maps"].abs().max() <= 24**-0.5
    assert not torch.equal(start["maps"][0], start["maps"][1])
