from typing import Any

import torch

from vlkit.addons.towers.sclip import Sclip


def test_sum_of_two_softmaxes(slow: Any, unchanged: Any) -> None:
    with Sclip().edit(slow.encoder):
        found = slow.encoder.encode_patches(slow.images)

    def weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(q), len(q), dtype=q.dtype)
        for i in range(len(q)):
            by_q = torch.stack([q[i] @ q[j] / 4 for j in range(len(q))]).exp()
            by_k = torch.stack([k[i] @ k[j] / 4 for j in range(len(k))]).exp()
            out[i] = by_q / by_q.sum() + by_k / by_k.sum()
        assert torch.allclose(out.sum(1), torch.full((len(q),), 2.0).to(q))
        return out

    for row in range(2):
        block, x = slow.blocks[-1], slow.stream(row, 2)
        out = x + slow.mixed(block, x, weights)
        torch.testing.assert_close(found[row], slow.patches(out + block.mlp(block.ln_2(out))))
    unchanged(Sclip())
