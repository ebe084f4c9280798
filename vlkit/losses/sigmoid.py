"""The loss of SigLIP: each image-text pair on its own, positive or negative, in memory linear in the batch.

    loss = sigmoid_loss(image, text, logit_scale, logit_bias)             # row i of text describes row i of image

No logit depends on another, so one pass over tiles gives the loss and its gradient in closed form; nothing of the
size of a tile is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses.base import TILE_SIZE, Duplicates, Share, accumulation_dtype, keys_of, own_in_tile, share_of

# Where training starts. Source: Zhai et al. 2023, arXiv:2303.15343, section 3.2.
START_LOGIT_SCALE = 10.0
START_LOGIT_BIAS = -10.0


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    text_to_image: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    same_caption: Tensor | None = None,
    same_image: Tensor | None = None,
    over_ranks: bool = False,
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """Binary loss of every image-text pair in the batch.

    A text and its own image are a positive pair, all other pairs are negative. There is no normalisation over the
    batch: the losses of all pairs are summed and divided by the number of texts.

    Everything is computed in float32 whatever the autocast (in float64 for float64 features).

    Args:
        image: (B, D) unit-norm image features.
        text: (R, D) unit-norm text features.
        logit_scale: () multiplier of the cosine similarity, already exponentiated; starts at 10.
        logit_bias: () added after scaling; starts at -10, so that training opens with few positives.
        text_to_image: (R,) the image row each text describes; default: row i describes image i.
        valid: (B,) images to count; the others and their texts are left out.
        same_caption: (R,) keys, equal for equal captions: such a text and an image whose own text has the same key
            are no pair. Default: they are a negative pair.
        same_image: (B,) keys, equal for the same image: such images and each other's texts are no pairs.
        over_ranks: the batch is spread over all processes and these are the rows of this one; see `clip_loss`.
        tile_size: at most so many logits exist at a time.

    Returns:
        () mean loss per text (with one text an image, per image), in nats; 0 when no row is valid.

    Raises:
        ValueError: shapes that do not go together.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343, Algorithm 1.
    Differs: logit_scale is passed already exponentiated; several texts an image, invalid rows and duplicates.
    """
    share = share_of(image, text, text_to_image, valid, same_caption, same_image, over_ranks)
    if share.texts.total == 0:
        return (image.sum() + text.sum() + logit_scale + logit_bias) * 0.0  # keeps the graph, so that backward works
    dtype = accumulation_dtype(image)
    with torch.autocast(image.device.type, enabled=False):
        inputs = (share.image.to(dtype), share.text.to(dtype), logit_scale.to(dtype), logit_bias.to(dtype))
        loss: Tensor = _TiledSigmoid.apply(*inputs, share, tile_size)
    return loss


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` as a term of an objective, over the batches of all ranks.

    Args:
        duplicates: "mask": equal captions, and the same image, are no pairs; "keep": they are negative pairs.
        tile_size: at most so many logits exist at a time.
    """

    needs: frozenset[str] = frozenset({"image", "text", "logit_bias"})

    def __init__(self, duplicates: Duplicates = "keep", tile_size: int = TILE_SIZE) -> None:
        super().__init__()
        self.duplicates = duplicates
        self.tile_size = tile_size

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        """() the loss over all ranks, the same on each; gradients of parameters are to be averaged over ranks."""
        assert features.logit_bias is not None, "the objective was built for an encoder without logit_bias"
        return sigmoid_loss(
            features.image,
            features.text,
            features.logit_scale,
            features.logit_bias,
            features.text_to_image,
            batch.valid,
            **keys_of(self.duplicates, features, batch),
            over_ranks=True,
            tile_size=self.tile_size,
        )


class _TiledSigmoid(torch.autograd.Function):
    """With z = -1 for a positive pair, 1 for a negative: loss = softplus(z x), dloss/dx = z sigmoid(z x)."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, share: Share, tile_size: int
    ) -> Tensor:
        texts = share.texts.gather(text)
        rows = max(1, tile_size // len(texts))
        ctx.num_ranks = share.texts.num_ranks
        keep = any(ctx.needs_input_grad)
        by_image, by_texts = (torch.empty_like(image), torch.zeros_like(texts)) if keep else (image, texts)
        # Loss and gradient by the bias, tile by tile: one sum of few numbers loses less than a running one of many.
        sums = [image.new_zeros(2)]
        for start in range(0, len(image), rows):
            tile = image[start : start + rows]
            logits = _signed_logits(tile, texts, scale, bias, share, start)
            loss = F.softplus(logits).sum()
            if keep:
                gradient = _flip_own(logits.sigmoid_(), share, start)
                sums.append(torch.stack([loss, gradient.sum()]))
                torch.mm(gradient, texts, out=by_image[start : start + rows])
                by_texts.addmm_(gradient.T, tile)
            else:
                sums.append(torch.stack([loss, loss]))
        total, by_bias = share.texts.sum(torch.stack(sums).sum(0) / share.texts.total)
        if keep:
            by_scale = share.texts.sum((image * by_image).sum() / share.texts.total)
            factor = scale / share.texts.total
            ctx.save_for_backward(
                by_image.mul_(factor), share.texts.sum_own(by_texts.mul_(factor)), by_scale, by_bias.clone()
            )
        value: Tensor = total.clone()
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_image, by_text, by_scale, by_bias = ctx.saved_tensors
        of_features = grad * ctx.num_ranks
        return of_features * by_image, of_features * by_text, grad * by_scale, grad * by_bias, None, None


def _signed_logits(tile: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, share: Share, start: int) -> Tensor:
    """(rows, G) scale * cosine + bias, negated for positive pairs; -inf where image and text are no pair."""
    logits = torch.addmm(bias, scale * tile, texts.T)
    if share.same is not None:
        logits.masked_fill_(share.same.mask(share.own, start, len(tile)), -torch.inf)
    return _flip_own(logits, share, start)


def _flip_own(values: Tensor, share: Share, start: int) -> Tensor:
    """Negate, in place, the entry of each text with its own image."""
    place, inside = own_in_tile(share.own, start, len(values))
    own = values.gather(0, place)
    return values.scatter_(0, place, torch.where(inside, -own, own))
