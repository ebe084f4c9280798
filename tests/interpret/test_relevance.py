"""Relevance and LeGrad against the released loops, rewritten with torch's own attention and hooks on the maps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.errors import ConfigError
from vlkit.interpret.legrad import legrad
from vlkit.interpret.relevance import image_relevance, text_relevance
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder

SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module")
def encoder() -> OpenClipEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(SMALL).eval().double()
    for name, parameter in encoder.named_parameters():
        if name.endswith("in_proj_weight"):  # fresh attention is nearly uniform
            parameter.data *= 8
    return encoder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(2)).double(), dim=-1)


def slow_block(block: Any, x: torch.Tensor, mask: torch.Tensor | None, maps: list[torch.Tensor]) -> torch.Tensor:
    """One block head by head for one image (L,W)."""
    attention, normed = block.attn, block.ln_1(x)
    width, size = x.shape[1], x.shape[1] // block.attn.num_heads
    projected = normed @ attention.in_proj_weight.T + attention.in_proj_bias
    outs, probabilities = [], []
    for head in range(attention.num_heads):
        q, k, v = (projected[:, part * width + head * size :][:, :size] for part in range(3))
        logits = q @ k.T / size**0.5
        probabilities.append((logits if mask is None else logits + mask).softmax(dim=-1))
        outs.append((head, v))
    stacked = torch.stack(probabilities)
    maps.append(stacked)
    x = x + attention.out_proj(torch.cat([stacked[head] @ v for head, v in outs], dim=-1))
    return x + block.mlp(block.ln_2(x))


def slow_recursion(maps: list[torch.Tensor], similarity: torch.Tensor, start: int) -> torch.Tensor:
    length = maps[0].shape[-1]
    relevance = torch.eye(length, dtype=torch.float64)
    for number, one in enumerate(maps):
        if number >= start:
            (gradient,) = torch.autograd.grad(similarity, [one], retain_graph=True)
            relevance = relevance + torch.clamp(gradient * one, min=0).mean(dim=0).detach() @ relevance
    return relevance


@pytest.mark.parametrize("last_layers", [1, 2, 3])
def test_image_relevance(encoder: OpenClipEncoder, images: torch.Tensor, text: torch.Tensor, last_layers: int) -> None:
    visual, found = encoder.model.visual, image_relevance(encoder, images, text, last_layers)
    assert found.shape == (2, 4, 4)
    for row in range(2):
        maps: list[torch.Tensor] = []
        x = encoder.vision_tower.embed(images[row : row + 1])[0]
        for block in visual.transformer.resblocks:
            x = slow_block(block, x, None, maps)
        similarity = F.normalize(visual.ln_post(x[0]) @ visual.proj, dim=-1) @ text[row]
        expected = slow_recursion(maps, similarity, 3 - last_layers)[0, 1:].reshape(4, 4)
        torch.testing.assert_close(found[row], expected)


def test_text_relevance(encoder: OpenClipEncoder, text: torch.Tensor) -> None:
    tokens = encoder.tokenize(["a photo of a cat", "dog"])
    found, tower = text_relevance(encoder, tokens, text, last_layers=2), encoder.model.text
    for row, end in enumerate((6, 2)):
        maps: list[torch.Tensor] = []
        x = encoder.text_tower.embed(tokens[row : row + 1])[0]
        for block in tower.transformer.resblocks:
            x = slow_block(block, x, tower.attn_mask[: len(x), : len(x)], maps)
        similarity = F.normalize(tower.ln_final(x[end]) @ tower.text_projection, dim=-1) @ text[row]
        expected = slow_recursion(maps, similarity, 1)[end]
        torch.testing.assert_close(found[row, 1:end], expected[1:end])
        assert not found[row, end:].any() and found[row, 0] == 0, "start, end and padding are no words"


def test_legrad(encoder: OpenClipEncoder, images: torch.Tensor, text: torch.Tensor) -> None:
    visual, found = encoder.model.visual, legrad(encoder, images, text, last_layers=2)
    assert found.min() == 0 and found.max() == 1
    for row in range(2):
        total = torch.zeros(16, dtype=torch.float64)
        for layer in (1, 2):
            maps: list[torch.Tensor] = []
            x = encoder.vision_tower.embed(images[row : row + 1])[0]
            for block in visual.transformer.resblocks[: layer + 1]:
                x = slow_block(block, x, None, maps)
            similarity = F.normalize(visual.ln_post(x.mean(dim=0)) @ visual.proj, dim=-1) @ text[row]
            (gradient,) = torch.autograd.grad(similarity, [maps[layer]])
            total += gradient.clamp(min=0).mean(dim=0).mean(dim=0)[1:]
        expected = ((total - total.min()) / (total.max() - total.min())).reshape(4, 4)
        torch.testing.assert_close(found[row], expected)


def test_weights_keep_no_gradient(encoder: OpenClipEncoder, images: torch.Tensor, text: torch.Tensor) -> None:
    before = [parameter.requires_grad for parameter in encoder.parameters()]
    encoder.requires_grad_(False)
    legrad(encoder, images, text)
    image_relevance(encoder, images, text)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    for parameter, needed in zip(encoder.parameters(), before, strict=True):
        parameter.requires_grad_(needed)


def test_layers_that_are_not_there(encoder: OpenClipEncoder, images: torch.Tensor, text: torch.Tensor) -> None:
    for explain in (legrad, image_relevance):
        with pytest.raises(ConfigError, match="last_layers is 4"):
            explain(encoder, images, text, last_layers=4)
