"""FLIP: which patches remain follows from a sample's number, wherever the sample is."""

import pytest
import torch

from vlkit.errors import ModelError
from vlkit.models.open_clip_encoder import OpenClipEncoder, build_encoder
from vlkit.models.patch_dropout import PatchDropout, add_patch_dropout, kept_patches

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
DRAWS = torch.randint(-(2**62), 2**62, (4000,), generator=torch.Generator().manual_seed(0))


def make() -> OpenClipEncoder:
    torch.manual_seed(0)
    return build_encoder({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT})


def test_every_patch_is_equally_likely_and_each_sample_has_its_own() -> None:
    kept = kept_patches(DRAWS, 16, 8)
    assert kept.shape == (4000, 8) and (kept.diff(dim=1) > 0).all()
    share = kept.flatten().bincount(minlength=16) / 4000
    assert (share - 0.5).abs().max() < 0.04  # five standard deviations
    together = torch.zeros(16, 16).index_put_((kept[:, 0], kept[:, 1]), torch.tensor(1.0), accumulate=True)
    assert (together[0] > 0).sum() > 5 and len(kept.unique(dim=0)) > 3000
    # Neighbouring numbers are as different as any.
    assert len(kept_patches(torch.arange(100), 16, 8).unique(dim=0)) > 90


def test_the_choice_does_not_depend_on_the_batch() -> None:
    whole = kept_patches(DRAWS[:10], 16, 5)
    assert torch.equal(kept_patches(DRAWS[3:4], 16, 5), whole[3:4])
    assert kept_patches(DRAWS[:2], 16, 5).tolist() == [[2, 5, 6, 8, 14], [1, 6, 8, 9, 11]]  # frozen


def test_the_kept_patches_and_the_class_token_remain_in_order() -> None:
    x = torch.arange(2 * 17 * 3.0).view(2, 17, 3)
    dropout = PatchDropout(0.75)
    dropout.draws = DRAWS[:2]
    kept = kept_patches(DRAWS[:2], 16, 4)
    for row in range(2):
        assert torch.equal(dropout(x)[row], x[row, [0, *(kept[row] + 1).tolist()]])
    dropout.draws = None
    assert dropout(x) is x


def test_a_tower_sees_only_the_kept_patches() -> None:
    encoder = make()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    stock = encoder.encode_image(images)
    dropout = add_patch_dropout(encoder, 0.5)
    assert torch.equal(encoder.encode_image(images), stock)  # nothing drawn: all patches
    dropout.draws = DRAWS[:2]
    masked = encoder.encode_image(images)
    assert not torch.allclose(masked, stock)
    # What lies under a patch that is left out does not matter; what lies under one that is kept does.
    kept = kept_patches(DRAWS[:2], 16, 8)[0].tolist()
    for patch in range(16):
        changed = images.clone()
        row, column = divmod(patch, 4)
        changed[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] ^= 255
        assert torch.equal(encoder.encode_image(changed)[0], masked[0]) == (patch not in kept)


def test_a_tower_without_patches_is_refused() -> None:
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    with pytest.raises(ModelError, match=r"patch_dropout = 0.5: this image tower .ModifiedResNet. has no patches"):
        add_patch_dropout(build_encoder({"embed_dim": 16, "vision_cfg": resnet, "text_cfg": TEXT}), 0.5)
