"""A small CLIP with random weights that counts what goes through it.

Fixtures:
    small       its architecture, as `build_encoder` takes it.
    encoder     the model; `num_images` and `num_texts` count from the first test on.
    counted     the same, counting from 0.
"""

from typing import Any

import pytest
import torch

from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class Counting(OpenClipEncoder):
    num_images = 0
    num_texts = 0

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        self.num_images += len(images)
        return super().encode_image(images, normalize)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        self.num_texts += len(tokens)
        return super().encode_text(tokens, normalize)


@pytest.fixture
def small() -> dict[str, Any]:
    return SMALL


@pytest.fixture(scope="session")
def encoder() -> Counting:
    torch.manual_seed(0)
    built = build_encoder(SMALL).eval()
    return Counting(built.model, built.architecture)


@pytest.fixture
def counted(encoder: Counting) -> Counting:
    encoder.num_images = encoder.num_texts = 0
    return encoder
