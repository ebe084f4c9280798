"""Distillation: the student's similarities are to follow a teacher's, over all pairs of the batch.

    loss = distillation_loss(image, text, scale, teacher_image, teacher_text, teacher_scale)

Each row and each column of the teacher's similarity matrix is a distribution; the loss is its Kullback-Leibler
divergence to the student's, the mean of both directions. Teacher and student may have different widths. No matrix is
kept: tiles of both are made again in backward.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.contracts import Features, ImageTextBatch
from vlkit.errors import DataError
from vlkit.losses.base import (
    TILE_SIZE,
    Share,
    accumulation_dtype,
    log_sum_exps,
    share_of,
    sum_over_ranks,
    tile_logits,
)

# MobileCLIP's teachers have about this scale, as every CLIP trained for long.
TEACHER_LOGIT_SCALE = 100.0


def distillation_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor,
    text_to_image: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    over_ranks: bool = False,
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """KL divergence from the student's to the teacher's similarities, the mean over rows and over columns.

    Args:
        image: (B, D) unit-norm features of the student.
        text: (R, D) those of its texts.
        logit_scale: () of the student, already exponentiated.
        teacher_image: (B, E) unit-norm features of the teacher; no gradient goes there.
        teacher_text: (R, E).
        teacher_logit_scale: () of the teacher, already exponentiated.
        text_to_image: (R,) the image row each text describes; default: row i describes image i.
        valid: (B,) images to count; the others and their texts are left out.
        over_ranks: the batch is spread over all processes; see `clip_loss`.
        tile_size: at most so many logits exist at a time.

    Returns:
        () in nats; 0 when teacher and student have the same similarities, and when no row is valid.

    Raises:
        ValueError: shapes that do not go together.

    Source: Vasu et al. 2024, "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training",
        arXiv:2311.17049, equations 2 and 3. Tiles and closed-form gradient: ours.
    Differs: one teacher; the student has its learned scale, not one of its own for this loss.
    """
    if len(teacher_image) != len(image) or len(teacher_text) != len(text):
        raise ValueError(
            f"The teacher's features have {len(teacher_image)} and {len(teacher_text)} rows; "
            f"expected those of the student, {len(image)} and {len(text)}."
        )
    student = share_of(image, text, text_to_image, valid, None, None, over_ranks)
    teacher = share_of(teacher_image.detach(), teacher_text.detach(), text_to_image, valid, None, None, over_ranks)
    if student.texts.total == 0:
        return (image.sum() + text.sum() + logit_scale) * 0.0  # keeps the graph, so that backward works
    dtype = accumulation_dtype(image)
    with torch.autocast(image.device.type, enabled=False):
        taught = (teacher.image.to(dtype), teacher.text.to(dtype), teacher_logit_scale.detach().to(dtype))
        inputs = (student.image.to(dtype), student.text.to(dtype), logit_scale.to(dtype))
        mine: Tensor = _Divergence.apply(*inputs, *taught, student, tile_size)
        return sum_over_ranks(mine, student.texts)


class DistillationLoss(nn.Module):
    """`distillation_loss` as a term of an objective; the teacher's features lie in the batch.

    `batch.extra` holds `teacher_image` (B, E) and `teacher_text` (R, E), and `teacher_logit_scale` () where a
    teacher runs beside the student; features stored in shards are taken with `logit_scale`.

    Args:
        logit_scale: of a teacher whose features are stored.
        tile_size: at most so many logits exist at a time.
    """

    needs: frozenset[str] = frozenset({"image", "text", "teacher"})

    def __init__(self, logit_scale: float = TEACHER_LOGIT_SCALE, tile_size: int = TILE_SIZE) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.tile_size = tile_size

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        """() the loss over all ranks, the same on each; gradients of parameters are to be averaged over ranks."""
        extra, device = batch.extra, features.image.device
        for name in ("teacher_image", "teacher_text"):
            if name not in extra:
                raise DataError(
                    f"The batch holds no {name} (it holds {', '.join(sorted(extra)) or 'nothing extra'}). Name a "
                    "teacher in loss.distillation, or train on shards that store the teacher's features."
                )
        scale = extra.get("teacher_logit_scale", torch.tensor(self.logit_scale))
        return distillation_loss(
            features.image,
            features.text,
            features.logit_scale,
            extra["teacher_image"].to(device),
            extra["teacher_text"].to(device),
            scale.to(device),
            features.text_to_image,
            batch.valid,
            over_ranks=True,
            tile_size=self.tile_size,
        )


class _Weights(NamedTuple):
    image: float  # of each image's divergence
    text: float  # of each text's


class _Divergence(torch.autograd.Function):
    """This process's part of the loss. With P the teacher's distributions, dloss/dlogit = weight (softmax - P)."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        teacher_scale: Tensor,
        share: Share,
        tile_size: int,
    ) -> Tensor:
        texts, taught = share.texts.gather(text), share.texts.gather(teacher_text)
        rows = max(1, tile_size // len(texts))
        ours = log_sum_exps(image, texts, scale, share, rows)
        theirs = log_sum_exps(teacher_image, taught, teacher_scale, share, rows)
        ctx.share, ctx.rows = share, rows
        ctx.save_for_backward(
            *(image, texts, scale, ours.image, ours.text),
            *(teacher_image, taught, teacher_scale, theirs.image, theirs.text),
        )
        weights = _weights(share)
        total = image.new_zeros(())
        for tile in _tiles((image, texts, scale), (teacher_image, taught, teacher_scale), share, rows):
            # log P - log Q, of rows and of columns.
            of_image = tile.theirs - theirs.image[tile.rows, None]
            of_text = tile.theirs - theirs.text
            total += weights.image * (of_image.exp() * (of_image - tile.ours + ours.image[tile.rows, None])).sum()
            total += weights.text * (of_text.exp() * (of_text - tile.ours + ours.text)).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, lse_image, lse_text, *taught, their_image, their_text = ctx.saved_tensors
        weights = _weights(ctx.share)
        by_image, by_texts = torch.empty_like(image), torch.zeros_like(texts)
        with torch.autocast(image.device.type, enabled=False):
            for tile in _tiles((image, texts, scale), taught, ctx.share, ctx.rows):
                gradient = (tile.ours - lse_image[tile.rows, None]).exp_()
                gradient -= (tile.theirs - their_image[tile.rows, None]).exp_()
                gradient *= weights.image
                of_text = (tile.ours - lse_text).exp_()
                of_text -= (tile.theirs - their_text).exp_()
                gradient.add_(of_text, alpha=weights.text)
                torch.mm(gradient, texts, out=by_image[tile.rows])
                by_texts.addmm_(gradient.T, image[tile.rows])
        by_scale = grad * (image * by_image).sum()
        # Each process has the gradient of the sum over processes in `grad`, the same on all.
        of_text = ctx.share.texts.sum_own(by_texts.mul_(scale))
        return grad * scale * by_image, grad * of_text, by_scale, None, None, None, None, None


class _Tile(NamedTuple):
    rows: slice
    ours: Tensor  # (rows, G) logits of the student
    theirs: Tensor  # (rows, G) those of the teacher


def _tiles(student: Sequence[Tensor], teacher: Sequence[Tensor], share: Share, num_rows: int) -> Iterator[_Tile]:
    """Tiles of the logits of two models, each given as (images, texts of all processes, scale)."""
    for start in range(0, len(share.image), num_rows):
        rows = slice(start, start + num_rows)
        logits = [tile_logits(images[rows], texts, scale, share, start) for images, texts, scale in (student, teacher)]
        yield _Tile(rows, *logits)


def _weights(share: Share) -> _Weights:
    return _Weights(0.5 / share.images.total, 0.5 / share.texts.total)
