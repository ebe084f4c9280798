"""LeGrad: gradients with respect to attention maps, layer by layer, as an explanation of a ViT.

    legrad(encoder, images, text_features)      # (B,rows,columns) in [0,1]

Source: Bousselham et al. 2025, "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity", ICCV, arXiv:2404.03214; released code (compute_legrad_clip): at each of the last layers the mean over
all tokens goes through the last norm and projection and is brought to unit norm; the gradient of its similarity with
the text with respect to that layer's map is cut at zero and averaged over heads and queries.
Differs: Maps are left at the resolution of the grid; `pictures.overlay` enlarges them. Each image is scaled to [0,1]
by itself (the released code scales the whole batch at once). Only class-token ViTs: SigLIP's pooling has no tower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.interpret.decomposition import class_token_tower
from vlkit.interpret.last_layers import first_of_last
from vlkit.models.attention import attention_map, attention_parts, feed_forward, mix_values
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tower import Block, VisionTower


def legrad(encoder: DualEncoder, images: Tensor, text: Tensor, last_layers: int = 2) -> Tensor:
    """How much more attention to each patch would raise the similarity of image b with text b.

    Args:
        encoder: with a CLIP ViT of open_clip.
        images: (B,3,S,S) uint8, or float in [0,1].
        text: (B,D) unit-norm text features.
        last_layers: layers that are summed, from the end; 2 is the released default.

    Returns:
        (B,rows,columns), each image scaled to [0,1].

    Raises:
        ModelError: the encoder has no such tower.
        ConfigError: more layers than there are.
    """
    tower = class_token_tower(encoder)
    start = first_of_last(last_layers, tower.blocks)
    with torch.no_grad():
        x = tower.embed(images)
        for block in tower.blocks[:start]:
            x = block(x)
    total = x.new_zeros(len(x), x.shape[1] - 1)
    for block in tower.blocks[start:]:
        gradient, x = _layer(tower, block, x, text)
        # Over heads and queries; the first column is the attention paid to the class token.
        total += gradient.clamp(min=0).mean(dim=(1, 2))[:, 1:]
    low, high = total.amin(dim=1, keepdim=True), total.amax(dim=1, keepdim=True)
    scaled = (total - low) / (high - low).clamp_min(torch.finfo(total.dtype).tiny)
    maps: Tensor = scaled.unflatten(-1, tower.grid)
    return maps


def _layer(tower: VisionTower, block: Block, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (B,H,L,L) of one layer's similarity with respect to its map, and the layer's output."""
    with torch.no_grad():
        parts = attention_parts(block.module, x)
    with torch.enable_grad():
        weights = attention_map(parts).detach().requires_grad_()
        out = x + mix_values(block.module, weights, parts.value)
        out = out + feed_forward(block.module, out)
        pooled = tower.finish(out.mean(dim=1, keepdim=True))  # finish reads position 0, here the mean of all
        similarity = (F.normalize(pooled, dim=-1) * text).sum()
        (gradient,) = torch.autograd.grad(similarity, weights)
    return gradient, out.detach()
