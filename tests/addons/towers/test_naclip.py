import math
from typing import Any

import pytest
import torch

from vlkit.addons.towers.naclip import NaClip, neighbourhood
from vlkit.errors import ConfigError


def test_keys_and_neighbours(slow: Any, unchanged: Any) -> None:
    sigma = 1.5
    with NaClip(sigma=sigma).edit(slow.encoder):
        found = slow.encoder.encode_patches(slow.images)

    def weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(17, 17, dtype=k.dtype)
        for i in range(17):
            for j in range(17):
                out[i, j] = k[i] @ k[j] / 4
                if i and j:  # places on the 4 x 4 grid; the class position has none
                    down, right = (i - 1) // 4 - (j - 1) // 4, (i - 1) % 4 - (j - 1) % 4
                    out[i, j] += math.exp(-(down**2 + right**2) / (2 * sigma**2))
        return out.exp() / out.exp().sum(1, keepdim=True)

    for row in range(2):
        block, x = slow.blocks[-1], slow.stream(row, 2)
        torch.testing.assert_close(found[row], slow.patches(slow.mixed(block, x, weights)))
    unchanged(NaClip())


def test_nearer_patches_weigh_more() -> None:
    """The Gaussian is the method: of patches with equal keys the near ones must count most."""
    near = neighbourhood((3, 5), sigma=2.0)
    assert near.shape == (16, 16) and not near[0].any() and not near[:, 0].any()
    of_first = near[1, 1:].reshape(3, 5)
    assert of_first[0, 0] == 1 and (of_first.diff(dim=0) < 0).all() and (of_first.diff(dim=1) < 0).all()


def test_a_width_that_is_none() -> None:
    with pytest.raises(ConfigError, match="naclip:sigma is 0"):
        NaClip(sigma=0)
