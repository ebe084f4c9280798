from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.towers.clip_surgery import ClipSurgery, surgery_scores
from vlkit.errors import ConfigError


@pytest.mark.parametrize("last_layers", [1, 2, 3])
def test_the_second_path(slow: Any, unchanged: Any, last_layers: int) -> None:
    with ClipSurgery(last_layers=last_layers).edit(slow.encoder):
        found = slow.encoder.encode_patches(slow.images)

    def weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raw = torch.stack([torch.stack([a @ b / 4 for b in v]) for a in v]).exp()
        return raw / raw.sum(1, keepdim=True)

    first = 3 - last_layers
    for row in range(2):
        path = slow.stream(row, first)
        for depth in range(first, 3):  # values come from the stock stream, and no MLP runs in the path
            path = path + slow.mixed(slow.blocks[depth], slow.stream(row, depth), weights)
        torch.testing.assert_close(found[row], slow.patches(path))
    unchanged(ClipSurgery(last_layers=last_layers))


def test_more_layers_than_there_are(slow: Any) -> None:
    with pytest.raises(ConfigError, match="last_layers is 4"), ClipSurgery(last_layers=4).edit(slow.encoder):
        pass


def test_feature_surgery_in_slow_loops() -> None:
    made = torch.Generator().manual_seed(0)
    patches, texts, pooled = (
        F.normalize(torch.randn(*shape, 6, generator=made).double(), dim=-1) for shape in ((2, 5), (3,), (2,))
    )
    found = surgery_scores(patches, texts, pooled)
    for b in range(2):
        raw = torch.stack([2 * pooled[b] @ text for text in texts]).exp()
        weights = raw / raw.sum() * 3  # divided by their mean, 1/3
        for p in range(5):
            products = torch.stack([weights[c] * patches[b, p] * texts[c] for c in range(3)])  # (C,D)
            expected = (products - products.mean(0)).sum(-1)
            torch.testing.assert_close(found[b, p], expected)


def test_what_all_classes_share_is_taken_out() -> None:
    """A patch that looks like the common part of all texts is said to be of no class, for certain."""
    common, own = torch.eye(6)[:1], torch.eye(6)[1:4]
    texts = F.normalize(common + 0.1 * own, dim=-1)
    pooled = F.normalize(torch.ones(1, 6), dim=-1)
    found = surgery_scores(common[None], texts, pooled)
    assert found.abs().max() < 1e-6 and (common @ texts.T).min() > 0.9
