"""The loss of CLIP: softmax cross-entropy over the batch in both directions, in memory linear in the batch.

    loss = clip_loss(image, text, logit_scale)                            # row i of text describes row i of image
    loss = clip_loss(image, text, logit_scale, text_to_image, valid)      # several texts an image, broken samples

The matrix of logits is never kept: it is made tile by tile, once for the log-sum-exps of both directions and once
more in backward. A batch that fits in one tile is done in a single pass, gradient included. With several processes
each makes the logits of its own images with the texts of all: a share of the work, and O(texts x D + tile) memory.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses.base import (
    TILE_SIZE,
    Duplicates,
    LogSumExps,
    Share,
    accumulation_dtype,
    keys_of,
    log_sum_exps,
    lowest,
    own_in_tile,
    share_of,
    tile_logits,
)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    text_to_image: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    same_caption: Tensor | None = None,
    same_image: Tensor | None = None,
    over_ranks: bool = False,
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """Symmetric softmax cross-entropy between the images and the texts of a batch.

    Text to image: the cross-entropy of each text's own image among all images, averaged over texts.
    Image to text: for each image the mean, over its own texts, of the cross-entropy of that text among all
    texts; averaged over images. The loss is the mean of both directions. With one text an image this is CLIP's.

    Everything is computed in float32 whatever the autocast (in float64 for float64 features).

    Args:
        image: (B, D) unit-norm image features.
        text: (R, D) unit-norm text features.
        logit_scale: () multiplier of the cosine similarity, already exponentiated.
        text_to_image: (R,) the image row each text describes; default: row i describes image i.
        valid: (B,) images to count; the others and their texts are neither positives nor negatives.
        same_caption: (R,) keys, equal for equal captions: such a text is no negative of an image whose own text
            has the same key. Default: all other texts are negatives.
        same_image: (B,) keys, equal for the same image: such images and their texts are no negatives of each other.
        over_ranks: the batch is spread over all processes and these are the rows of this one (as many or as few as
            it has). Every process gets the loss of the whole batch, and gradients which, averaged over processes
            as DDP and FSDP do, are those of the whole batch.
        tile_size: at most so many logits exist at a time.

    Returns:
        () the loss in nats; 0 when no row is valid.

    Raises:
        ValueError: shapes that do not go together.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
        arXiv:2103.00020, figure 3. Tiles with online log-sum-exp: Cheng et al. 2024, arXiv:2410.17243.
    Differs: several texts an image, invalid rows and duplicates; the gradient is in closed form, the temperature's
        included.
    """
    share = share_of(image, text, text_to_image, valid, same_caption, same_image, over_ranks)
    if share.texts.total == 0:
        return (image.sum() + text.sum() + logit_scale) * 0.0  # keeps the graph, so that backward works
    dtype = accumulation_dtype(image)
    with torch.autocast(image.device.type, enabled=False):
        inputs = (share.image.to(dtype), share.text.to(dtype), logit_scale.to(dtype))
        loss: Tensor = _TiledClip.apply(*inputs, share, tile_size)
    return loss


class ClipLoss(nn.Module):
    """`clip_loss` as a term of an objective, over the batches of all ranks.

    Args:
        duplicates: "mask": equal captions, and the same image, are no negatives; "keep": they are.
        tile_size: at most so many logits exist at a time.
    """

    needs: frozenset[str] = frozenset({"image", "text"})

    def __init__(self, duplicates: Duplicates = "keep", tile_size: int = TILE_SIZE) -> None:
        super().__init__()
        self.duplicates = duplicates
        self.tile_size = tile_size

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        """() the loss over all ranks, the same on each; gradients of parameters are to be averaged over ranks."""
        return clip_loss(
            features.image,
            features.text,
            features.logit_scale,
            features.text_to_image,
            batch.valid,
            **keys_of(self.duplicates, features, batch),
            over_ranks=True,
            tile_size=self.tile_size,
        )


class _Weights(NamedTuple):
    """How much the parts of each row count: loss = text * lse_text.sum() + image @ lse_image - own @ own_logit."""

    text: float  # the log-sum-exp over images of each text's logits
    image: Tensor  # (B,) the log-sum-exp over texts of each image's logits
    own: Tensor  # (G,) the logit of each text with its own image, in both directions


class _TiledClip(torch.autograd.Function):
    """With the weights above: dloss/dlogit[i,j] = text p(i|j) + image[i] p(j|i) - own[j] [i is j's image]."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, share: Share, tile_size: int) -> Tensor:
        texts = share.texts.gather(text)
        weights = _weights(image, share)
        ctx.share, ctx.rows = share, max(1, tile_size // len(texts))
        # All processes must go the same way, or they would wait for each other in different places.
        ctx.in_one_pass = ctx.rows >= max(share.images.counts) and any(ctx.needs_input_grad)
        if ctx.in_one_pass:
            parts, gradients = _one_pass(image, texts, scale, share, weights)
            ctx.save_for_backward(*gradients)
        else:
            parts = log_sum_exps(image, texts, scale, share, ctx.rows)
            ctx.save_for_backward(image, texts, scale, parts.image, parts.text)
        mine = weights.text * parts.text[share.texts.own].sum() + weights.image @ parts.image
        return share.texts.sum(mine - weights.own @ parts.own_logit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.in_one_pass:
                by_image, by_text, by_scale = ctx.saved_tensors
            else:
                by_image, by_text, by_scale = _gradients(*ctx.saved_tensors, share=ctx.share, rows=ctx.rows)
            of_features = grad * ctx.share.texts.num_ranks
            return of_features * by_image, of_features * by_text, grad * by_scale, None, None


def _weights(image: Tensor, share: Share) -> _Weights:
    # One place more than images: the texts of other processes, whose own image is row -1, are counted there.
    num_texts = image.new_zeros(len(image) + 1)
    num_texts.index_add_(0, share.own % len(num_texts), torch.ones_like(share.own, dtype=image.dtype))
    described = (num_texts > 0).to(image.dtype)  # an image without a text is only a negative
    per_text = 0.5 / share.texts.total
    per_image = 0.5 / share.num_described
    own = (per_text + per_image / num_texts.clamp(min=1))[share.own] * (share.own >= 0)
    return _Weights(per_text, per_image * described[:-1], own)


def _one_pass(
    image: Tensor, texts: Tensor, scale: Tensor, share: Share, weights: _Weights
) -> tuple[LogSumExps, tuple[Tensor, Tensor, Tensor]]:
    """The loss and its gradients by image, own text and scale, from one tile that holds all logits."""
    if len(image) == 0:
        parts = log_sum_exps(image, texts, scale, share, 1)
        return parts, _reduced(image, torch.zeros_like(texts), image, scale, share)
    logits = tile_logits(image, texts, scale, share, 0)
    place, inside = own_in_tile(share.own, 0, len(image))
    own_logit = logits.gather(0, place)[0].masked_fill(~inside, 0)  # -inf times zero would be nan
    top_image = logits.amax(dim=1, keepdim=True).clamp_(min=lowest(logits))
    gradient = (logits - top_image).exp_()
    sum_image = gradient.sum(dim=1, keepdim=True)
    # An image without a text may have nothing but duplicates beside it: it has no weight, whatever its sum.
    gradient *= weights.image[:, None] / sum_image.clamp(min=torch.finfo(image.dtype).tiny)
    top_text = share.texts.max(logits.amax(dim=0).clamp_(min=lowest(logits)))
    sum_text = share.texts.sum(logits.sub_(top_text).exp_().sum(dim=0))
    gradient.addcmul_(logits, (weights.text / sum_text)[None])
    gradient.scatter_add_(0, place, -weights.own[None])
    lse_image = (top_image + sum_image.clamp(min=torch.finfo(image.dtype).tiny).log())[:, 0]
    by_image = gradient @ texts
    return (
        LogSumExps(lse_image, top_text + sum_text.log(), own_logit),
        _reduced(by_image, gradient.T @ image, image, scale, share),
    )


def _gradients(
    image: Tensor, texts: Tensor, scale: Tensor, lse_image: Tensor, lse_text: Tensor, *, share: Share, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by image, own text and scale, the logits made again tile by tile."""
    weights = _weights(image, share)
    by_image, by_texts = torch.empty_like(image), torch.zeros_like(texts)
    # exp(logit - lse) * weight, with the weight taken into the exponent.
    shift_image, shift_text = lse_image - weights.image.log(), lse_text - math.log(weights.text)
    for start in range(0, len(image), rows):
        tile = image[start : start + rows]
        logits = tile_logits(tile, texts, scale, share, start)
        gradient = (logits - shift_image[start : start + rows, None]).exp_()
        gradient += logits.sub_(shift_text).exp_()
        place, inside = own_in_tile(share.own, start, len(tile))
        gradient.scatter_add_(0, place, -(weights.own * inside)[None])
        torch.mm(gradient, texts, out=by_image[start : start + rows])
        by_texts.addmm_(gradient.T, tile)
    return _reduced(by_image, by_texts, image, scale, share)


def _reduced(
    by_image: Tensor, by_texts: Tensor, image: Tensor, scale: Tensor, share: Share
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients by scaled cosine to those by image, own text and scale, the latter two summed over processes."""
    by_scale = share.texts.sum((image * by_image).sum())
    return by_image.mul_(scale), share.texts.sum_own(by_texts.mul_(scale)), by_scale
