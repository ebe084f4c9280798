"""FLIP: in training a share of the patches is left out, chosen for each sample by numbers of its own.

    dropout = add_patch_dropout(encoder, 0.5)
    dropout.draws = draws                   # (B,) int64, one number for each image of the next forward
    encoder(batch)                          # half of the patches
    dropout.draws = None                    # all patches: evaluation, and the unmasked end of a run

Which patches remain follows from the sample's number alone, on any device, in any batch, chunk or process.

Source: Li et al. 2023, "Scaling Language-Image Pre-training via Masking", arXiv:2212.00794, section 3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vlkit.errors import ModelError
from vlkit.models.dual_encoder import DualEncoder


class PatchDropout(nn.Module):
    """Tokens (B,1+P,W) -> (B,1+K,W): the class token and the K patches that were drawn, in their order.

    Args:
        rate: share of the patches left out, in [0,1); at least one patch remains.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """All tokens where nothing was drawn."""
        if self.draws is None:
            return x
        assert len(self.draws) == len(x), (self.draws.shape, x.shape)
        patches = x.shape[1] - 1
        kept = kept_patches(self.draws.to(x.device), patches, max(1, round(patches * (1 - self.rate))))
        rows = kept[..., None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :1], x[:, 1:].gather(1, rows)], dim=1)


def kept_patches(draws: Tensor, patches: int, count: int) -> Tensor:
    """(B,) numbers -> (B,count) which patches remain, ascending: a uniform choice for each number."""
    numbers = torch.arange(1, patches + 1, device=draws.device)
    scores = _mix(draws[:, None] + numbers * _GOLDEN)
    # The low bits hold the place, so that no two scores are equal and every device sorts them alike.
    scores = (scores >> 16 << 16) | numbers
    return scores.topk(count, dim=1).indices.sort(dim=1).values


# Multipliers of splitmix64 as signed numbers: integer arithmetic wraps and is the same everywhere.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mix(x: Tensor) -> Tensor:
    """Steele et al. 2014, "Fast splittable pseudorandom number generators": the finaliser of splitmix64."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros, which torch has not for signed numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def add_patch_dropout(encoder: DualEncoder, rate: float) -> PatchDropout:
    """Give an encoder patch dropout in place of open_clip's, which draws on the host.

    Raises:
        ModelError: an image tower without patches that can be left out.
    """
    tower: Any = getattr(getattr(encoder, "model", None), "visual", None)
    if type(tower).__name__ != "VisionTransformer" or not isinstance(getattr(tower, "patch_dropout", None), nn.Module):
        raise ModelError(
            f"model.patch_dropout = {rate:g}: this image tower ({type(tower).__name__}) has no patches that can be "
            "left out. Take a model with open_clip's own ViT."
        )
    dropout = PatchDropout(rate)
    tower.patch_dropout = dropout
    encoder.drops_patches = True  # type: ignore[assignment]
    return dropout
