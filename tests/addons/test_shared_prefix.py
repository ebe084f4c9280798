"""What all prompts begin with runs once: values and gradients of the whole texts, and where it is not exact."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.prompted_text import PromptedText, prompt_tokens
from vlkit.addons.shared_prefix import SharedPrefix

NAMES = ("dog", "black cat", "a b c d", "sailing boat", "st.") + tuple(f"{one} dog" for one in "abcdefgh") * 8
WORDS = [343, 343, 343]


@pytest.fixture(scope="module")
def encoder() -> Any:
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    text = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3, "ls_init_value": 0.3}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    made: Any = build_encoder({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}).eval().requires_grad_(False)
    made.model.text.token_embedding.weight.mul_(20)
    return made


def prompted(encoder: Any, names: tuple[str, ...] = NAMES, position: Any = "end", **settings: Any) -> PromptedText:
    classes = [parse_class(name) for name in names]
    return PromptedText(encoder, prompt_tokens(encoder, classes, WORDS, position), **settings)


def whole(text: PromptedText, context: torch.Tensor) -> torch.Tensor:
    """(R,D): each prompt alone through the whole tower."""
    tower, made = text.encoder.text_tower, []
    for row in range(len(text.embedded)):
        x = text.embedded[row : row + 1].clone()
        x[:, 1:4] = x[:, 1:4] - text.words[row] + context
        for block in tower.blocks:
            x = block(x)
        made.append(tower.finish(x, text.prompts.tokens[row : row + 1]))
    return F.normalize(torch.cat(made), dim=-1)


@pytest.mark.parametrize("names", [NAMES, NAMES[:5]], ids=["in groups", "in one"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_whole_texts(encoder: Any, names: Any, checkpointing: bool) -> None:
    text = prompted(encoder, names, checkpointing=checkpointing)
    random = torch.Generator().manual_seed(1)
    context = torch.randn(3, 32, generator=random, requires_grad=True)
    weights = torch.randn(len(names), 32, generator=random)
    assert text.shared is not None and text.shared.length == 4
    slow, fast = whole(text, context), text.features(context)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=0)
    expected, found = (torch.autograd.grad((one * weights).sum(), context)[0] for one in (slow, fast))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(text.features(context), slow, atol=2e-6, rtol=0)


def test_several_contexts_at_once(encoder: Any) -> None:
    text = prompted(encoder)
    contexts = torch.randn(2, 3, 1, 3, 32, generator=torch.Generator().manual_seed(2))
    found = text.features(contexts)
    assert found.shape == (2, 3, len(NAMES), 32)
    torch.testing.assert_close(found[1, 2], whole(text, contexts[1, 2, 0]), atol=2e-6, rtol=0)


def test_the_prefix_runs_once_and_names_alone_go_on(encoder: Any) -> None:
    text, rows = prompted(encoder), []
    layers = [block.module.mlp for block in encoder.text_tower.blocks]
    handles = [one.register_forward_pre_hook(lambda m, x: rows.append(x[0].shape[0] * x[0].shape[1])) for one in layers]
    text.features(torch.zeros(3, 32))
    for handle in handles:
        handle.remove()
    ends = text.prompts.tokens.argmax(1) - 4
    groups = [int(part.max() + 1) * len(part) for part in ends.sort().values.chunk(4)]
    assert sum(rows) == 2 * 4 + 2 * sum(groups) + len(NAMES), "prefix twice, names twice, ends once"
    assert sum(rows) < 0.5 * 3 * text.embedded.shape[0] * text.embedded.shape[1]


def test_words_in_place_of_themselves_change_no_bit(encoder: Any) -> None:
    text = prompted(encoder)
    with torch.no_grad():
        x = text.encoder.text_tower.run(text.prompts.tokens)
        assert torch.equal(text.features(text.words), F.normalize(x, dim=-1))


def test_where_it_is_not_exact_texts_go_through_whole(encoder: Any) -> None:
    assert prompted(encoder, position="front").shared is None, "names come first"
    middle = prompted(encoder, position="middle")
    assert middle.shared is None or middle.shared.length > int(middle.prompts.places.max())
    assert prompted(encoder, ("dog",)).shared is None, "one text shares nothing"
    tower, tokens = encoder.text_tower, prompted(encoder).prompts.tokens
    assert SharedPrefix.of(tower, tokens) is not None
    seeing = tuple(replace(block, mask=lambda x: None) for block in tower.blocks)
    assert SharedPrefix.of(replace(tower, blocks=seeing), tokens) is None, "names would change the words before"
    other = tuple(replace(block, module=torch.nn.Identity()) for block in tower.blocks)
    assert SharedPrefix.of(replace(tower, blocks=other), tokens) is None
    for place in (0, -1):
        pooled = replace(tower, finish=lambda x, tokens, place=place: x[:, place])
        assert SharedPrefix.of(pooled, tokens) is None, "pooling does not follow the end token"
