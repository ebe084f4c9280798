"""PACL: image and text are compared through the patches that the text attends to, each pair with its own attention.

    a_k = softmax_k(scale cos(v_k, t));   v(x,y) = sum_k a_k v_k;   phi(x,y) = cos(v(x,y), t)

The loss is the symmetric cross-entropy over all pairs of the batch. The pooled vector belongs to the pair, not to the
image: pooling each image once, by its own text, lets the positive leak into all negatives.

The pooled vectors are never made. With S = V t and the Gram matrix V V^T of each image (exact):

    phi = a.S / sqrt(a^T (V V^T) a)

Images go through in chunks, which are computed again in backward: memory for attention is that of one chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlkit.contracts import Features, ImageTextBatch
from vlkit.distributed import Spread, gather_counts, rank
from vlkit.errors import ModelError
from vlkit.losses.base import TILE_SIZE, accumulation_dtype

# Where the features of the encoder hold the patch tokens that the head takes.
PATCH_TOKENS = "patch_tokens"
# Lengths below this count as this, as in torch's own normalize.
_SHORTEST = 1e-12


def alignment_scores(
    patches: Tensor, text: Tensor, attention_scale: Tensor | float, tile_size: int = TILE_SIZE
) -> Tensor:
    """phi of all images with all texts.

    Args:
        patches: (B, P, D) of any length: the mean of patches is by their length.
        text: (R, D) unit norm.
        attention_scale: multiplier of the cosine inside the attention; 0 is the plain mean of the patches.
        tile_size: at most so many weights of attention exist at a time.

    Returns:
        (B, R) cosines, float32 (float64 for float64 features).

    Raises:
        ValueError: shapes that do not go together.

    Source: Mukhoti et al. 2023, "Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning",
        CVPR, arXiv:2212.04994, section 3. Gram form and chunks: ours.
    Differs: The paper states no temperature inside the attention, so it is an argument.
    """
    if patches.ndim != 3 or text.ndim != 2 or patches.shape[2] != text.shape[1]:
        raise ValueError(f"Patches are {tuple(patches.shape)} and texts {tuple(text.shape)}; expected (B,P,D), (R,D).")
    dtype = accumulation_dtype(patches)
    scale = torch.as_tensor(attention_scale, dtype=dtype, device=patches.device)
    rows = max(1, tile_size // max(1, patches.shape[1] * len(text)))
    with torch.autocast(patches.device.type, enabled=False):
        texts = text.to(dtype)
        parts = [_scores(part, texts, scale) for part in patches.to(dtype).split(rows)]
    return torch.cat(parts) if parts else patches.new_zeros((0, len(text)), dtype=dtype)


def _scores(patches: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _gram_scores(patches, text, scale)
    found: Tensor = checkpoint(_gram_scores, patches, text, scale, use_reentrant=False, preserve_rng_state=False)
    return found


def _gram_scores(patches: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    similarity = patches @ text.T  # (b,P,R) of vectors of any length
    cosine = similarity / patches.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
    attention = (scale * cosine).softmax(dim=1)
    gram = patches @ patches.transpose(1, 2)
    squared = (attention * (gram @ attention)).sum(dim=1)  # of the length of each pooled vector
    found: Tensor = (attention * similarity).sum(dim=1) / squared.clamp_min(_SHORTEST**2).sqrt()
    return found


def patch_alignment_loss(
    patches: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attention_scale: Tensor | float,
    text_to_image: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    over_ranks: bool = False,
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """Symmetric softmax cross-entropy of phi between the images and the texts of a batch.

    Directions and averages are those of `clip_loss`.

    Args:
        patches: (B, P, D) of any length.
        text: (R, D) unit norm.
        logit_scale: () multiplier of phi, already exponentiated.
        attention_scale: see `alignment_scores`.
        text_to_image: (R,) the image row each text describes; default: row i describes image i.
        valid: (B,) images to count; the others and their texts are neither positives nor negatives.
        over_ranks: the batch is spread over all processes and these are the rows of this one; every one gets the loss
            of the whole batch, and gradients that are to be averaged over processes.
        tile_size: at most so many weights of attention exist at a time.

    Returns:
        () the loss in nats; 0 when no row is valid.

    Raises:
        ValueError: shapes that do not go together.

    Source: Mukhoti et al. 2023, arXiv:2212.04994, equations 3 to 5.
    Differs: several texts an image, and invalid rows.
    """
    if text_to_image is None:
        if len(patches) != len(text):
            raise ValueError(f"{len(patches)} images and {len(text)} texts: pass text_to_image.")
        text_to_image = torch.arange(len(text), device=text.device)
    counted = torch.ones(len(patches), dtype=torch.bool, device=text.device) if valid is None else valid.to(text.device)
    counts = [[len(text), len(patches)]]
    if over_ranks:
        counts = gather_counts(torch.tensor(counts[0], device=text.device))
    texts, images = (Spread(rows, rank() if over_ranks else 0) for rows in zip(*counts, strict=True))
    own = texts.gather(text_to_image + images.own.start)
    counted = images.gather(counted.to(torch.uint8)).bool()
    scores = alignment_scores(patches, _gathered(text, texts), attention_scale, tile_size)
    scores = _gathered(scores, images)  # of all images: a small matrix beside the attention it comes from
    kept = counted[own]
    if not bool(kept.any()):
        return (scores.sum() + logit_scale) * 0.0  # keeps the graph, so that backward works
    logits = logit_scale.to(scores.dtype) * scores[counted][:, kept]
    return _symmetric(logits, (counted.cumsum(0) - 1)[own[kept]])


def _gathered(rows: Tensor, spread: Spread) -> Tensor:
    """The rows of all processes, with gradients: each computes the whole loss, so averaging them is right."""
    if spread.num_ranks == 1:
        return rows
    found: Tensor = _Gather.apply(rows, spread)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return spread.gather(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.spread.sum_own(grad), None


def _symmetric(logits: Tensor, own: Tensor) -> Tensor:
    """The mean over texts one way; the other way the mean over images of the mean over their texts."""
    place = torch.arange(len(own), device=own.device)
    of_text = -logits.log_softmax(dim=0)[own, place]
    of_image = -logits.log_softmax(dim=1)[own, place]
    count = torch.bincount(own, minlength=len(logits))
    per_text = 1 / count[own].to(logits.dtype)  # the texts of one image share its weight
    return (of_text.mean() + (of_image * per_text).sum() / (count > 0).sum()) / 2


class PatchAlignmentLoss(nn.Module):
    """`patch_alignment_loss` as a term of an objective, with the head that it trains.

    Args:
        head: patch tokens (B,P,W) -> (B,P,D); has an `attention_scale`.
        tile_size: at most so many weights of attention exist at a time.
    """

    needs: frozenset[str] = frozenset({PATCH_TOKENS, "text"})

    def __init__(self, head: nn.Module, tile_size: int = TILE_SIZE) -> None:
        super().__init__()
        self.head = head
        self.tile_size = tile_size

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        """() the loss over all ranks, the same on each; gradients of parameters are to be averaged over ranks."""
        if PATCH_TOKENS not in features.extra:
            raise ModelError("The features hold no patch tokens. Take a model whose vision tower gives them.")
        tokens = features.extra[PATCH_TOKENS]
        return patch_alignment_loss(
            self.head(tokens.to(next(self.head.parameters()).dtype)),
            features.text,
            features.logit_scale,
            self.head.attention_scale,  # type: ignore[arg-type]
            features.text_to_image,
            batch.valid,
            over_ranks=True,
            tile_size=self.tile_size,
        )
