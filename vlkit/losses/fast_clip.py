"""FastCLIP: contrast with the whole data set instead of the batch, by a running normaliser for each sample.

    term = FastClipLoss(version=3)
    term.begin(num_samples=6000, steps_per_epoch=23, steps=1000, device=device)
    loss = term(features, batch, step)          # batch.ids say which samples these are

The softmax of CLIP normalises over the negatives of a batch; with few of them its gradient is biased. Here each
sample keeps an average u of what it saw of its negatives in all batches so far, and the gradient is divided by that:

    g = mean over negatives of exp((negative - positive) / tau)        one for each image, one for each text
    u <- (1 - gamma) u + gamma g                                       gamma falls from 1 to its end along a cosine
    gradient = mean of grad g / (eps + u)

With gamma = 1 this is the mini-batch loss. A constant gamma and temperature is SogCLR (arXiv:2202.12387).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkit.contracts import Features, ImageTextBatch
from vlkit.losses.base import (
    TILE_SIZE,
    Duplicates,
    Share,
    accumulation_dtype,
    keys_of,
    log_sum_exps,
    share_of,
    sum_over_ranks,
    tile_logits,
)

# As in the authors' code.
LOG_EPS = math.log(1e-14)


class FastClip(NamedTuple):
    """What one batch gives."""

    loss: Tensor  # ()
    log_u_image: Tensor  # (B,) the new normalisers of the valid images, as logarithms
    log_u_text: Tensor  # (B,)
    counted: Tensor  # (B,) bool: samples with a text and with negatives; the others keep what they had


class FastClipLoss(nn.Module):
    """The global contrastive loss with per-sample normalisers, over the batches of all ranks.

    Args:
        version: 1: the temperature stays where the model starts; 3: it is learned, with `rho` against its vanishing.
        gamma: how much of the newest batch enters a normaliser, after the decay.
        gamma_decay: the share of the run over which gamma falls from 1 to `gamma`, epoch by epoch; 0 for SogCLR.
        rho: weight of the temperature in version 3: 6.5 for some millions of samples, more for more (the paper).
        duplicates: "mask": equal captions, and the same image, are no negatives; "keep": they are.
        tile_size: at most so many logits exist at a time.

    Source: Wei et al. 2024, "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited
        Resources", arXiv:2407.01445, algorithm 1, equations 2, GCL and RGCL-g. The estimator: Yuan et al. 2022,
        "Provable Stochastic Optimization for Global Contrastive Learning", arXiv:2202.12387.
    Differs: normalisers are kept as logarithms, so that none overflows; captions of one image share a normaliser.
        The objective is half the paper's, so that its size is that of CLIP's loss, and version 1 leaves out the
        constant factor tau, as the authors' code does. The temperature's gradient is that of the paper's objective;
        the authors' code counts its first part twice on one process. Its learning rate is `optim.logit_scale_lr`
        with the run's schedule, where the authors keep it constant and lower it below tau = 0.03.
    """

    needs: frozenset[str] = frozenset({"image", "text", "ids"})

    log_u_image: Tensor
    log_u_text: Tensor

    def __init__(
        self,
        version: Literal[1, 3] = 3,
        gamma: float = 0.2,
        gamma_decay: float = 0.5,
        rho: float = 6.5,
        duplicates: Duplicates = "keep",
        tile_size: int = TILE_SIZE,
    ) -> None:
        super().__init__()
        self.version, self.gamma, self.gamma_decay, self.rho = version, gamma, gamma_decay, rho
        self.duplicates: Duplicates = duplicates
        self.tile_size = tile_size
        self._steps_per_epoch, self._decay_epochs = 1, 0
        for name in ("log_u_image", "log_u_text"):
            self.register_buffer(name, torch.empty(0))

    def begin(self, *, num_samples: int, steps_per_epoch: int, steps: int, device: torch.device) -> None:
        """Make room for the samples of a run; before a checkpoint is put in."""
        self._steps_per_epoch = steps_per_epoch
        self._decay_epochs = math.ceil(self.gamma_decay * steps / steps_per_epoch) if self.gamma_decay else 0
        for name in ("log_u_image", "log_u_text"):
            setattr(self, name, torch.full((num_samples,), -torch.inf, device=device))

    def gamma_at(self, step: int) -> float:
        """Gamma of a step; the same within an epoch."""
        return cosine_gamma(step // self._steps_per_epoch, self._decay_epochs, self.gamma)

    def forward(self, features: Features, batch: ImageTextBatch, step: int) -> Tensor:
        """() the loss over all ranks, the same on each; the normalisers of the batch's samples move on."""
        valid = batch.valid
        # A padding row has no number; it is not valid.
        ids = batch.ids.to(self.log_u_image.device).clamp(min=0)[valid.to(self.log_u_image.device)]
        assert len(self.log_u_image) > 0, "begin() was not called"
        share = share_of(
            features.image,
            features.text,
            features.text_to_image,
            valid,
            **({"same_caption": None, "same_image": None} | keys_of(self.duplicates, features, batch)),
            over_ranks=True,
        )
        found = fast_clip_step(
            share,
            features.logit_scale,
            self.log_u_image[ids],
            self.log_u_text[ids],
            gamma=self.gamma_at(step),
            rho=None if self.version == 1 else self.rho,
            tile_size=self.tile_size,
        )
        self._store(share, ids, found)
        return found.loss

    def _store(self, share: Share, ids: Tensor, found: FastClip) -> None:
        """Write the new normalisers of all processes' samples, so that every process keeps the same."""
        everyone = share.images.gather(ids)
        counted = share.images.gather(found.counted.to(torch.uint8)).bool()
        for state, mine in ((self.log_u_image, found.log_u_image), (self.log_u_text, found.log_u_text)):
            state[everyone[counted]] = share.images.gather(mine.to(state.dtype))[counted]


def cosine_gamma(epoch: int, decay_epochs: int, end: float) -> float:
    """From 1 in epoch 0 along half a cosine to `end` in epoch `decay_epochs` and after."""
    if epoch >= decay_epochs:
        return end
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * epoch / decay_epochs))


def fast_clip_step(
    share: Share,
    logit_scale: Tensor,
    log_u_image: Tensor,
    log_u_text: Tensor,
    *,
    gamma: float,
    rho: float | None,
    tile_size: int = TILE_SIZE,
) -> FastClip:
    """The loss of one batch and the new normalisers.

    Args:
        share: the batch, from `share_of`.
        logit_scale: () 1 / tau.
        log_u_image: (B,) logarithms of the valid images' normalisers, -inf for samples not seen before.
        log_u_text: (B,) those of their texts.
        gamma: weight of this batch in the normalisers.
        rho: of version 3; None for version 1, whose temperature has no gradient.
        tile_size: at most so many logits exist at a time.
    """
    dtype = accumulation_dtype(share.image)
    scale = logit_scale.to(dtype) if rho is not None else logit_scale.detach().to(dtype)
    with torch.autocast(share.image.device.type, enabled=False):
        image, text = share.image.to(dtype), share.text.to(dtype)
        own = share.own[share.texts.own]
        lse_image, lse_text = _NegativeSums.apply(image, text, scale, share, tile_size)
        positive = scale * (image[own] * text).sum(1)
        counts_image, counts_text = _num_negatives(share, tile_size)
        # Logarithms of g, for each pair of an image and its text.
        log_g_image = (lse_image - counts_image.clamp(min=1).log())[own] - positive
        log_g_text = lse_text - counts_text.clamp(min=1).log() - positive
        num_texts = own.bincount(minlength=len(image))
        counted = (num_texts > 0) & (counts_image > 0)
        counted[own[counts_text == 0]] = False
        new_image = _moved(log_u_image.to(dtype), _log_mean_exp(log_g_image.detach(), own, num_texts), gamma)
        new_text = _moved(log_u_text.to(dtype), _log_mean_exp(log_g_text.detach(), own, num_texts), gamma)
        loss = _loss(share, own, num_texts, counted, (log_g_image, new_image), (log_g_text, new_text), scale, rho)
    return FastClip(loss, new_image, new_text, counted)


def _loss(
    share: Share,
    own: Tensor,
    num_texts: Tensor,
    counted: Tensor,
    of_images: tuple[Tensor, Tensor],
    of_texts: tuple[Tensor, Tensor],
    scale: Tensor,
    rho: float | None,
) -> Tensor:
    """The value is half the sum of the mean log normalisers; the gradient that of g / (eps + u)."""
    weight = counted[own] / num_texts[own].clamp(min=1)
    eps = torch.full_like(scale, LOG_EPS)
    values, ratios = scale.new_zeros(()), scale.new_zeros(())
    for log_g, log_u in (of_images, of_texts):
        log_u = torch.where(counted, torch.logaddexp(log_u, eps), 0.0)
        values = values + log_u.sum()
        ratios = ratios + (weight * torch.where(weight > 0, log_g - log_u[own], 0.0).exp()).sum()
    # A process may have nothing to add, and every process must take part in the sums.
    num_counted = share.texts.sum(counted.sum().to(scale.dtype)).clamp(min=1)
    value = share.texts.sum(values.detach().clone()) / (2 * num_counted)
    surrogate = sum_over_ranks(ratios / (2 * num_counted), share.texts)
    gradient_only = surrogate - surrogate.detach()
    if rho is None:
        return value + gradient_only
    tau = 1 / scale
    return tau * (value + rho) + tau.detach() * gradient_only


class _NegativeSums(torch.autograd.Function):
    """(image, text, scale) -> log-sum-exps over negatives only: of each image (B,) and of each own text (R,)."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, share: Share, tile_size: int
    ) -> tuple[Tensor, Tensor]:
        texts = share.texts.gather(text)
        ctx.share, ctx.rows = share, max(1, tile_size // max(1, len(texts)))
        found = log_sum_exps(image, texts, scale, share, ctx.rows, only_negatives=True)
        ctx.save_for_backward(image, texts, scale, found.image, found.text)
        return found.image, found.text[share.texts.own]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, lse_image, lse_text = ctx.saved_tensors
        share: Share = ctx.share
        of_image, of_texts = grads[0], share.texts.gather(grads[1].contiguous())
        by_image, by_texts = torch.empty_like(image), torch.zeros_like(texts)
        with torch.autocast(image.device.type, enabled=False):
            for start in range(0, len(image), ctx.rows):
                tile = slice(start, start + ctx.rows)
                logits = tile_logits(image[tile], texts, scale, share, start, only_negatives=True)
                gradient = (logits - lse_image[tile, None]).exp_() * of_image[tile, None]
                gradient += logits.sub_(lse_text).exp_() * of_texts
                torch.mm(gradient, texts, out=by_image[tile])
                by_texts.addmm_(gradient.T, image[tile])
        by_scale = (image * by_image).sum()
        return scale * by_image, share.texts.sum_own(scale * by_texts), by_scale, None, None


def _num_negatives(share: Share, tile_size: int) -> tuple[Tensor, Tensor]:
    """Negatives of each image (B,) and of each own text (R,), as floats of the features' precision."""
    dtype = accumulation_dtype(share.image)
    own = share.own[share.texts.own]
    of_image = share.texts.total - own.bincount(minlength=len(share.image)).to(dtype)
    of_text = torch.full((share.texts.total,), share.images.total - 1, dtype=dtype, device=own.device)
    if share.same is not None:
        rows = max(1, tile_size // max(1, share.texts.total))
        left_out = torch.zeros_like(of_text)
        for start in range(0, len(share.image), rows):
            tile = share.same.mask(share.own, start, min(rows, len(share.image) - start))
            of_image[start : start + rows] -= tile.sum(1)
            left_out += tile.sum(0)
        of_text -= share.texts.sum(left_out)
    return of_image, of_text[share.texts.own]


def _log_mean_exp(values: Tensor, own: Tensor, num_texts: Tensor) -> Tensor:
    """Of pairs (R,) for each image (B,): the logarithm of the mean of the exponentials over its texts."""
    top = values.new_full((len(num_texts),), -torch.inf).scatter_reduce_(0, own, values, "amax")
    shift = torch.where(top.isfinite(), top, 0.0)
    total = torch.zeros_like(top).index_add_(0, own, (values - shift[own]).exp_())
    return shift + (total / num_texts.clamp(min=1)).log()


def _moved(log_u: Tensor, log_g: Tensor, gamma: float) -> Tensor:
    """(1 - gamma) u + gamma g, in logarithms; g alone for a sample not seen before."""
    if gamma >= 1:
        return log_g
    moved = torch.logaddexp(log_u + math.log1p(-gamma), log_g + math.log(gamma))
    return torch.where(log_u.isfinite(), moved, log_g)
