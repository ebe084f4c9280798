"""CLIP Surgery: a second path through the last blocks, in which values attend to values and no MLP runs.

    path = x;   for each of the last blocks:  path = path + O softmax(v v^T / sqrt d) v,   v from the stock stream

`surgery_scores` is the second half of the method: what all classes share is taken out of the scores of patches.

Source: Li et al. 2023, "CLIP Surgery for Better Explainability with Enhancement in Open-Vocabulary Tasks",
arXiv:2304.05653, and the authors' code, which takes the last six blocks.
Differs: The weight of a class comes from the similarity of the pooled feature, as in the paper; a later state of the
code has a weight for each patch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlkit.addons.base import Need, TowerEdit
from vlkit.addons.last_block import require_patches, require_patches_of
from vlkit.contracts import Progress
from vlkit.interpret.last_layers import first_of_last
from vlkit.models.attention import attention_logits, attention_parts, mix_values
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

# The authors' factor on the cosine, before the softmax over classes.
_SHARPNESS = 2.0


@dataclass(frozen=True)
class ClipSurgery(TowerEdit):
    """The value-value path.

    Attributes:
        last_layers: blocks it runs beside, from the end.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"patches"})

    last_layers: int = 6

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing; checks the tower."""
        require_patches_of(embedder)
        first_of_last(self.last_layers, embedder.embedder.encoder.vision_tower.blocks)
        return self

    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """Patches of the joint space from the second path; the class position from the stock stream.

        Raises:
            ModelError: a tower without patches in the joint space.
            ConfigError: more layers than there are.
        """
        return _second_path(encoder, self.last_layers)


@contextmanager
def _second_path(encoder: DualEncoder, last_layers: int) -> Iterator[None]:
    require_patches(encoder)
    blocks = encoder.vision_tower.blocks
    chosen = [block.module for block in blocks[first_of_last(last_layers, blocks) :]]
    path: list[Tensor] = []  # of the batch that is going through

    def hook_of(number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], stock: Tensor) -> Tensor | None:
            x = inputs[0]
            so_far = x if number == 0 else path.pop()
            value = attention_parts(module, x).value
            so_far = so_far + mix_values(module, attention_logits(value, value).softmax(dim=-1), value)
            if number == len(chosen) - 1:
                return torch.cat([stock[:, :1], so_far[:, 1:]], dim=1)
            path.append(so_far)
            return None

        return hook

    with ExitStack() as stack:
        for number, module in enumerate(chosen):
            stack.callback(module.register_forward_hook(hook_of(number)).remove)
        yield


def surgery_scores(patches: Tensor, texts: Tensor, pooled: Tensor) -> Tensor:
    """Scores of patches without what all classes share.

    The products of each channel of patch and text are weighted by how obvious the class is in the image, and their
    mean over classes, channel by channel, is subtracted before the channels are summed.

    Args:
        patches: (B,P,D) unit norm.
        texts: (C,D) unit norm, at least two.
        pooled: (B,D) unit norm.

    Returns:
        (B,P,C).
    """
    assert len(texts) > 1, "what classes share is known from two on"
    obvious = (_SHARPNESS * pooled @ texts.T).softmax(dim=-1)
    weights = obvious / obvious.mean(dim=-1, keepdim=True)  # (B,C)
    # The channels are summed at once: sum_d p_d (w_c t_cd - mean_c w_c t_cd).
    weighted = weights[..., None] * texts  # (B,C,D)
    return patches @ (weighted - weighted.mean(dim=1, keepdim=True)).transpose(1, 2)


ADDON = ClipSurgery
