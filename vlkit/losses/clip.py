"""The loss of CLIP: softmax cross-entropy over the batch in both directions, in memory linear in the batch.

    loss = clip_loss(image, text, logit_scale)                            # row i of text describes row i of image
    loss = clip_loss(image, text, logit_scale, text_to_image, valid)      # several texts an image, broken samples

The (B, R) matrix of logits is never kept: it is made tile by tile, once for the log-sum-exps of both directions
and once more in backward. A batch that fits in one tile is done in a single pass, gradient included.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.contracts import Features, ImageTextBatch
from vlkit.distributed import gather_rows, rank, world_size

# Logits in one tile: 16 MiB of float32. Smaller tiles make the matrix products slower, larger ones leave the cache.
TILE_SIZE = 1 << 22


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    text_to_image: Tensor | None = None,
    valid: Tensor | None = None,
    *,
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
        tile_size: at most so many logits exist at a time.

    Returns:
        () the loss in nats; 0 when no row is valid.

    Raises:
        ValueError: shapes that do not go together.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
        arXiv:2103.00020, figure 3. Tiles with online log-sum-exp: Cheng et al. 2024, arXiv:2410.17243.
    Differs: several texts an image and invalid rows; the gradient is in closed form, the temperature's included.
    """
    _check(image, text, text_to_image, valid)
    if text_to_image is None:
        text_to_image = torch.arange(len(text), device=text.device)
    if valid is not None and not bool(valid.all()):
        text_valid = valid[text_to_image]
        text_to_image = (valid.cumsum(0) - 1)[text_to_image[text_valid]]
        image, text = image[valid], text[text_valid]
    if len(text) == 0:
        return (image.sum() + text.sum() + logit_scale) * 0.0  # keeps the graph, so that backward works
    dtype = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        inputs = (image.to(dtype), text.to(dtype), logit_scale.to(dtype))
        loss: Tensor = _TiledClip.apply(*inputs, text_to_image, tile_size)
    return loss


class ClipLoss(nn.Module):
    """`clip_loss` as a term of an objective, over the batches of all ranks."""

    needs: frozenset[str] = frozenset({"image", "text"})

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        """() the loss over all ranks, the same on each; gradients of parameters are to be averaged over ranks."""
        own = features.text_to_image
        if world_size() == 1:
            return clip_loss(features.image, features.text, features.logit_scale, own, batch.valid)
        counts = gather_rows(torch.tensor([len(own)], device=own.device)).tolist()
        return clip_loss(
            gather_rows(features.image),
            _gather_texts(features.text, counts),
            features.logit_scale,
            _gather_texts(own + rank() * len(features.image), counts),
            gather_rows(batch.valid),
        )


def _gather_texts(rows: Tensor, counts: list[int]) -> Tensor:
    """`gather_rows` for as many rows on each rank as `counts` says, padded on the way."""
    longest = max(counts)
    padded = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    gathered = gather_rows(padded).unflatten(0, (len(counts), longest))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


class _Weights(NamedTuple):
    """How much the parts of each row count: loss = text @ lse_text + image @ lse_image - own @ own_logit."""

    text: Tensor  # (R,) the log-sum-exp over images of each text's logits
    image: Tensor  # (B,) the log-sum-exp over texts of each image's logits
    own: Tensor  # (R,) the logit of each text with its own image, in both directions


class _TiledClip(torch.autograd.Function):
    """With the weights above: dloss/dlogit[i,j] = text[j] p(i|j) + image[i] p(j|i) - own[j] [i is j's image]."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, own: Tensor, tile_size: int) -> Tensor:
        weights = _weights(image, own)
        ctx.rows = max(1, tile_size // len(text))
        ctx.in_one_pass = ctx.rows >= len(image) and any(ctx.needs_input_grad)
        if ctx.in_one_pass:
            loss, gradients = _one_pass(image, text, scale, own, weights)
            ctx.save_for_backward(*gradients)
            return loss
        lse_image, lse_text, own_logit = _log_sum_exps(image, text, scale, own, ctx.rows)
        ctx.save_for_backward(image, text, scale, own, lse_image, lse_text)
        return weights.text @ lse_text + weights.image @ lse_image - weights.own @ own_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.in_one_pass:
                gradients = ctx.saved_tensors
            else:
                gradients = _gradients(*ctx.saved_tensors, rows=ctx.rows)
            return (*(grad * gradient for gradient in gradients), None, None)


def _weights(image: Tensor, own: Tensor) -> _Weights:
    num_texts = torch.zeros(len(image), dtype=image.dtype, device=image.device)
    num_texts.scatter_add_(0, own, torch.ones_like(own, dtype=image.dtype))
    described = (num_texts > 0).to(image.dtype)  # an image without a text is only a negative
    per_text = torch.full((len(own),), 0.5 / len(own), dtype=image.dtype, device=image.device)
    per_image = 0.5 * described / described.sum()
    return _Weights(per_text, per_image, per_text + (per_image / num_texts.clamp(min=1))[own])


def _one_pass(
    image: Tensor, text: Tensor, scale: Tensor, own: Tensor, weights: _Weights
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss and its gradients by image, text and scale, from one tile that holds all logits."""
    logits = (scale * image) @ text.T
    own_logit = logits.gather(0, own[None])[0]
    top_image = logits.amax(dim=1, keepdim=True)
    gradient = (logits - top_image).exp_()
    sum_image = gradient.sum(dim=1, keepdim=True)
    gradient *= weights.image[:, None] / sum_image
    top_text = logits.amax(dim=0)
    sum_text = logits.sub_(top_text).exp_().sum(dim=0)
    gradient.addcmul_(logits, (weights.text / sum_text)[None])
    gradient.scatter_add_(0, own[None], -weights.own[None])
    lse_image, lse_text = (top_image + sum_image.log())[:, 0], top_text + sum_text.log()
    loss = weights.text @ lse_text + weights.image @ lse_image - weights.own @ own_logit
    by_image = gradient @ text
    return loss, (scale * by_image, scale * (gradient.T @ image), (image * by_image).sum())


def _log_sum_exps(image: Tensor, text: Tensor, scale: Tensor, own: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each image over texts (B,), of each text over images (R,), and each text's own logit (R,)."""
    lse_image = image.new_empty(len(image))
    own_logit = image.new_zeros(len(text))
    top, total = image.new_full((len(text),), float("-inf")), image.new_zeros(len(text))
    for start in range(0, len(image), rows):
        logits = (scale * image[start : start + rows]) @ text.T
        lse_image[start : start + rows] = logits.logsumexp(dim=1)
        place, inside = _own_in_tile(own, start, len(logits))
        own_logit += logits.gather(0, place)[0] * inside
        # Online: what was summed below an older maximum is brought below the new one.
        new_top = torch.maximum(top, logits.amax(dim=0))
        total = total * (top - new_top).exp_() + logits.sub_(new_top).exp_().sum(dim=0)
        top = new_top
    return lse_image, top + total.log(), own_logit


def _gradients(
    image: Tensor, text: Tensor, scale: Tensor, own: Tensor, lse_image: Tensor, lse_text: Tensor, *, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by image, text and scale, the logits made again tile by tile."""
    weights = _weights(image, own)
    by_image, by_text = torch.empty_like(image), torch.zeros_like(text)
    # exp(logit - lse) * weight, with the weight taken into the exponent.
    shift_image, shift_text = lse_image - weights.image.log(), lse_text - weights.text.log()
    for start in range(0, len(image), rows):
        tile = image[start : start + rows]
        logits = (scale * tile) @ text.T
        gradient = (logits - shift_image[start : start + rows, None]).exp_()
        gradient += logits.sub_(shift_text).exp_()
        place, inside = _own_in_tile(own, start, len(tile))
        gradient.scatter_add_(0, place, -(weights.own * inside)[None])
        torch.mm(gradient, text, out=by_image[start : start + rows])
        by_text.addmm_(gradient.T, tile)
    return by_image * scale, by_text * scale, (image * by_image).sum()


def _own_in_tile(own: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """The row of each text's image in a tile (1, R), and whether it is in the tile (R,), without asking the device."""
    place = own - start
    return place.clamp(0, rows - 1)[None], (place >= 0) & (place < rows)


def _check(image: Tensor, text: Tensor, text_to_image: Tensor | None, valid: Tensor | None) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"Features are {tuple(image.shape)} and {tuple(text.shape)}; expected (B,D) and (R,D).")
    if text_to_image is None and len(image) != len(text):
        raise ValueError(f"{len(image)} images and {len(text)} texts: pass text_to_image, which image each describes.")
    if text_to_image is not None and text_to_image.shape != text.shape[:1]:
        raise ValueError(f"text_to_image is {tuple(text_to_image.shape)}; expected one row for each text, {len(text)}.")
    if valid is not None and valid.shape != image.shape[:1]:
        raise ValueError(f"valid is {tuple(valid.shape)}; expected one entry for each image, {len(image)}.")
