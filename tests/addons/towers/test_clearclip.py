from typing import Any

import torch

from vlkit.addons.towers.clearclip import ClearClip


def test_queries_attend_to_queries_without_a_residual_path(slow: Any, unchanged: Any) -> None:
    with ClearClip().edit(slow.encoder):
        found = slow.encoder.encode_patches(slow.images)

    def weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raw = torch.stack([torch.stack([a @ b / 4 for b in q]) for a in q]).exp()
        return raw / raw.sum(1, keepdim=True)

    for row in range(2):
        block, x = slow.blocks[-1], slow.stream(row, 2)
        torch.testing.assert_close(found[row], slow.patches(slow.mixed(block, x, weights)))
    unchanged(ClearClip())
