from typing import Any

import torch

from vlkit.addons.towers.maskclip import MaskClip


def test_patches_are_their_own_values(slow: Any, unchanged: Any) -> None:
    with MaskClip().edit(slow.encoder):
        found = slow.encoder.encode_patches(slow.images)
    for row in range(2):
        block, x = slow.blocks[-1], slow.stream(row, 2)
        values = torch.cat([v for _, _, v in slow.heads(block, x)], dim=1)
        torch.testing.assert_close(found[row], slow.patches(block.attn.out_proj(values)))
    unchanged(MaskClip())


def test_the_released_form_keeps_residual_and_mlp(slow: Any, unchanged: Any) -> None:
    with MaskClip(residual=True).edit(slow.encoder):
        found = slow.encoder.encode_patches(slow.images)
    block, x = slow.blocks[-1], slow.stream(0, 2)
    value = x + block.attn.out_proj(torch.cat([v for _, _, v in slow.heads(block, x)], dim=1))
    torch.testing.assert_close(found[0], slow.patches(value + block.mlp(block.ln_2(value))))
    unchanged(MaskClip(residual=True))


def test_patches_do_not_see_each_other_in_the_last_block(slow: Any) -> None:
    """With the whole model down to its last block, a change of one patch reaches that patch alone."""
    block, x = slow.blocks[-1], slow.stream(0, 2)[None].clone()
    other = x.clone()
    other[0, 5, 0] += 1.0
    with MaskClip().edit(slow.encoder):
        changed = (block(x) - block(other)).abs().sum(-1)[0, 1:] > 1e-9
    assert changed.nonzero().flatten().tolist() == [4]
