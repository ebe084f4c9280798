"""A small CLIP with random weights, and images that lie near the texts of their classes.

Fixtures:
    small        `small()`: a source of features with a real text tower, made once.
    labelled     `labelled(names, shots=4)`: a reference whose images are the texts' features and noise.
    cross_entropy  `cross_entropy(logits, labels)`: in a slow loop, with plain floats.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.reference import Part, Reference
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@cache
def _source() -> CachedEmbedder:
    from vlkit.models.embedder import Embedder
    from vlkit.models.open_clip_encoder import build_encoder

    torch.manual_seed(0)
    encoder = build_encoder(ARCHITECTURE).eval()
    embedder = Embedder(encoder, "small")
    with torch.no_grad():  # features of fresh towers are nearly alike
        encoder.model.text.token_embedding.weight.mul_(20)
    return CachedEmbedder(lambda: embedder, None, card_of(embedder))


@pytest.fixture
def small() -> Callable[[], CachedEmbedder]:
    return _source


@pytest.fixture
def labelled() -> Callable[..., Reference]:
    def make(
        names: Sequence[str], shots: int = 4, noise: float = 0.08, seed: int = 0, patches: int = 0, val: int = 0
    ) -> Reference:
        source, random = _source(), torch.Generator().manual_seed(seed)
        texts = source.embed_texts([f"a photo of a {name.split(' | ')[0]}." for name in names])

        def part(split: str, count: int) -> Part:
            labels = torch.arange(len(names)).repeat_interleave(count)

            def near(centre: torch.Tensor) -> torch.Tensor:
                return F.normalize(centre + noise * torch.randn(centre.shape, generator=random), dim=-1)

            pooled = near(texts[labels])
            local = near(pooled[:, None].expand(-1, patches, -1)) if patches else None
            return Part(split, Vectors("image", pooled, patches=local), labels)

        weights = ClassWeights(texts, torch.arange(len(names)))
        shown = part("train", shots)
        return Reference(
            class_names=tuple(parse_class(name) for name in names),
            few_shot=shown,
            images=Part("train", shown.vectors),
            val=part("val", val) if val else None,
            weights=weights,
            logits=lambda images: source.logit_scale * weights.scores(images.pooled),
        )

    return make


@pytest.fixture
def cross_entropy() -> Callable[..., float]:
    def slow(logits: torch.Tensor, labels: torch.Tensor) -> float:
        total = 0.0
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            top = max(row)
            total += top + math.log(sum(math.exp(one - top) for one in row)) - row[label]
        return total / len(labels)

    return slow
