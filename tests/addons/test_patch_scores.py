from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.exchange import ClassWeights
from vlkit.addons.patch_scores import (
    Window,
    denoised,
    enlarged,
    patch_scores,
    segmented,
    window_of,
    window_scores,
)
from vlkit.errors import ConfigError

WEIGHTS = ClassWeights(F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.6, 0.8]]), dim=-1),
                       torch.tensor([0, 1, 1]))  # fmt: skip


def by_colour(squares: torch.Tensor) -> torch.Tensor:
    """Patches of 4 pixels, their feature the mean colour: a model that can be reckoned with."""
    return patch_scores(F.avg_pool2d(squares.float(), 4).flatten(2).transpose(1, 2), WEIGHTS)


def test_cosine_with_the_best_synonym() -> None:
    patches = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    found = patch_scores(patches, WEIGHTS)
    for b in range(2):
        for p in range(5):
            cosines = [F.cosine_similarity(patches[b, p], vector, dim=0) for vector in WEIGHTS.vectors]
            assert found[b, p].tolist() == pytest.approx([float(cosines[0]), float(max(cosines[1:]))], abs=1e-6)


def test_windows_against_a_slow_loop() -> None:
    pixels = torch.randint(0, 256, (3, 16, 21), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = window_scores(by_colour, pixels, Window(16, size=8, stride=5))
    total, count = torch.zeros(2, 16, 21), torch.zeros(16, 21)
    for top in (0, 5, 8):  # the last window ends at the edge
        for left in (0, 5, 10, 13):
            scores = by_colour(pixels[None, :, top : top + 8, left : left + 8])[0].T.reshape(1, 2, 2, 2)
            total[:, top : top + 8, left : left + 8] += F.interpolate(scores, (8, 8), mode="bilinear")[0]
            count[top : top + 8, left : left + 8] += 1
    assert (count > 0).all()
    torch.testing.assert_close(found, total / count)


def test_a_picture_of_any_size() -> None:
    pixels = torch.zeros(3, 40, 100, dtype=torch.uint8)
    pixels[0, :, :50], pixels[1, :, 50:] = 200, 200
    seen = set()

    def score(squares: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(squares.shape[1:]))
        return by_colour(squares)

    maps = window_scores(score, pixels, Window(20, size=16, stride=3))
    assert maps.shape == (2, 20, 50) and seen == {(3, 16, 16)}
    labels = segmented(enlarged(maps, 40, 100) * 40)
    assert labels.shape == (40, 100) and (labels[:, :45] == 0).all() and (labels[:, 55:] == 1).all()


def test_background_and_denoising() -> None:
    logits = torch.tensor([[[5.0, 0.0, 0.1]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.05]]])
    assert segmented(logits, threshold=0.5).tolist() == [[0, -1, -1]]
    assert (segmented(logits) >= 0).all()
    kept = denoised(logits, threshold=0.5)
    assert torch.equal(kept[0], logits[0]) and torch.isinf(kept[1:]).all()
    assert torch.equal(denoised(logits, threshold=0.0), logits)
    assert denoised(logits * 0, threshold=0.9).isfinite().all(), "the most probable class stays"


def test_under_a_tower_edit_at_a_finer_stride() -> None:
    from vlkit.addons.towers.naclip import NaClip
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.patch_stride import patch_stride

    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    encoder: Any = build_encoder({"embed_dim": 3, "vision_cfg": vision, "text_cfg": text}).eval()
    pixels = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)

    def score(squares: torch.Tensor) -> torch.Tensor:
        return patch_scores(encoder.encode_patches(squares), WEIGHTS)

    window = window_of(encoder, short_side=40)
    plain = window_scores(score, pixels, window)
    with NaClip().edit(encoder), patch_stride(encoder, 4):
        fine = window_scores(score, pixels, window)
    assert fine.shape == plain.shape == (2, 40, 50) and not torch.allclose(fine, plain, atol=1e-3)
    assert torch.equal(window_scores(score, pixels, window), plain)
    with pytest.raises(ConfigError, match="short side of at least 32"):
        window_of(encoder, short_side=20)
    with pytest.raises(ConfigError, match="moved by 40"):
        window_of(encoder, stride=40)
    with pytest.raises(ConfigError, match="too narrow"):
        window_scores(score, torch.zeros(3, 2, 40, dtype=torch.uint8), window)
