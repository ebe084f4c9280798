from typing import Any

import pytest
import torch

from vlkit.addons.labelled_pixels import LabelledPixels
from vlkit.addons.tower_prompts import first_words, image_prompts, layers, stock_image_features, text_prompts
from vlkit.errors import ConfigError


def lengths(blocks: Any) -> tuple[list[int], list[Any]]:
    """How many tokens enter each block, from now on."""
    seen: list[int] = []
    return seen, [b.module.register_forward_pre_hook(lambda m, x: seen.append(x[0].shape[1])) for b in blocks]


def test_image_prompts_stand_behind_the_patches_and_are_replaced(tower_case: Any) -> None:
    encoder, images = tower_case.encoder, tower_case.images
    tower, stock = encoder.vision_tower, encoder.encode_image(images)
    with image_prompts(encoder, torch.zeros(0, 3, 32)), image_prompts(encoder, torch.zeros(2, 0, 32)):
        assert torch.equal(encoder.encode_image(images), stock), "no prompts"
    prompts = torch.randn(2, 3, 32)
    with image_prompts(encoder, prompts), torch.no_grad():
        seen, handles = lengths(tower.blocks)
        found = encoder.encode_image(images, normalize=False)
        assert seen == [5 + 3, 5 + 3], "four patches, the class, three prompts: not one more after a replacement"
        assert tower.through_blocks(images).shape[1] == 5
        torch.testing.assert_close(stock_image_features(encoder, images), stock)
        for handle in handles:
            handle.remove()
    x = torch.cat([tower.embed(images), prompts[0].expand(3, -1, -1)], dim=1)
    x = tower.blocks[0](x)
    x[:, 5:] = prompts[1]
    torch.testing.assert_close(found, tower.finish(tower.blocks[1](x)[:, :5]))
    assert torch.equal(encoder.encode_image(images), stock)


def test_text_prompts_take_the_place_of_words(tower_case: Any) -> None:
    encoder, tokens = tower_case.encoder, tower_case.tokens
    tower, stock = encoder.text_tower, encoder.encode_text(tokens)
    words = first_words(encoder, "a photo of a", 2)
    with text_prompts(encoder, words[None], "a photo of a"):
        assert torch.equal(encoder.encode_text(tokens), stock), "the words in place of themselves"
    prompts = torch.randn(2, 2, 24)
    with text_prompts(encoder, prompts, "a photo of a"), torch.no_grad():
        seen, handles = lengths(tower.blocks)
        found = encoder.encode_text(tokens, normalize=False)
        assert seen == [tokens.shape[1]] * 2
        for handle in handles:
            handle.remove()
        with pytest.raises(ConfigError, match=r"begins otherwise. Use the template 'a photo of a \{\}.'"):
            encoder.encode_text(encoder.tokenize(["a photo of a dog", "this is a cat in the snow"]))
    x = tower.embed(tokens)
    x[:, 1:3] = prompts[0]
    x = tower.blocks[0](x)
    x[:, 1:3] = prompts[1]
    torch.testing.assert_close(found, tower.finish(tower.blocks[1](x), tokens))
    assert torch.equal(encoder.encode_text(tokens), stock)


def test_what_does_not_fit_the_tower_is_refused(tower_case: Any) -> None:
    encoder = tower_case.encoder
    wrong = pytest.raises(ConfigError, match="3 layers of width 32 do not fit this vision tower of 2")
    with wrong, image_prompts(encoder, torch.zeros(3, 1, 32)):
        pass
    wrong = pytest.raises(ConfigError, match="width 32 do not fit this text tower")
    with wrong, text_prompts(encoder, torch.zeros(1, 1, 32), "a"):
        pass
    with pytest.raises(ConfigError, match="'a photo' has 2 tokens"):
        first_words(encoder, "a photo", 3)
    with pytest.raises(ConfigError, match="depth is 0"):
        layers(0, encoder.vision_tower.blocks, "maple")
    assert layers(9, encoder.vision_tower.blocks, "maple") == 2


def test_pixels_change_from_time_to_time_and_not_from_run_to_run(tower_case: Any) -> None:
    records, preprocess = tower_case.reference.few_shot.records, tower_case.encoder.preprocess
    rows = torch.tensor([3, 0])
    one, other = (LabelledPixels(records, preprocess, 0.3, seed=0) for _ in range(2))
    first, second = one.batch(rows), one.batch(rows)
    assert first.shape == (2, 3, 32, 32) and not torch.equal(first, second)
    assert torch.equal(torch.cat([other.batch(rows[:1]), other.batch(rows[1:])]), first), "whatever the batches"
    assert not torch.equal(LabelledPixels(records, preprocess, 0.3, seed=1).batch(rows), first)
    whole = LabelledPixels(records, preprocess, 1.0, seed=0)
    plain = tower_case.source.embedder.iterate_pixels([records[3]])
    (chunk,) = plain
    mirrored = {torch.equal(whole.batch(torch.tensor([3]))[0], chunk.images[0].flip(2)) for _ in range(8)}
    assert mirrored == {True, False}, "no crop: the model's own preprocessing or its mirror image"
    with pytest.raises(ConfigError, match="crop is 0"):
        LabelledPixels(records, preprocess, 0.0, seed=0)
